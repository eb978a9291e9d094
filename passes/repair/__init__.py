"""Refits of the weights that read what was cut."""
