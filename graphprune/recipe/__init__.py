"""Recipes: what to remove, how to choose it, and what to write."""
