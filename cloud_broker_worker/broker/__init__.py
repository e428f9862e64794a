"""MQTT brokers of a fleet; importing this package needs no model and no worker.

`embedded.EmbeddedBroker` is the broker inside a process. For a mosquitto, `mosquitto` writes the
configuration, `mosquitto_sync` keeps its rights and revocation list equal to the registry, and
`mosquitto_reload` makes it read them.
"""
