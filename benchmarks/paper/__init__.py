"""The paper's experiments on this system, beside baselines that it lacks (ADR 0024)."""
