"""Families of operator rules, which both tables of operators share."""
