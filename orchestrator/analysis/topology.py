"""Topologies measured, printed and drawn, for ``starling topologies``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import networkx as nx
from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from rich.markup import escape

from starling.algorithms.registry import find
from starling.algorithms.topologies import CirculantTopology, Mixing, Ring, Topology
from starling.algorithms.topologies.alternating import Alternating
from starling.algorithms.topologies.complete import Complete
from starling.algorithms.topologies.mixing import distance_from_mean
from starling.orchestrator.config import yaml_io
from starling.orchestrator.config.messages import explain
from starling.orchestrator.config.reference import written
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.units import bytes_text, number_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from rich.console import Console

_ROUNDS_OF_REDRAWN = 10
"""Rounds over which a topology is measured that never repeats."""
_MAX_PANELS = 6
_LABELS_UP_TO = 64
"""Nodes; the labels of more would cover each other."""
_ARROWS_UP_TO = 600
"""Directed edges; the heads of more would cover the graph."""


@dataclass(frozen=True)
class Degrees:
    """Least, mean and greatest number of neighbours."""

    min: int
    mean: float
    max: int

    @property
    def text(self) -> str:
        """Range and mean as text, or one number if all are equal."""
        return (
            f"{self.min}" if self.min == self.max else f"{self.min} to {self.max}, {number_text(self.mean)} on average"
        )


@dataclass(frozen=True)
class TopologyReport:
    """A topology measured for some number of nodes. Single graphs and matrices are those of round 0."""

    topology: Topology
    num_nodes: int
    seed: int
    period: int | None
    """Rounds after which the matrices repeat; ``None``: never."""
    mixings: tuple[Mixing, ...]
    """Mixing weights of the measured rounds, from round 0."""
    in_degree: Degrees
    out_degree: Degrees
    diameter: int | None
    """Hops; ``None`` if somebody is not reached."""
    payload_bytes: int
    """Bytes from a node to each neighbour."""
    product_rho: float
    """‖W_{R−1} … W_0 − J‖₂ over the measured rounds."""

    @property
    def bytes_per_round(self) -> int:
        """Over all nodes, the mean of the measured rounds."""
        return round(self.payload_bytes * sum(mixing.num_messages for mixing in self.mixings) / len(self.mixings))

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        first = self.mixings[0]
        return {
            "topology": self.topology.model_dump(mode="json"),
            "nodes": self.num_nodes,
            "seed": self.seed,
            "period": self.period,
            "in_degree": vars(self.in_degree),
            "out_degree": vars(self.out_degree),
            "directed_edges": first.num_messages,
            "rho": first.rho,
            "spectral_gap": first.spectral_gap,
            "doubly_stochastic": first.is_doubly_stochastic,
            "symmetric": first.is_symmetric,
            "diameter": self.diameter,
            "bytes": {"per_message": self.payload_bytes, "per_round": self.bytes_per_round},
            "product": {"rounds": len(self.mixings), "rho": self.product_rho},
        }


# --- from arguments -------------------------------------------------------------------------------------------------


def refuse_without_nodes(name: str | None, options: Mapping[str, object]) -> None:
    """Refuse what has a meaning only with NAME and --nodes.

    Raises:
        ConfigError: names the option.
    """
    given = [option for option, value in options.items() if value]
    if given:
        missing = "--nodes N" if name else "a NAME and --nodes N, as in starling topologies ring --nodes 8"
        raise ConfigError(f"{given[0]} needs {missing}")


def make(name: str, overrides: Sequence[str]) -> Topology:
    """Return the topology ``name`` with ``field=value`` overrides applied.

    Raises:
        ConfigError: one line for each thing that is wrong.
    """
    try:
        find(Topology, name)
    except PydanticCustomError as error:
        raise ConfigError(error.message()) from None
    data: dict[str, Any] = {"name": name}
    given: dict[str, str] = {}
    for text in overrides:
        place, value = yaml_io.split(text)
        given[place[0]] = f"--set {text}: "
        data = yaml_io.assigned(data, place, value, Topology)
    try:
        return Topology.model_validate(data)
    except ValidationError as error:
        found = explain(cast("Iterable[Any]", error.errors()), Topology)
        lines = [f"{given.get(place[0] if place else '', f'topology {name}: ')}{line}" for place, line in found]
        raise ConfigError("\n".join(lines)) from None


def measure(
    topology: Topology, num_nodes: int, payload_bytes: int, *, seed: int = 0, rounds: int | None = None
) -> TopologyReport:
    """Measure a topology over ``rounds`` (default: its period).

    Raises:
        SettingsError: it does not exist for so many nodes.
    """
    topology.validate_for(num_nodes)
    period = topology.period(num_nodes)
    members = tuple(range(num_nodes))
    mixings = tuple(topology.mixing(members, number, seed) for number in range(rounds or period or _ROUNDS_OF_REDRAWN))
    first = mixings[0]
    return TopologyReport(
        topology=topology,
        num_nodes=num_nodes,
        seed=seed,
        period=period,
        mixings=mixings,
        in_degree=_degrees(len(first.in_neighbors(node)) for node in members),
        out_degree=_degrees(len(first.out_neighbors(node)) for node in members),
        diameter=_diameter(first),
        payload_bytes=payload_bytes,
        product_rho=first.rho if len(mixings) == 1 else distance_from_mean(_product(mixings)),
    )


def _degrees(degrees: Iterable[int]) -> Degrees:
    found = list(degrees)
    return Degrees(min(found), sum(found) / len(found), max(found))


def _product(mixings: Sequence[Mixing]) -> NDArray[np.float64]:
    product = mixings[0].matrix()
    for mixing in mixings[1:]:
        product = mixing.matrix() @ product
    return product


def _graph(mixings: Iterable[Mixing]) -> nx.DiGraph[int]:
    """Return the directed graph of who sends to whom in any of these rounds."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    for mixing in mixings:
        graph.add_nodes_from(mixing.weights)
        graph.add_edges_from((other, node) for node in mixing.weights for other in mixing.in_neighbors(node))
    return graph


def _diameter(mixing: Mixing) -> int | None:
    """Return the hops after which everybody has heard of everybody; None: never."""
    # A set of nodes is one integer: 1000 nodes and a ring's 500 hops take a fraction of a second, and networkx three,
    # or a dozen for the edges of a complete graph.
    everybody = (1 << len(mixing.weights)) - 1
    known = {node: 1 << place for place, node in enumerate(mixing.weights)}
    hops = 0
    while any(heard != everybody for heard in known.values()):
        news = dict(known)
        for node in known:
            for other in mixing.in_neighbors(node):
                news[node] |= known[other]
        if news == known:
            return None
        known, hops = news, hops + 1
    return hops


# --- printed --------------------------------------------------------------------------------------------------------


def print_report(console: Console, report: TopologyReport, plot: Path | None) -> None:
    """Print a measured topology, and draw it into ``plot`` if that is given.

    Raises:
        ConfigError: ``plot`` cannot be written.
    """
    if plot is not None:
        draw(report, plot)
    nodes = f"{report.num_nodes} node{'s' * (report.num_nodes != 1)}"
    title = f"[bold cyan]{escape(written(report.topology))}[/] of {nodes}"
    console.print(f"{title}{', round 0' if report.period != 1 else ''}:\n", highlight=False, soft_wrap=True)
    for label, value in _lines(report).items():
        console.print(f"  [dim]{label:<14}[/] {escape(value)}", highlight=False, soft_wrap=True)
    if plot is None:
        default = f"topology-{report.topology.part_name or 'own'}-{report.num_nodes}.png"
        console.print(f"\n[dim]--plot {default} draws it.[/]", highlight=False, soft_wrap=True)


def _lines(report: TopologyReport) -> dict[str, str]:
    first = report.mixings[0]
    if report.in_degree == report.out_degree:
        degrees = report.in_degree.text
    else:
        degrees = f"in {report.in_degree.text}; out {report.out_degree.text}"
    rounds = len(report.mixings)
    mean = f" (mean of {rounds} rounds)" if rounds > 1 and report.period != 1 else ""
    columns = "doubly stochastic" if first.is_doubly_stochastic else "row-stochastic: the mean is not preserved"
    lines = {
        "degree": degrees,
        "directed edges": f"{first.num_messages:,}",
        "weights": f"{columns}, {'symmetric' if first.is_symmetric else 'not symmetric'}",
        "rho": number_text(_clean(first.rho)),
        "spectral gap": number_text(_clean(first.spectral_gap)),
        "diameter": "not connected" if report.diameter is None else str(report.diameter),
        "bytes": f"{bytes_text(report.bytes_per_round)} per round over all nodes{mean}, "
        f"{bytes_text(report.payload_bytes)} per message",
    }
    if report.period != 1:
        lines["graphs"] = "never repeat" if report.period is None else f"repeat every {report.period} rounds"
    if rounds > 1:
        lines["product"] = f"rho {number_text(_clean(report.product_rho))} over {rounds} rounds"
    return lines


def _clean(value: float) -> float:
    """Round a value next to zero to zero."""
    return 0.0 if abs(value) < 1e-12 else value


# --- drawn ----------------------------------------------------------------------------------------------------------


def draw(report: TopologyReport, path: Path) -> None:
    """Draw the graph into a file; of a time-varying one the first rounds.

    Raises:
        ConfigError: the file cannot be written.
    """
    from starling.orchestrator import plots

    varying = report.period != 1
    shown = report.mixings[: _MAX_PANELS if varying else 1]
    lines = math.ceil(len(shown) / 3)
    columns = math.ceil(len(shown) / lines)
    side = 6.5 if len(shown) == 1 else 4.2
    figure, panels = plots.canvas(side * columns, side * lines + 0.5, lines, columns)
    whole = _graph(shown).to_undirected()
    if isinstance(report.topology, Complete | Ring | CirculantTopology | Alternating):
        places = nx.circular_layout(whole)  # in their order, which is what these are about
    else:
        places = nx.spring_layout(whole, seed=0, iterations=200 if report.num_nodes <= _LABELS_UP_TO else 30)
    for axes in panels:
        axes.set_axis_off()
        axes.set_aspect("equal")
    for number, (axes, mixing) in enumerate(zip(panels, shown, strict=False)):
        _draw_graph(axes, mixing, places, directed=not report.topology.symmetric)
        if varying:
            axes.set_title(f"round {number}: ρ = {number_text(_clean(mixing.rho))}", fontsize=10)
    rho = "" if varying else f", ρ = {number_text(_clean(shown[0].rho))}"
    nodes = f"{report.num_nodes} node{'s' * (report.num_nodes != 1)}"
    figure.suptitle(f"{report.topology.name}, {nodes}{rho}", fontsize=12)
    plots.save_plot(figure, path)


def _draw_graph(axes: Axes, mixing: Mixing, places: Mapping[int, Any], *, directed: bool) -> None:
    """Draw one round: an edge is as thick as its weight."""
    from starling.orchestrator import plots

    graph: Any = _graph([mixing])
    graph = graph if directed else graph.to_undirected()
    weights = [mixing.weights[receiver][sender] for sender, receiver in graph.edges]
    heaviest, crowd = max(weights, default=1.0), min(1.0, math.sqrt(60 / max(1, len(weights))))
    widths = [max(0.15, 2.4 * crowd * weight / heaviest) for weight in weights]
    side = 22 if len(graph) <= _LABELS_UP_TO / 2 else 16 if len(graph) <= _LABELS_UP_TO else 6
    arrows = directed and len(weights) <= _ARROWS_UP_TO
    nx.draw_networkx_edges(
        graph, places, ax=axes, arrows=arrows, width=widths, edge_color=plots.DARK, node_size=side**2
    )
    nx.draw_networkx_nodes(graph, places, ax=axes, node_size=side**2, node_color=plots.BLUE)
    if len(graph) <= _LABELS_UP_TO:
        nx.draw_networkx_labels(graph, places, ax=axes, font_color="white", font_size=0.4 * side)
    # Layouts lie in the square from -1 to 1; the limits of one or two nodes alone would be a line.
    axes.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15))
