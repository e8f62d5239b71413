"""Federated averaging and its relatives."""
