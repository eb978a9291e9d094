"""Streamed runs over ONNX graphs."""
