"""The pages of the console, drawn from the operations of operators."""
