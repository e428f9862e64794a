"""Operators: people who use the console, and the secrets that stand for them."""
