"""The passes that choose units in the course of a training, one a file."""
