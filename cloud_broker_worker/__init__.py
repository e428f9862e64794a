"""The cloud side: the worker that runs the upper layers, and the MQTT brokers."""
