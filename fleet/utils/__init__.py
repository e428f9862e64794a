"""Helpers that know nothing of the fleet: files, logs, plots, command-line errors."""
