"""Topologies: who exchanges with whom, and with what weight."""

from algorithms.topologies.alternating import Alternating
from algorithms.topologies.barabasi_albert import BarabasiAlbert
from algorithms.topologies.base import GraphTopology, Topology
from algorithms.topologies.circulant import CirculantTopology
from algorithms.topologies.complete import Complete
from algorithms.topologies.erdos_renyi import ErdosRenyi
from algorithms.topologies.exponential import Exponential
from algorithms.topologies.file import File
from algorithms.topologies.mixing import Mixing
from algorithms.topologies.one_peer_exponential import OnePeerExponential
from algorithms.topologies.random_matching import RandomMatching
from algorithms.topologies.random_regular import RandomRegular
from algorithms.topologies.ring import Ring
from algorithms.topologies.torus import Torus
from algorithms.topologies.undirected import RandomTopology, UndirectedTopology

__all__ = [
    "Alternating",
    "BarabasiAlbert",
    "CirculantTopology",
    "Complete",
    "ErdosRenyi",
    "Exponential",
    "File",
    "GraphTopology",
    "Mixing",
    "OnePeerExponential",
    "RandomMatching",
    "RandomRegular",
    "RandomTopology",
    "Ring",
    "Topology",
    "Torus",
    "UndirectedTopology",
]
