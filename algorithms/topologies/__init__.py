"""Topologies: who exchanges with whom, and with what weight."""

from starling.algorithms.topologies.alternating import Alternating
from starling.algorithms.topologies.barabasi_albert import BarabasiAlbert
from starling.algorithms.topologies.base import GraphTopology, Topology
from starling.algorithms.topologies.circulant import CirculantTopology
from starling.algorithms.topologies.complete import Complete
from starling.algorithms.topologies.erdos_renyi import ErdosRenyi
from starling.algorithms.topologies.exponential import Exponential
from starling.algorithms.topologies.file import File
from starling.algorithms.topologies.mixing import Mixing
from starling.algorithms.topologies.one_peer_exponential import OnePeerExponential
from starling.algorithms.topologies.random_matching import RandomMatching
from starling.algorithms.topologies.random_regular import RandomRegular
from starling.algorithms.topologies.ring import Ring
from starling.algorithms.topologies.torus import Torus
from starling.algorithms.topologies.undirected import RandomTopology, UndirectedTopology

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
