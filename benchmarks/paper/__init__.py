"""The paper's experiments on this system, with additional baselines (ADR 0024)."""
