"""The HTTP API of the fleet: keys, the choice of a device, and prompts for apps."""
