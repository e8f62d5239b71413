"""Drawing shared by all pictures: figures, colours, axes and files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from starling.orchestrator.errors import ConfigError
from starling.orchestrator.given_path import given

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

# Distinguishable with any colour vision (Okabe and Ito).
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GREY, DARK = "#999999", "#555555"

_FORMATS = ("png", "svg", "pdf")
_LOG_SCALE_FROM = 30
"""The greatest value over the smallest, from which on a linear axis would show a flat line."""
_MARKERS_UP_TO = 60
"""Points; more would make a thick line."""


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:  # noqa: ANN401 - of ``Figure.subplots``
    """Return a figure of so many inches and its axes, row by row."""
    # A figure and canvas of its own: pyplot's global state belongs to the user.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()


def style(axes: Axes) -> None:
    """Give axes a grid behind the data, and no frame."""
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def count_along_x(axes: Axes, label: str, most: int | None = None) -> None:
    """Label the x axis with whole numbers, ``most`` of them at most."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, **({} if most is None else {"nbins": most})))


def is_wide(values: Sequence[float]) -> bool:
    """Tell whether values cover orders of magnitude, for which an axis is logarithmic."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > _LOG_SCALE_FROM


def marker(points: Sequence[object]) -> str | None:
    """Return the marker of a curve with these points; None for one of many."""
    return "o" if len(points) <= _MARKERS_UP_TO else None


def save(figure: Figure, path: Path) -> None:
    """Write a figure into a file, in the form that its name ends with."""
    is_png = path.suffix.lower() == ".png"
    figure.savefig(path, dpi=120, metadata={"Software": "Starling"} if is_png else None)


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure into the file that ``--plot`` names.

    Raises:
        ConfigError: it has another form than png, svg and pdf, or cannot be written.
    """
    given(path, "--plot")
    if path.suffix.removeprefix(".").lower() not in _FORMATS:
        raise ConfigError(f"--plot {path}: must end in {', '.join(f'.{one}' for one in _FORMATS)}")
    try:
        save(figure, path)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written: {error.strerror or error}") from None
