"""The bridge to the MQTT broker of a house: Home Assistant's discovery, prompts, modes, events."""
