"""Helpers without knowledge of the fleet: files, logs, plots, command-line errors."""
