"""The device: ONNX Runtime partition with early exits, upload in the background, and the agent that serves prompts."""
