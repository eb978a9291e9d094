"""What is known of the values of an ONNX graph without running it."""
