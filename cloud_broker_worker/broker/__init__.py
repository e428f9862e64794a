"""MQTT brokers: the embedded one, and the configuration of mosquitto."""
