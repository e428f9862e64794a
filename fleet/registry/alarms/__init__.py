"""Alarms: their rules, their conditions, their states and events."""
