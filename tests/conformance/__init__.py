"""What every algorithm must keep, ours and third parties': ``CHECKS`` are functions of a ``Case``.

A plugin's test suite needs a row of its own and one line::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_mine(check): check(Case({"algorithm": "my_module:Mine", ...}, reaches=0.1))
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from starling.algorithms.api import Algorithm
from starling.algorithms.registry import find, table
from starling.orchestrator import api
from starling.orchestrator.config.reference import SECTIONS, describe
from starling.orchestrator.config.schema import parse
from starling.orchestrator.records.observers import Observer, RoundRecord
from tests.toys import simulate

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.toys import Ran

MAX_LINES = 150


@dataclass(frozen=True)
class Case:
    """An algorithm on its reference problem."""

    config: dict[str, Any]
    reaches: float
    """Loss on held-out data after the configured rounds, at most."""
    bytes_within: float = 0.0
    """Asynchronous algorithms only: how far a whole run's may be from ``expected_bytes`` of its rounds, relatively."""

    @property
    def name(self) -> str:
        """Under which the algorithm is found."""
        algorithm = self.config["algorithm"]
        return algorithm if isinstance(algorithm, str) else algorithm["name"]

    @property
    def algorithm(self) -> Algorithm:
        """With the case's hyper-parameters."""
        return parse(self.config).algorithm

    def run(self, **keys: Any) -> Ran:
        """The case in the simulator, with some keys replaced."""
        config = {"tracking": "none", "evaluation": {"every_rounds": 0}} | self.config | keys
        return simulate(config, nodes=config.get("cluster", {}).get("nodes", {}).get("target", 4))


def converges(case: Case) -> None:
    """It reaches the loss that it should on its reference problem."""
    ran = case.run()
    assert ran.summary is not None
    loss = ran.summary.metrics["loss"]
    assert math.isfinite(loss)
    assert loss <= case.reaches
    before = case.run(rounds=1, optimizer={"lr": 1e-9}).summary
    assert before is not None
    assert loss < before.metrics["loss"], "that is no better than the initial model"


def is_deterministic(case: Case) -> None:
    """The same seed gives the same bits, on time to the last bit too; another seed gives others."""
    short = {"rounds": 2, "network": {"bandwidth_mbps": 50, "latency_ms": 2, "speeds": {0: 0.7}}}
    one, same, other = case.run(**short), case.run(**short), case.run(**short, seed=12345)
    assert one.digest == same.digest != other.digest
    assert one.events == same.events


def is_replicated(case: Case) -> None:
    """All members end with one model, and nothing of the global generators was used up."""
    before = torch.get_rng_state()
    ran = case.run(rounds=2)
    assert torch.equal(torch.get_rng_state(), before)
    if case.algorithm.replicated:
        assert len({one.model_digest() for one in ran.replicas.values()}) == 1
        assert len({one.shared.digest() for one in ran.replicas.values()}) == 1


def sends_what_it_says(case: Case) -> None:
    """The ledger equals ``expected_bytes``, above and below the inline limit, for any number of nodes.

    Rounds of asynchronous algorithms overlap: a message may be sent in one and arrive in the next. There it is the sum.
    """
    synchronous = case.algorithm.synchronous
    # Bytes depend on either alone, up to how many parts a large message is cut into: one for each node.
    for width, nodes in (16, 1), (300, 2), (16, 3), (300, 5):
        task = {"name": "digits", "model": {"name": "mlp", "width": width}}
        rounds = 2 if synchronous else case.config["rounds"]
        ran = case.run(task=task, rounds=rounds, cluster={"nodes": {"target": nodes}})
        sent = [record.payload_bytes for record in ran.rounds]
        if synchronous:
            planned = [ran.planned_bytes(number) for number in range(rounds)]
            assert sent == planned
        else:
            assert math.isclose(sum(sent), rounds * ran.expected_bytes, rel_tol=case.bytes_within)


class StoppedError(RuntimeError):
    """A run was ended from outside, and has saved nothing on the way."""


class Stopper(Observer):
    """Ends a run after a round."""

    def __init__(self, last: int) -> None:
        self._last = last

    def on_round(self, record: RoundRecord) -> None:
        """Raise, if it is that round."""
        if record.round == self._last:
            raise StoppedError


def resumes(case: Case) -> None:
    """Ended in mid-run and resumed from its checkpoint, it ends with the bits, bytes and clock of the whole run."""
    network = {"bandwidth_mbps": 50, "latency_ms": 2, "speeds": {0: 0.7}}
    config = {"tracking": "none", "evaluation": {"every_rounds": 0}} | case.config
    config |= {"rounds": 7, "network": network, "checkpoint": {"every_rounds": 3}}
    with TemporaryDirectory() as folder:
        whole = api.simulate(config, run_dir=Path(folder, "whole"))
        with contextlib.suppress(StoppedError):
            api.simulate(config, run_dir=Path(folder, "stopped"), observers=[Stopper(4)])
        resumed = api.resume(Path(folder, "stopped"))
        files = [Path(folder, name, "metrics.jsonl").read_text(encoding="utf-8") for name in ("whole", "stopped")]
    assert resumed.digest == whole.digest
    assert resumed.bytes["payload"] == whole.bytes["payload"]
    assert resumed.virtual_seconds == whole.virtual_seconds
    one, other = ([_timeless(line) for line in text.splitlines()] for text in files)
    assert one == other


def _timeless(line: str) -> dict[str, Any]:
    """A line of metrics without what this machine's clock says, and what a process that is gone had drawn in vain."""
    values = json.loads(line)
    values["samples"] = values["samples"]["committed"]
    return {key: value for key, value in values.items() if key != "evaluate_seconds"}


def plans_its_steps(case: Case) -> None:
    """No node takes more steps in its rounds than ``steps_per_round`` says, on which learning-rate schedules rest."""
    # A round of an asynchronous one may be over before any of its nodes' is.
    ran = case.run(rounds=2 if case.algorithm.synchronous else case.config["rounds"])
    batch = ran.config.data.batch_size * ran.config.optimizer.accumulate
    taken = {one.id: one.schedule.step for one in ran.replicas.values()}
    planned = {
        one.id: (one.committed_round + 1) * case.algorithm.steps_per_round(one.num_samples, batch)
        for one in ran.replicas.values()
    }
    # An algorithm that plans none has a step size of its own, and leaves the nodes' optimizers alone.
    assert any(taken.values()) == any(planned.values())
    assert all(taken[node] <= planned[node] for node in taken)


def is_registered(case: Case) -> None:
    """It is found under its name, and its name is all that the configuration needs."""
    kind = find(Algorithm, case.name)
    assert kind is type(case.algorithm)
    assert case.algorithm.name == case.name
    assert ":" in case.name or table(Algorithm)[case.name] is kind
    assert Algorithm.model_validate(case.algorithm.model_dump()) == case.algorithm


def is_documented(case: Case) -> None:
    """One line; the update in symbols; deviations, elasticity, cost and reference. And every field."""
    module = sys.modules[type(case.algorithm).__module__]
    text = inspect.getdoc(module) or ""
    first, _, rest = text.partition("\n")
    assert re.fullmatch(r"[A-Z].*[.]", first)
    assert rest.startswith("\n"), "the first line is not followed by an empty one"
    assert re.search(r"^    .*(←|=)", rest, re.MULTILINE), "the update is not written in symbols"
    assert [place for place in map(rest.find, (f"\n{section}: " for section in SECTIONS)) if place < 0] == []
    description = describe(type(case.algorithm))
    assert [field.name for field in description.fields if not field.description] == []


def is_short(case: Case) -> None:
    """A reader who knows the paper sees all of it on two screens."""
    path = Path(inspect.getfile(type(case.algorithm)))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


CHECKS: tuple[Callable[[Case], None], ...] = (
    converges,
    is_deterministic,
    is_replicated,
    sends_what_it_says,
    resumes,
    plans_its_steps,
    is_registered,
    is_documented,
    is_short,
)
