"""Passes: what chooses, masks and repairs, one a file."""
