"""Edge lists: read the file of a topology."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from starling.algorithms.topologies.given import Graph, check_connected, check_own_weights


def read_graph(path: Path, *, directed: bool) -> Graph:
    """Read a file; ``algorithms.topologies.file`` documents the format.

    Raises:
        ValueError: it cannot be read, is written otherwise, or its graph is not connected or its weights leave nothing
            for a node itself.
    """
    edges = _edges(path, directed=directed)
    nodes = {node for edge in edges for node in edge}
    gap = next(node for node in itertools.count() if node not in nodes)
    if gap != len(nodes):
        raise ValueError(f"{path}: names {len(nodes)} nodes, but not node {gap}; number them 0 to {len(nodes) - 1}")
    weighted = {weight is not None for weight in edges.values()}
    if len(weighted) > 1:
        raise ValueError(f"{path}: some edges have a weight, and some have none; give it to all, or to none")
    own = {i: weight for (i, j), weight in edges.items() if i == j}
    arcs: dict[int, dict[int, float]] = {node: {} for node in range(len(nodes))}
    for (sender, receiver), weight in edges.items():
        if sender != receiver:
            arcs[receiver][sender] = weight or 1.0
            if not directed:
                arcs[sender][receiver] = weight or 1.0
    check_connected(path, arcs)
    if weighted == {False}:
        if own:
            raise ValueError(f"{path}: an edge of node {min(own)} to itself says nothing without weights; leave it out")
        if directed:
            arcs = {node: dict.fromkeys(row, 1 / (1 + len(row))) for node, row in arcs.items()}
        return Graph(arcs, weighed_by_rule=not directed)
    check_own_weights(path, arcs, cast("dict[int, float]", own))
    return Graph(arcs, weighed_by_rule=False)


def _edges(path: Path, *, directed: bool) -> dict[tuple[int, int], float | None]:
    edges: dict[tuple[int, int], float | None] = {}
    for where, cells in _entries(path):
        i, j, weight = _edge(where, cells)
        pair = (i, j) if directed or i < j else (j, i)
        if pair in edges:
            both = "" if directed else "; each edge of an undirected graph stands there once (or set directed: true)"
            raise ValueError(f"{where}: the edge {i} {j} is there already{both}")
        edges[pair] = weight
    if not edges:
        raise ValueError(f"{path}: has no edges; write a line `i j` for each")
    return edges


def _entries(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The place and the words of each edge."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not text in UTF-8"
        raise ValueError(f"{path}: cannot be read: {reason}") from None
    if path.suffix == ".json":
        yield from _entries_of_json(path, text)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if content := line.partition("#")[0].strip():
            yield f"{path}, line {number}", re.split(r"\s*,\s*|\s+", content)


def _entries_of_json(path: Path, text: str) -> Iterator[tuple[str, list[str]]]:
    try:
        loaded: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: is not JSON: {error.msg}") from None
    items = cast("list[object]", loaded) if isinstance(loaded, list) else [loaded]
    for number, item in enumerate(items, start=1):
        cells = cast("list[object]", item) if isinstance(item, list) else [item]
        yield f"{path}, edge {number}", [str(cell) for cell in cells]


def _edge(where: str, words: list[str]) -> tuple[int, int, float | None]:
    try:
        i, j = int(words[0]), int(words[1])
        weight = float(words[2]) if len(words) > 2 else None
        right = len(words) <= 3 and i >= 0 and j >= 0
    except (ValueError, IndexError):
        right, i, j, weight = False, 0, 0, None
    if not right:
        raise ValueError(f"{where}: {' '.join(words)!r} is no edge; write two node numbers, and perhaps a weight")
    if weight is not None and not 0 < weight <= 1:
        raise ValueError(f"{where}: a weight must be above 0 and at most 1, got {words[2]}")
    return i, j, weight
