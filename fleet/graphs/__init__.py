"""The graphs of a bundle in ONNX Runtime: the lower layers and the exits."""
