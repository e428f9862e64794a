"""Model bundles: manifest, signature, verification and storage."""
