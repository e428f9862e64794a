"""Publish and subscribe over MQTT or in memory, and the client for prompts."""
