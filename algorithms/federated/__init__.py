"""Federated averaging: local epochs on a sampled cohort, then a server's step."""
