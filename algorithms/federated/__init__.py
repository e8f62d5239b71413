"""Federated averaging and its relatives."""

from algorithms.federated.fedavg import FedAvg

__all__ = ["FedAvg"]
