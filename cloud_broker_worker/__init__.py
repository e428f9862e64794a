"""The cloud's side: the worker with the upper layers, and the broker between it and the devices."""
