"""Domains of training data: how much of a batch each has, which may change while a model trains."""
