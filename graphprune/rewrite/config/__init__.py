"""Configurations of slim models, solved for."""
