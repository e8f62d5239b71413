"""What observers are told of a made-up run: two nodes, FedAvg on digits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from starling.algorithms.layout import Layout, LayoutEntry
from starling.orchestrator.config.schema import Config, parse
from starling.orchestrator.records.observers import Observer, RoundRecord, Started, Summary
from starling.orchestrator.runtimes.events import FinalModel, NodeFacts

MODEL = FinalModel(digest="d" * 64, safetensors=b"weights")


def configuration(**keys: Any) -> Config:
    raw = {"name": "test", "algorithm": "fedavg", "task": "digits", "rounds": 4, "tracking": "none"}
    return parse(raw | {"cluster": {"nodes": {"target": 2}}} | keys)


def started(config: Config | None = None, run_dir: str = "/runs/test-1", **changes: Any) -> Started:
    beginning = Started(
        config=config or configuration(),
        run_id=run_dir.rpartition("/")[2],
        run_dir=run_dir,
        nodes=[NodeFacts(node, f"pid {node}", "cpu", 700) for node in range(2)],
        layout=Layout((LayoutEntry("weight", 0, 1000, (10, 100), ""),), torch.float32),
        baselines={"chance": 2.303},
        virtual=False,
    )
    return replace(beginning, **changes)


def record(number: int, **changes: Any) -> RoundRecord:
    done = RoundRecord(
        round=number,
        loss=2.0 / (number + 1),
        num_samples=1400,
        nodes=2,
        contributing=2,
        alive=2,
        in_view=2,
        late=0,
        payload_bytes=8000,
        transport_bytes=9000,
        seconds=1.5,
        train_seconds=1.25,
        exchange_seconds=0.25,
        evaluate_seconds=0.125 if number % 2 else 0.0,
        metrics={"loss": 1.75 / (number + 1), "accuracy": 0.5} if number % 2 else None,
    )
    return replace(done, **changes)


def summary(status: str = "finished", **changes: Any) -> Summary:
    end = Summary(
        status=status,  # type: ignore[arg-type]
        run_id="test-1",
        run_dir="/runs/test-1",
        algorithm="fedavg",
        rounds=4,
        metrics={"loss": 0.4375, "accuracy": 0.5},
        bytes={"payload": 32000, "recovery": 0, "per_round": 8000.0, "transport": 36000},
        nodes={"started": 2, "joined": 0, "lost": 0, "drained": 0},
        samples={"drawn": 5600, "committed": 5600, "redrawn": 0, "lost": 0},
        replicas="identical",
        digest=MODEL.digest,
        seconds=7.0,
        virtual_seconds=None,
        baselines={"chance": 2.303},
    )
    return replace(end, **changes)


def tell(observer: Observer, beginning: Started, end: Summary, rounds: int = 4) -> None:
    """A whole run."""
    observer.on_start(beginning)
    observer.on_log(1, ["one", "two"])
    for number in range(rounds):
        observer.on_event({"event": "commit", "round": number, "committed": (0, 1)})
        observer.on_round(record(number))
    observer.on_model(MODEL)
    observer.on_end(end)
