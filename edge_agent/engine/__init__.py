"""The lower layers of the model in ONNX Runtime, and the tokenizer."""
