"""Evaluation and calibration of early exits, in NumPy."""
