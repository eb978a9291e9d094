"""Text to train on: documents of several kinds, as windows in memory-mapped files of tokens."""
