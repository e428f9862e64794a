"""Joining a fleet, and renewing the device's certificate."""
