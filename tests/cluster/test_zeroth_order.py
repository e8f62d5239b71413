"""One byte on Ray: a killed node's replacement catches up by the log, and nothing of it shows in the model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from starling import run, simulate
from starling.orchestrator.records.rebuild import rebuild
from starling.orchestrator.records.round_log import NAME, Sealed, read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from starling.orchestrator.config.schema import Config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

ALGORITHM: dict[str, Any] = {"name": "just_one_byte", "lr": 0.05, "samples": 3, "verify_every": 2}


@pytest.mark.parametrize(
    ("every", "perturb"),
    [
        pytest.param(0, "copy", marks=[pytest.mark.slow, pytest.mark.smoke]),
        pytest.param(2, "copy", marks=pytest.mark.slow),
        pytest.param(2, "on_use", marks=pytest.mark.slow),
    ],
)
def test_a_replacement_catches_up_by_the_log(every: int, perturb: str, config: Callable[..., Config], tmp_path: Path):
    # With all four needed the round is done again with all four: it is as if nobody had been lost.
    kill = [{"kind": "kill", "node": 2, "round": 3, "phase": "post"}]
    keys = ["rounds=6", "cluster.nodes.min=4", "cluster.nodes_per_actor=1", f"replay.snapshot_every={every}"]
    settings = config(ALGORITHM | {"perturb": perturb}, *keys, f"faults.events={json.dumps(kill)}")
    summary = run(settings, run_dir=tmp_path / "run")
    assert (summary.nodes["lost"], summary.nodes["joined"]) == (1, 1)
    assert summary.digest == simulate(config(ALGORITHM, *keys), run_dir=tmp_path / "simulated").digest
    lines = map(json.loads, (tmp_path / "run/events.jsonl").read_text().splitlines())
    (transfer,) = [event for event in lines if event["event"] == "transfer"]
    record = 18 + 4 * (4 + 3)
    if not every:
        assert transfer["nbytes"] == 3 * record + 32 == summary.bytes["recovery"]
    assert summary.bytes["payload"] >= 6 * 4 * 3 * 3
    assert rebuild(tmp_path / "run").digest == summary.digest
    sealed = [
        [entry for entry in read(tmp_path / name / NAME) if isinstance(entry, Sealed)] for name in ("run", "simulated")
    ]
    assert sealed[0] == sealed[1]
