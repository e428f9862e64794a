"""The device's session with a cloud worker."""
