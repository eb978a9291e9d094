"""ONNX graphs: the program, and what is known of its operators and values."""
