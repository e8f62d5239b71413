"""From a run's directory to what it goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starling.orchestrator.checkpoints import saved_state
from starling.orchestrator.checkpoints.store import CheckpointStore
from starling.orchestrator.config.schema import parse
from starling.orchestrator.control.restore import Revival
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records import changes, identity
from starling.orchestrator.records.run_config import configuration

if TYPE_CHECKING:
    from collections.abc import Sequence


def revival(
    path: Path,
    overrides: Sequence[str],
    *,
    from_previous: bool = False,
    trust: bool = False,
    accept_changes: bool = False,
) -> tuple[Revival, CheckpointStore, bool]:
    """What a run goes on from, where its checkpoints are, and whether it runs in the simulator.

    Raises:
        ConfigError: there is none, it cannot be used, or not with ``overrides``.
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
    revival = Revival(checkpoint, config, before, accept_changes)
    if from_previous:
        # Before the records are taken back: whenever this ends, no other checkpoint is gone on from.
        store.forget_after(checkpoint.number)
    if not checkpoint.is_ours:
        store.adopt(checkpoint.number)  # the directory is this user's from now on, and should this be interrupted
    return revival, store, is_virtual
