"""The state that a device keeps on disk: bundle slots and desired configuration."""
