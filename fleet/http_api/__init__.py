"""The HTTP APIs of OpenAI and Ollama, translated from and to prompts and replies."""
