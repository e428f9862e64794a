"""The core of the fleet: protocol, bundles, transport, registry, server and command line."""

__version__ = "0.1.0"
