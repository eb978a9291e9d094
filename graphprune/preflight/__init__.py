"""What can be told of a run before a model is loaded."""
