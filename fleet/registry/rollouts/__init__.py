"""Roll-outs of bundles: plan, canary analysis, states and steps."""
