"""Restores a run from a checkpoint: checks what must be as it was, and gives nodes and controller their state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from starling.actors.data.fingerprint import difference
from starling.algorithms.api import SERVER
from starling.orchestrator.checkpoints import saved_state
from starling.orchestrator.checkpoints.schedule import MAIL
from starling.orchestrator.checkpoints.store import CheckpointStore
from starling.orchestrator.config.schema import parse
from starling.orchestrator.config.sections import FaultsConfig
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records import changes, identity
from starling.orchestrator.records.run_config import configuration

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from starling.actors.replica.state_transfer import StateExport
    from starling.orchestrator.checkpoints.reader import Checkpoint
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.control.loop import Loop
    from starling.orchestrator.control.run_state import RunState
    from starling.orchestrator.runtimes.interface import Runtime

_DIVISION = ("data.partition", "data.sampler", "task")
"""Keys that decide which samples a node owns, and in which order it draws them."""


@dataclass
class Restoration:
    """A checkpoint, and the configuration with which its run goes on."""

    checkpoint: Checkpoint
    config: Config
    """Configuration as it is now; faults that have happened are left out."""
    before: Config
    """Configuration when the checkpoint was written."""
    accept_changes: bool = False
    """Whether the data may differ from the checkpoint's."""
    same_data: bool = field(init=False)
    """Whether the data keep the division into parts that the checkpoint records."""
    same_processes: bool = field(init=False)
    """Whether processes go on as they were, absent and leaving ones included; else all nodes are started anew."""
    num_parts: int | None = field(init=False)
    """Number of parts of the data; ``None``: one part per node of the resumed run."""

    def __post_init__(self) -> None:
        was, now = self.before.dump(), self.config.dump()
        for key in changes.FIXED:
            then, given = _at(was, key), _at(now, key)
            if then != given:
                message = f"--set {key}={given}: the checkpoint is of a run with {key}: {then}"
                raise ConfigError(f"{message}; begin another run for that")
        # A virtual clock is the run's own, so that what was to happen to processes, and when, is what will.
        self.same_processes = (
            "processes" in self.checkpoint.controller and self.before.num_nodes == self.config.num_nodes
        )
        samples = self.checkpoint.controller["progress"]["samples"]
        # Parts that others may draw are kept, however many nodes there are now: no sample is drawn twice, or left out.
        as_many = self.before.num_nodes == self.config.num_nodes or samples["ledger"] is not None
        self.same_data = as_many and all(_at(was, key) == _at(now, key) for key in _DIVISION)
        self.num_parts = samples["parts"] if self.same_data else None
        faults = self.config.faults.model_copy(update={"events": self._pending()})
        self.config = self.config.model_copy(update={"faults": faults})

    def _pending(self) -> tuple[Any, ...]:
        """The faults that are still to come: of those that the run was given then, and all that are new."""
        pending = FaultsConfig(events=self.checkpoint.controller["loop"]["faults"]).events
        new = [event for event in self.config.faults.events if event not in self.before.faults.events]
        return (*pending, *new)

    def prepare(self, runtime: Runtime) -> None:
        """Say with which nodes, and which parts of the data, ``runtime`` is to start."""
        runtime.num_parts = self.num_parts
        if self.same_processes and runtime.standing is not None:
            known = (one["node"] for one in self.checkpoint.controller["members"]["facts"])
            runtime.standing.initial = tuple(sorted(node for node in known if node != SERVER))

    def restore(self, state: RunState, loop: Loop) -> None:
        """Give all nodes that are up their state from the checkpoint, and let the run stand where it stood.

        Raises:
            ConfigError: the model has other tensors than the checkpoint's.
            RunError: the nodes do not take it.
        """
        runtime, saved = state.run.runtime, self.checkpoint.controller
        states = {node: one for node, one in self.checkpoint.nodes.items() if node != MAIL}
        states = {node: self._as_own(one) for node, one in states.items() if node < self.config.num_nodes}
        there, here = next(iter(states.values())).meta["tensors"][0]["shape"][0], runtime.layout.num_values
        if there != here:
            where = f"{self.checkpoint.where}: the model has {there} trained values there"
            raise ConfigError(f"{where}, and {here} as it is configured now")
        if not self.same_data:
            saved["progress"]["samples"]["parts"] = None
        self._refuse_other_data(runtime)
        state.restore(saved["progress"], same_processes=self.same_processes)
        if self.same_processes:
            envelopes = loop.restore(saved, None)
            members = saved["members"]
            kept = {int(node) for node in members["kept"]}
            new = set(members["new"]).difference(saved["loop"].get("entered", ()))
            assert runtime.standing is not None
            runtime.standing.bring_back(saved["processes"], states, kept, new, loop.in_flight)
        else:
            runtime.states.adopt(states)
            envelopes = loop.restore(saved, {node: one.meta["round"] for node, one in states.items()})
        if envelopes:
            runtime.messages.put_back(envelopes, self.checkpoint.nodes[MAIL])
        state.run.clock.restore(saved["progress"])
        state.saving.restored()
        self._record(state)

    def _refuse_other_data(self, runtime: Runtime) -> None:
        """Refuse data that are not what they were, where the same are asked for.

        Raises:
            ConfigError: they are others.
        """
        unlike = difference(self.checkpoint.controller["progress"].get("data", {}), runtime.fingerprint)
        if unlike is None or not self.same_data or self.before.num_nodes != self.config.num_nodes:
            return
        if not self.accept_changes:
            paths = [value for key, value in self.config.task if key in ("path", "text") and isinstance(value, str)]
            task = self.config.task.name + (f" ({paths[0]})" if paths else "")
            raise ConfigError(
                f"{self.checkpoint.where}: the data of task {task} are not those of then: {unlike}; "
                "put them back, begin another run, or give --accept-changes: places in their order then mean others"
            )

    def _as_own(self, export: StateExport) -> StateExport:
        """Return the samples that a node of the run takes for its own, as the run is configured now."""
        meta = export.meta | {"run": self.config.replica_spec().fingerprint}
        if not self.same_data:
            meta |= {"position": None, "extras": []}  # in an order of samples that are not its own any more
        return replace(export, meta=meta)

    def _record(self, state: RunState) -> None:
        run, roster, last = state.run, state.roster, state.committed
        run.record(
            "resume",
            round=last,
            nodes=sorted(roster.facts),
            checkpoint=self.checkpoint.where,
            same_processes=self.same_processes,
        )
        if self.same_processes:
            return
        for node in sorted(roster.facts.keys() - self.checkpoint.nodes.keys()):
            roster.num_joined += 1
            run.record("up", node=node, place=roster.facts[node].place)
        for node in sorted(set(state.members) - roster.facts.keys()):
            roster.num_lost += 1
            run.record("lost", round=last + 1, node=node, reason="the run goes on without it")


def restoration(
    path: Path,
    overrides: Sequence[str],
    *,
    from_previous: bool = False,
    trust: bool = False,
    accept_changes: bool = False,
) -> tuple[Restoration, CheckpointStore, bool]:
    """Read what the run in a directory goes on from, where its checkpoints are, and whether it runs in the simulator.

    Raises:
        ConfigError: there is no checkpoint, it cannot be used, or not with ``overrides``.
    """
    config = configuration(path, overrides, trust=trust)
    store = CheckpointStore(config.checkpoint.uri, path, identity.run_id(path), keep=config.checkpoint.keep)
    checkpoint = saved_state.check(store.read(from_previous=from_previous))
    identity.require_own_checkpoint(path, checkpoint.where, has_mark=checkpoint.is_ours, trust=trust)
    identity.require_trust(path, checkpoint.controller["config"], trust=trust, what="checkpoint")
    before = parse(checkpoint.controller["config"], source=checkpoint.where)
    if not accept_changes:
        changes.refuse(path, before, config, overrides)
    if checkpoint.number + 1 > config.rounds:
        done = checkpoint.number + 1
        raise ConfigError(
            f"rounds: {config.rounds}: the checkpoint, of round {checkpoint.number}, has {done} done already; set more"
        )
    is_virtual = checkpoint.controller["progress"]["transport_nbytes"] is None
    found = Restoration(checkpoint, config, before, accept_changes)
    if from_previous:
        # Before the records are taken back: whenever this ends, no other checkpoint is gone on from.
        store.forget_after(checkpoint.number)
    if not checkpoint.is_ours:
        store.adopt(checkpoint.number)  # the directory is this user's from now on, and should this be interrupted
    return found, store, is_virtual


def _at(data: Any, key: str) -> Any:  # noqa: ANN401 - plain data
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data
