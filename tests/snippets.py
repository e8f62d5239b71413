"""The Python of README and docs, block by block, as a reader would copy it."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.paths import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Block:
    """A block of Python on a page."""

    page: str
    text: str

    @property
    def module(self) -> str | None:
        """The module's name, if the block begins with its file's."""
        found = re.match(r"# (\w+)\.py\b", self.text)
        return found[1] if found else None


@dataclass(frozen=True)
class Own:
    """A class of a page, and the configuration that names it."""

    key: str
    """A line of the block."""
    module: str
    config: dict[str, Any]
    before: str = ""
    after: str = ""
    inside: bool = False
    """The block is the body of the class that ``before`` opens."""
    body: bool = False
    """The block is the middle of a ``round``."""

    def source(self) -> str:
        """The text of a module with the block in it."""
        text = block(self.key).text
        if self.body:
            text = textwrap.indent(text, "    ")
        if self.inside:
            text = textwrap.indent(text, "    ")
        return f"{self.before}{text}{self.after}"

    def write(self, folder: Path) -> None:
        """Put the module, and what a reader of the page has beside it, into ``folder``."""
        (folder / f"{self.module}.py").write_text(self.source(), encoding="utf-8")


def blocks() -> list[Block]:
    """All blocks of Python on README and docs."""
    found: list[Block] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += [
            Block(page.name, code) for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        ]
    return found


def block(key: str) -> Block:
    """The block in which the line ``key`` stands."""
    found = [one for one in blocks() if key in one.text.splitlines()]
    assert len(found) == 1, (key, len(found))
    return found[0]


BASE = {
    "rounds": 4,
    "task": "digits",
    "algorithm": {"name": "fedavg", "steps": 3},
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "evaluation": {"every_rounds": 0},
    "tracking": "none",
    "checkpoint": {"every_rounds": 1},
    "cluster": {"nodes": {"target": 3}},
}
"""What a test's configuration is where a class of a page is not."""

_PRELUDE = """\
from pydantic import PositiveInt
from torch import Tensor

from starling import SERVER, Algorithm, AllReduce, Layout, Message, NeighborAllGather, Node, NodeState, Receive, Send
from starling import Start
from starling.algorithms.api import Train, Wait, all_reduce_bytes
from starling.algorithms.outer import Nesterov, OuterOptimizer, OuterState
from starling.algorithms.rules.control_variate import ControlVariate
from starling.algorithms.topologies import Ring, Topology


"""
_CLASS = f"{_PRELUDE}class Mine(Algorithm):\n    steps: PositiveInt = 3\n    topology: Topology = Ring()\n\n"

OWN = {
    one.key: one
    for one in (
        Own(
            "class DiLoCo(Algorithm):",
            "my_diloco",
            {"algorithm": {"name": "my_diloco:DiLoCo", "inner_steps": 3}},
            _PRELUDE,
        ),
        Own(
            "class LocalSGD(Algorithm):", "my_algorithms", {"algorithm": {"name": "my_algorithms:LocalSGD", "steps": 3}}
        ),
        Own(
            "def expected_bytes(self, layout: Layout, num_nodes: int) -> int:",
            "my_planned",
            {"algorithm": "my_planned:Mine", "optimizer": {"lr": 0.1, "schedule": "cosine"}},
            f"{_CLASS}    async def round(self, node):\n        await Train(steps=self.steps)\n\n",
            inside=True,
        ),
        Own(
            "    inbox = await NeighborAllGather(node.parameters, self.topology)",
            "my_gossip",
            {"algorithm": "my_gossip:Mine"},
            _CLASS.replace("    steps", "    replicated = False\n    steps"),
            inside=True,
        ),
        Own(
            "handle = await Start(AllReduce(anchor - node.parameters))",
            "my_overlap",
            {"algorithm": "my_overlap:Mine"},
            f"{_CLASS}    overlap_steps: PositiveInt = 2\n\n    async def round(self, node):\n"
            "        anchor = node.parameters.clone()\n        await Train(steps=self.steps)\n",
            "        node.parameters.copy_(anchor - outer_gradient.value)\n",
            inside=True,
            body=True,
        ),
        Own(
            "rule = ControlVariate(shared - own)",
            "my_rules",
            {"algorithm": "my_rules:Mine"},
            f"{_CLASS}    async def round(self, node):\n        model = node.parameters.clone()\n"
            "        shared, own = model * 0, model * 0\n",
            "        node.parameters.copy_(model)\n",
            inside=True,
            body=True,
        ),
        Own(
            "async def round(self, node: Node) -> None:  # a worker",
            "my_servers",
            {"algorithm": "my_servers:Mine"},
            _CLASS.replace("    steps", "    replicated = False\n    synchronous = False\n    steps"),
            inside=True,
        ),
        Own("class Line(Task):", "my_task", {"task": "my_task:Line"}),
        Own(
            "class Overconfident(Metric):",
            "my_metrics",
            {"task": {"name": "digits", "extra_metrics": ["my_metrics:Overconfident"]}},
        ),
        Own(
            "class Iris(Task):",
            "iris",
            {"task": {"name": "iris:Iris", "hidden": 32}, "data": {"partition": "dirichlet"}},
        ),
        Own(
            "class Star(UndirectedTopology):",
            "my_topologies",
            {"algorithm": {"name": "dsgd", "topology": "my_topologies:Star"}},
        ),
    )
}
"""Classes of the pages, by a line of theirs. Each is trained under its import path."""
