"""Answers for programs on the device: the HTTP API, and an engine in Python."""
