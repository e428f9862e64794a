"""The composition root: processes and tasks that serve a fleet. May import every package."""
