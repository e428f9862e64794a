"""Training of exit heads on the model's own answers."""
