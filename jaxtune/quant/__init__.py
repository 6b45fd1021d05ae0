"""Frozen weights in few bits."""
