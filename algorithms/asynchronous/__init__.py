"""Asynchronous: no barrier; each node has rounds of its own."""
