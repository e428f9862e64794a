"""Exit heads from prompts: what the model says, what its layers see of it, and the fit."""
