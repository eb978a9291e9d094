"""Rewriting a torch program for a plan."""
