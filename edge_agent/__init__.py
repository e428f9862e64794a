"""The device: the model in ONNX Runtime with early exits, and the agent that serves prompts."""

import fleet.version  # noqa: F401  # before ONNX Runtime: it turns off its telemetry
