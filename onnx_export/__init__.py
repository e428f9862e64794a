"""Export of a Hugging Face model as a bundle: exit heads, ONNX graphs, cloud partition, manifest."""
