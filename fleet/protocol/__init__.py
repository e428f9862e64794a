"""The wire protocol: topics, rights, messages and their encoding. No I/O."""
