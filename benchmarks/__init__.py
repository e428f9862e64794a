"""Programs that measure; each prints what it measured and nothing that it did not."""
