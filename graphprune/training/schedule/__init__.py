"""Pruning in the middle of training: more zeros at each of some steps, in anybody's loop."""
