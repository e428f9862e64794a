"""The API of operators: what they can read and change, as one table of operations."""
