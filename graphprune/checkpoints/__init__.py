"""Checkpoints on disk: weights in safetensors files, configurations, and code that they bring."""
