"""What every part of the fleet agrees on: protocol, topics, transport, bundle manifest, exit policy, registry."""

__version__ = "0.1.0"
