"""Streamed runs over torch graphs."""
