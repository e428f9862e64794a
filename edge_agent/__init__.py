"""The device: the model in ONNX Runtime with early exits, and the agent that serves prompts."""
