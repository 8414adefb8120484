"""Foretell what a cache will take, before it is run."""
