"""Sweeps: the same model at several sizes, or by several methods, for what they have in common."""
