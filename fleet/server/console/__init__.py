"""The console: the API of operators and its pages, over HTTP."""
