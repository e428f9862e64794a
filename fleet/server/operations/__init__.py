"""The operations of operators on the registry of this fleet."""
