"""Processes that share one run: which of them this is, its share of the work, what they tell."""
