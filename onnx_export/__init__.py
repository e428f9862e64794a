"""Makes bundles: exit heads, edge blocks and LM head as ONNX graphs, the cloud partition, and the manifest."""
