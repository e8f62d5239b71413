"""Federated averaging and its relatives."""

from algorithms.federated.base import Federated
from algorithms.federated.fedavg import FedAvg
from algorithms.federated.fedprox import FedProx
from algorithms.federated.scaffold import Scaffold

__all__ = ["FedAvg", "FedProx", "Federated", "Scaffold"]
