"""Federated averaging and its relatives."""

from starling.algorithms.federated.base import Federated
from starling.algorithms.federated.fedavg import FedAvg
from starling.algorithms.federated.fedprox import FedProx
from starling.algorithms.federated.scaffold import Scaffold

__all__ = ["FedAvg", "FedProx", "Federated", "Scaffold"]
