"""Random graphs and connectivity by networkx, which is imported when first used, and has no types."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable
from typing import Any, TypeAlias, cast

Edge: TypeAlias = tuple[int, int]


def binomial(num_nodes: int, probability: float, seed: int) -> list[Edge]:
    """Return the edges of a random graph G(N, p)."""
    return _edges(_networkx().fast_gnp_random_graph(num_nodes, probability, seed=seed))


def preferential(num_nodes: int, num_edges: int, seed: int) -> list[Edge]:
    """Return the edges of a graph grown by preferential attachment from a clique of ``num_edges`` + 1 ≤ N nodes."""
    clique = _networkx().complete_graph(num_edges + 1)
    return _edges(_networkx().barabasi_albert_graph(num_nodes, num_edges, seed=seed, initial_graph=clique))


def regular(num_nodes: int, degree: int, seed: int) -> list[Edge]:
    """Return the edges of a random graph with ``degree`` < N neighbours for each node; degree · N is even."""
    # A dense one is drawn as the complement of a sparse one, which is as uniform and much faster.
    if degree > (num_nodes - 1) / 2:
        sparse = _networkx().random_regular_graph(num_nodes - 1 - degree, num_nodes, seed=seed)
        return _edges(_networkx().complement(sparse))
    return _edges(_networkx().random_regular_graph(degree, num_nodes, seed=seed))


def pieces(num_nodes: int, edges: Collection[Edge]) -> list[list[int]]:
    """Return the connected components of an undirected graph, sorted, each sorted."""
    graph = _networkx().Graph(edges)
    graph.add_nodes_from(range(num_nodes))
    return sorted(sorted(piece) for piece in _networkx().connected_components(graph))


def reached(start: int, edges: Iterable[Edge]) -> set[int]:
    """Return the nodes that directed edges reach from ``start``, itself included."""
    graph = _networkx().DiGraph(edges)
    graph.add_node(start)
    return {start} | cast("set[int]", _networkx().descendants(graph, start))


def _networkx() -> Any:  # noqa: ANN401 - a module without types
    return importlib.import_module("networkx")


def _edges(graph: Any) -> list[Edge]:  # noqa: ANN401 - networkx.Graph
    return [(int(i), int(j)) for i, j in graph.edges]
