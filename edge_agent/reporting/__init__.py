"""Reports to the collector, kept on disk until they are acknowledged."""
