"""Slim modules of the original class, and what they are judged by."""
