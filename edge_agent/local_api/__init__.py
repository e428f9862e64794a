"""The HTTP API of a device, for apps on the same machine or with a key."""
