"""Tables of algorithms and parts in README.md and docs/, written from the code: ``python -m tests.tables``.

A table stands between two comments, ``<!-- NAME: make docs-tables -->`` and ``<!-- /NAME -->``.
"""

from __future__ import annotations

import importlib
import re
import sys
from typing import TYPE_CHECKING

from starling.algorithms.aggregators import Aggregator
from starling.algorithms.api import Algorithm
from starling.algorithms.closing import ClosePolicy
from starling.algorithms.codecs import Codec
from starling.algorithms.compressors import Compressor
from starling.algorithms.outer import OuterOptimizer
from starling.algorithms.registry import table
from starling.algorithms.topologies import Topology
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starling.algorithms.registry import Part

PAGES = {"README.md": ("families", "parts"), "docs/algorithms.md": ("algorithms",)}
PARTS: tuple[type[Part], ...] = (Aggregator, ClosePolicy, Codec, Compressor, OuterOptimizer, Topology)


def family_of(algorithm: type[Algorithm]) -> str:
    """Return the name of the package that an algorithm lies in."""
    return algorithm.__module__.split(".")[-2]


def doc(module: str) -> str:
    """Return the docstring of a module."""
    return importlib.import_module(module).__doc__ or ""


def _rows(header: str, rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, "|" + "---|" * header.count(" | ") + "---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def families() -> str:
    """Write each family of algorithms with its members."""
    found: dict[str, list[str]] = {}
    for name, algorithm in table(Algorithm).items():
        found.setdefault(family_of(algorithm), []).append(name)
    summaries = {one: doc(f"starling.algorithms.{one}").split("\n")[0].rstrip(".") for one in found}
    rows = ((summaries[one], _names(names)) for one, names in sorted(found.items()))
    return _rows("| family | algorithms |", rows)


def parts() -> str:
    """Write each family of parts with its members."""
    plural = {"close policy": "close policies", "topology": "topologies"}
    rows = ((plural.get(one.family, f"{one.family}s"), _names(table(one))) for one in PARTS)
    return _rows("| part | names |", rows)


def algorithms() -> str:
    """Write each algorithm with the first line of its page and its paper."""
    rows: list[tuple[str, ...]] = []
    for name, algorithm in table(Algorithm).items():
        page = doc(algorithm.__module__)
        paper = re.search(r"arXiv:(\d+\.\d+)", page.partition("Reference:")[2])
        link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else ""
        rows.append((f"`{name}`", page.split("\n")[0].rstrip("."), link))
    return _rows("| name | summary | arXiv |", rows)


def written(text: str, name: str) -> str:
    """Return a page with its table ``name`` as the code says it."""
    begin, end = f"<!-- {name}: make docs-tables -->\n", f"<!-- /{name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    assert found, f"{begin.strip()} is missing"
    assert closed, f"{end} is missing"
    return f"{before}{begin}\n{globals()[name]()}\n\n{end}{after}"


def stale() -> dict[str, str]:
    """Return the pages whose tables are not those of the code, by path, as they must be."""
    found: dict[str, str] = {}
    for page, names in PAGES.items():
        text = new = (ROOT / page).read_text(encoding="utf-8")
        for name in names:
            new = written(new, name)
        if new != text:
            found[page] = new
    return found


if __name__ == "__main__":
    for changed, content in stale().items():
        (ROOT / changed).write_text(content, encoding="utf-8")
        sys.stdout.write(f"{changed} is new\n")
