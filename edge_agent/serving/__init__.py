"""The agent that serves prompts: requests, answers, triggers."""
