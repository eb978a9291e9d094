"""Exported programs in ``.pt2`` files."""
