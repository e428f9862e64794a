"""Fuzz tests draw the same examples on every run, so that a failure is one for everybody."""

from hypothesis import settings

settings.register_profile("fleet", deadline=None, derandomize=True, max_examples=300)
settings.load_profile("fleet")
