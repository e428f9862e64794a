"""Export of a Hugging Face model as a bundle: heads, ONNX graphs, cloud partition, manifest."""

import fleet.version  # noqa: F401  # before ONNX Runtime: it turns off its telemetry
