"""Measuring a slim model beside its dense one."""
