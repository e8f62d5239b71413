"""Algorithms as programs of one node, and their parts. Knows torch and mathematics; never Ray, MLflow or files."""
