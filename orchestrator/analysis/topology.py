"""What ``starling topologies`` says of a topology: measured, printed, drawn."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from rich.markup import escape
from rich.table import Table

from starling.algorithms.registry import find, table
from starling.algorithms.topologies import CirculantTopology, Mixing, Ring, Topology
from starling.algorithms.topologies.alternating import Alternating
from starling.algorithms.topologies.complete import Complete
from starling.algorithms.topologies.mixing import distance_from_mean
from starling.algorithms.topologies.torus import Torus
from starling.orchestrator.config import yaml_io
from starling.orchestrator.config.messages import explain
from starling.orchestrator.config.reference import summary_of
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.given_path import given
from starling.orchestrator.units import bytes_text, number_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from rich.console import Console

_MAX_WIDTH = 120
_ROUNDS_OF_REDRAWN = 10
"""What a topology is measured over that never repeats."""
_FORMATS = ("png", "svg", "pdf")
_NODE, _EDGE = "#0072B2", "#555555"
_MAX_PANELS = 6
_LABELS_UP_TO = 64
"""Nodes; the labels of more would cover each other."""
_ARROWS_UP_TO = 600
"""Directed edges; the heads of more would cover the graph."""


@dataclass(frozen=True)
class Degrees:
    """How many neighbours nodes have."""

    min: int
    mean: float
    max: int

    @property
    def text(self) -> str:
        """One number if all are alike."""
        return (
            f"{self.min}" if self.min == self.max else f"{self.min} to {self.max}, {number_text(self.mean)} on average"
        )


@dataclass(frozen=True)
class TopologyReport:
    """A topology for some number of nodes. Single graphs and matrices are those of round 0."""

    topology: Topology
    num_nodes: int
    seed: int
    period: int | None
    """Rounds after which the matrices repeat; ``None``: never."""
    mixings: tuple[Mixing, ...]
    """Of the rounds that were measured, from round 0."""
    in_degree: Degrees
    out_degree: Degrees
    diameter: int | None
    """Hops; ``None`` if somebody is not reached."""
    payload_bytes: int
    """Of a node, to each neighbour."""
    product_rho: float
    """‖W_{R−1} … W_0 − J‖₂ over the measured rounds."""

    @property
    def bytes_per_round(self) -> int:
        """Over all nodes, the mean of the measured rounds."""
        return round(self.payload_bytes * sum(mixing.num_messages for mixing in self.mixings) / len(self.mixings))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
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
    """The topology that is called ``name``, with ``field=value`` set.

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


def _diameter(mixing: Mixing) -> int | None:
    """Hops after which everybody has heard of everybody."""
    # A set of nodes is one integer: 1000 nodes and a ring's 500 hops take a fraction of a second.
    everybody = (1 << len(mixing.weights)) - 1
    known = {node: 1 << place for place, node in enumerate(mixing.weights)}
    for hops in itertools.count():
        if all(heard == everybody for heard in known.values()):
            return hops
        news = dict(known)
        for node in known:
            for other in mixing.in_neighbors(node):
                news[node] |= known[other]
        if news == known:
            return None
        known = news
    raise AssertionError("counting does not end")


# --- printed --------------------------------------------------------------------------------------------------------


def print_topologies(console: Console) -> dict[str, Any]:
    """All topologies, a line each; returns them as plain data."""
    names = {name: summary_of(part) for name, part in table(Topology).items()}
    rows = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    rows.add_column("name", no_wrap=True)
    rows.add_column("")
    for name, summary in names.items():
        rows.add_row(f"[bold cyan]{escape(name)}[/]", escape(summary))
    console.print(rows, width=min(console.width, _MAX_WIDTH))
    console.print(
        "\n[dim]starling topologies NAME shows one in full, and with --nodes N what it comes to.[/]", highlight=False
    )
    return {"topologies": names}


def print_report(console: Console, report: TopologyReport, plot: Path | None) -> None:
    """A topology, measured; and drawn to ``plot`` if that is given.

    Raises:
        ConfigError: ``plot`` cannot be written.
    """
    if plot is not None:
        draw(report, plot)
    nodes = f"{report.num_nodes} node{'s' * (report.num_nodes != 1)}"
    title = f"[bold cyan]{escape(_written(report.topology))}[/] of {nodes}"
    console.print(f"{title}{', round 0' if report.period != 1 else ''}:\n", highlight=False, soft_wrap=True)
    for label, value in _lines(report).items():
        console.print(f"  [dim]{label:<14}[/] {escape(value)}", highlight=False, soft_wrap=True)
    if plot is None:
        default = f"topology-{report.topology.part_name or 'own'}-{report.num_nodes}.png"
        console.print(f"\n[dim]--plot {default} draws it.[/]", highlight=False, soft_wrap=True)


def _written(value: object) -> str:
    """A topology with its fields, or what such a field holds, as in a configuration."""
    if isinstance(value, Topology):
        fields = {field: getattr(value, field) for field in type(value).model_fields}
        texts = [f"{field}: {_written(one)}" for field, one in fields.items() if one is not None]
        return f"{value.name} ({', '.join(texts)})" if texts else value.name
    if isinstance(value, tuple):
        return f"[{', '.join(_written(one) for one in cast('tuple[object, ...]', value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


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
    """Without what rounding has left of a zero."""
    return 0.0 if abs(value) < 1e-12 else value


# --- drawn ----------------------------------------------------------------------------------------------------------


def draw(report: TopologyReport, path: Path) -> None:
    """Draw the graph into a file; of a time-varying one the first rounds.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    given(path, "--plot")
    form = path.suffix.removeprefix(".").lower()
    if form not in _FORMATS:
        raise ConfigError(f"--plot {path}: must end in {', '.join(f'.{one}' for one in _FORMATS)}")
    varying = report.period != 1
    shown = report.mixings[: _MAX_PANELS if varying else 1]
    columns = math.ceil(len(shown) / math.ceil(len(shown) / 3))
    lines = math.ceil(len(shown) / columns)
    side = 6.5 if len(shown) == 1 else 4.2
    # A figure and canvas of its own: pyplot's global state belongs to the user.
    figure = Figure(figsize=(side * columns, side * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = cast("list[Axes]", figure.subplots(lines, columns, squeeze=False).ravel().tolist())
    places = _layout(report, shown)
    for number, axes in enumerate(panels):
        axes.set_axis_off()
        if number < len(shown):
            in_grid = isinstance(report.topology, Torus)
            _draw_graph(axes, shown[number], places, directed=not report.topology.symmetric, in_grid=in_grid)
            if varying:
                axes.set_title(f"round {number}: ρ = {number_text(_clean(shown[number].rho))}", fontsize=10)
    rho = "" if varying else f", ρ = {number_text(_clean(shown[0].rho))}"
    nodes = f"{report.num_nodes} node{'s' * (report.num_nodes != 1)}"
    figure.suptitle(f"{report.topology.name}, {nodes}{rho}", fontsize=12)
    try:
        figure.savefig(path, dpi=120, metadata={"Software": "Starling"} if form == "png" else None)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written: {error.strerror or error}") from None


def _layout(report: TopologyReport, shown: Sequence[Mixing]) -> NDArray[np.float64]:
    """Where nodes stand, shape (N, 2): in their order, or, where that says little, by forces."""
    topology, num_nodes = report.topology, report.num_nodes
    if isinstance(topology, Complete | Ring | CirculantTopology | Alternating):
        angles = np.pi / 2 - 2 * np.pi * np.arange(num_nodes) / num_nodes
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if isinstance(topology, Torus):
        row, col = np.divmod(np.arange(num_nodes), topology.sides(num_nodes)[1])
        return np.stack([col, -row], axis=1).astype(float)
    import networkx as nx

    graph: Any = nx.Graph()
    graph.add_nodes_from(range(num_nodes))
    for mixing in shown:
        graph.add_edges_from((node, other) for node in mixing.weights for other in mixing.in_neighbors(node))
    found = nx.spring_layout(graph, seed=0, iterations=200 if num_nodes <= _LABELS_UP_TO else 30)
    return np.array([found[node] for node in range(num_nodes)], dtype=float).reshape(-1, 2)


def _bent(start: NDArray[np.float64], stop: NDArray[np.float64]) -> NDArray[np.float64]:
    """An arc beside the straight line, shape (points, 2): in a grid that leads through other nodes."""
    t = np.linspace(0.0, 1.0, 25)[:, None]
    along = stop - start
    aside = np.array([-along[1], along[0]]) / max(1e-9, float(np.hypot(*along)))
    return start + t * along + 1.4 * t * (1 - t) * aside


def _draw_graph(
    axes: Axes, mixing: Mixing, places: NDArray[np.float64], *, directed: bool, in_grid: bool = False
) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import FancyArrowPatch

    num_nodes = len(places)
    edges = [
        (sender, receiver, weight)
        for receiver, row in mixing.weights.items()
        for sender, weight in row.items()
        if sender != receiver and (directed or sender < receiver)
    ]
    heaviest = max((weight for *_, weight in edges), default=1.0)
    crowd = min(1.0, math.sqrt(60 / max(1, len(edges))))
    widths = [max(0.15, 2.4 * crowd * weight / heaviest) for *_, weight in edges]
    radius = 11 if num_nodes <= _LABELS_UP_TO / 2 else 8 if num_nodes <= _LABELS_UP_TO else 3
    if directed and len(edges) <= _ARROWS_UP_TO:
        for (sender, receiver, _), width in zip(edges, widths, strict=True):
            axes.add_patch(
                FancyArrowPatch(
                    tuple(places[sender]),
                    tuple(places[receiver]),
                    arrowstyle="-|>",
                    mutation_scale=6 + 3 * width,
                    shrinkA=radius,
                    shrinkB=radius,
                    linewidth=width,
                    color=_EDGE,
                )
            )
    else:
        lines = [
            _bent(start, stop) if in_grid and np.hypot(*(stop - start)) > 1.5 else np.stack([start, stop])
            for start, stop in ((places[sender], places[receiver]) for sender, receiver, _ in edges)
        ]
        axes.add_collection(LineCollection(lines, linewidths=widths, colors=_EDGE, zorder=1))
    axes.scatter(places[:, 0], places[:, 1], s=(2 * radius) ** 2, color=_NODE, zorder=2)
    if num_nodes <= _LABELS_UP_TO:
        for node, (x, y) in enumerate(places):
            axes.text(x, y, str(node), color="white", fontsize=0.8 * radius, ha="center", va="center", zorder=3)
    # A square around all of them: the limits of one or two nodes would be a line.
    low, high = places.min(axis=0), places.max(axis=0)
    reach = 0.62 * max(1.0, float((high - low).max()))
    axes.set_xlim((low[0] + high[0]) / 2 - reach, (low[0] + high[0]) / 2 + reach)
    axes.set_ylim((low[1] + high[1]) / 2 - reach, (low[1] + high[1]) / 2 + reach)
    axes.set_aspect("equal")
