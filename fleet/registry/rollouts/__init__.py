"""Bundles and their roll-outs: plan, canary analysis, states and steps."""
