"""Programs: a graph of either format with its axes, structures and weights."""
