"""The broker: amqtt inside the process, or the configuration of a mosquitto."""
