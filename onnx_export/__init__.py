"""Export of a Hugging Face model as a bundle: heads, ONNX graphs, cloud partition, manifest."""
