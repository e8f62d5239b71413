"""Draws configurations in which much goes wrong, in sequences: what happens while a loss is being made good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starling.algorithms.api import Algorithm
from starling.algorithms.registry import table
from tests.soak import programs

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    Raw = dict[str, Any]
    Draw = Callable[[random.Random], Raw]

PHASES = ("train", "post", "measure", "secure", "deliver", "commit", "transfer")
ASYNCHRONOUS_PHASES = ("train", "receive", "commit", "transfer")
HERE = programs.__name__


def _topology(rng: random.Random) -> Any:
    return rng.choice(
        [
            *("ring", "complete", "exponential", "one_peer_exponential", "random_matching", "torus"),
            {"name": "erdos_renyi", "probability": 0.6, "redraw_every": 1},
            {"name": "alternating", "topologies": ["ring", "one_peer_exponential"]},
        ]
    )


def _close(rng: random.Random) -> Any:
    return rng.choice(
        [
            *("quorum", "quorum", "all"),
            {"name": "first_k", "k": rng.randint(1, 3)},
            {"name": "grace", "after": rng.randint(1, 2), "seconds": rng.choice([0, 0.01, 0.1])},
            {"name": "grace", "factor": 0.5},
        ]
    )


def _codec(rng: random.Random) -> Any:
    return rng.choice(
        [*("identity", "identity", "bf16", "int8", "qsgd", "sign"), {"name": "top_k"}, {"name": "random_k"}]
    )


def _lossy(rng: random.Random) -> Raw:
    return {"codec": _codec(rng), "error_feedback": rng.random() < 0.4}


def _compressed(rng: random.Random) -> Raw:
    return {"compressor": "powersgd"} if rng.random() < 0.2 else _lossy(rng)


def _outer(rng: random.Random) -> Any:
    return rng.choice([{"name": "sgd", "lr": 1.0}, {"name": "nesterov", "lr": 0.5}, {"name": "adam", "lr": 0.01}])


def _federated(rng: random.Random) -> Raw:
    return {"steps": rng.randint(1, 3), "fraction": rng.choice([1.0, 1.0, 0.6, 0.3]), "outer": _outer(rng)}


def _averaged(rng: random.Random) -> Raw:
    compares = [{"name": "krum", "f": 0}, {"name": "multi_krum", "f": 1}, "geometric_median"]
    chosen = _federated(rng) | {"aggregator": rng.choice(["mean", "mean", "uniform", "median", *compares])}
    return chosen | ({"codec": _codec(rng)} if chosen["aggregator"] == "mean" else {})


def _edit(rng: random.Random) -> Raw:
    return _compressed(rng) | {
        "inner_steps": rng.randint(1, 3),
        "warmup_steps": rng.choice([0, 2]),
        "outer": _outer(rng),
    }


def _spsa(rng: random.Random) -> Raw:
    return {
        "samples": rng.randint(1, 3),
        "distribution": rng.choice(["gaussian", "rademacher"]),
        "one_sided": rng.random() < 0.5,
        "layerwise": rng.random() < 0.2,
        "verify_every": rng.choice([1, 3, 64]),
        "lr": 0.01,
    }


SETTINGS: dict[str, Draw] = {
    "a_edit": lambda rng: _edit(rng) | {"interval_s": 0.05, "min_total_steps": 2, "max_steps": 4},
    "async_diloco": lambda rng: {
        "inner_steps": rng.randint(1, 4),
        "rule": rng.choice(["delayed_nesterov", "delayed_sgd"]),
        "buffer_size": rng.choice([None, 1, 3]),
        "grace_s": rng.choice([0.0, 0.0, 0.05]),
        "lr": 0.3,
        "momentum": 0.3,
    },
    "cbo": lambda rng: {"particles": rng.choice([10, 12])},
    "ddp": lambda rng: _compressed(rng) | {"inner_steps": rng.randint(1, 2)},
    "diloco": lambda rng: {"inner_steps": rng.randint(1, 3), "codec": _codec(rng), "outer": _outer(rng)},
    "dsgd": lambda rng: {"topology": _topology(rng), "steps": rng.randint(1, 2), "order": rng.choice(["atc", "cta"])},
    "eager_diloco": lambda rng: _lossy(rng) | {"inner_steps": rng.randint(1, 3), "outer": _outer(rng)},
    "edit": _edit,
    "fedavg": lambda rng: _averaged(rng) | {"weighting": rng.choice(["samples", "uniform"])},
    "fedbuff": lambda rng: {
        "buffer_size": rng.randint(1, 4),
        "steps": rng.randint(1, 2),
        "max_staleness": rng.choice([None, 0, 3]),
        "outer": _outer(rng),
    },
    "fedprox": lambda rng: _averaged(rng) | {"mu": 0.1},
    "fzoos": lambda rng: {
        "features": 20,
        "steps": 2,
        "candidates": 5,
        "neighbors": 6,
        "surrogate_queries": 5,
        "queries": 2,
        "history": 12,
    },
    "gradient_coding": lambda rng: {"patience_s": rng.choice([0.0, 0.05]), "outer": _outer(rng)},
    "gradient_tracking": lambda rng: {"topology": _topology(rng), "steps": rng.randint(1, 2)},
    "just_one_byte": _spsa,
    "local_sgd": lambda rng: _lossy(rng) | {"inner_steps": rng.randint(1, 3)},
    "mezo": _spsa,
    "random_walk": lambda rng: {"topology": rng.choice(["ring", "complete"]), "lr": 0.1},
    "scaffold": _federated,
    "single_merge": lambda rng: {"steps": rng.randint(1, 2), "neighbors": rng.choice([0.4, 1.0, 2.0])},
    "streaming_diloco": lambda rng: {
        "inner_steps": rng.choice([4, 6]),
        "fragments": 2,
        "pattern": "size",
        "codec": _codec(rng),
        "error_feedback": rng.random() < 0.3,
        "overlap_steps": rng.choice([0, 1, 2]),
        "staggered": rng.random() < 0.5,
    },
    f"{HERE}:Drawing": lambda rng: {
        "large": rng.random() < 0.5,
        "close": _close(rng),
        "codec": _codec(rng),
        "fraction": rng.choice([1.0, 1.0, 0.6]),
        "topology": _topology(rng),
    },
    f"{HERE}:Mixer": lambda rng: {
        "topology": _topology(rng),
        "close": _close(rng),
        "started": rng.random() < 0.4,
    },
    f"{HERE}:Overlapping": lambda rng: {"close": _close(rng)},
    f"{HERE}:Letters": lambda rng: {"large": rng.random() < 0.3, "patience_s": rng.choice([0.02, 0.3])},
    f"{HERE}:Drifting": lambda rng: {"chance": rng.choice([0.0, 0.05])},
    f"{HERE}:Chatter": lambda rng: {"large": rng.random() < 0.3, "patience_s": rng.choice([0.02, 0.2])},
    f"{HERE}:Wanderer": lambda rng: {"patience_s": rng.choice([0.0, 0.01, 0.05])},
}

WEIGHTS = {f"{HERE}:Drawing": 4, f"{HERE}:Mixer": 3, f"{HERE}:Overlapping": 3, f"{HERE}:Chatter": 2, "fzoos": 0.2}


def algorithms() -> list[str]:
    """All that there are, ours and those of ``programs``; what tests define of their own is not among them."""
    mine = [name for name in SETTINGS if ":" in name]
    return mine + [name for name in table(Algorithm) if not name.startswith("test_")]


def draw(rng: random.Random) -> Raw:
    """A configuration, which may be one that is refused."""
    names = algorithms()
    (name,) = rng.choices(names, [WEIGHTS.get(name, 1) for name in names])
    chosen = {"name": name} | SETTINGS.get(name, lambda _: {})(rng)
    cls = getattr(programs, name.partition(":")[2]) if ":" in name else table(Algorithm)[name]
    nodes, rounds = rng.randint(2, 6), rng.randint(4, 16)
    raw = {
        "seed": rng.randrange(100),
        "rounds": rounds,
        "algorithm": chosen,
        "task": _task(rng, name),
        "data": _data(rng),
        "optimizer": _optimizer(rng),
        "on_divergence": rng.choice(["stop", "heal"]) if name != f"{HERE}:Drifting" else "heal",
        "evaluation": {"every_rounds": rng.choice([0, 0, 3]), "max_batches": 1},
        "network": _network(rng, nodes),
        "tracking": "none",
    }
    late = _late(rng, nodes, rounds)
    phases = PHASES if cls.synchronous else ASYNCHRONOUS_PHASES
    has_server = cls.server is not Algorithm.server
    raw["faults"] = {
        "events": late + _faults(rng, [*range(nodes), *(["server"] if has_server else [])], rounds, phases)
    }
    raw["cluster"] = _cluster(rng, nodes, len({one["node"] for one in late}))
    # What nothing happens in any more shows nothing, but for what follows from the last faults.
    raw["rounds"] = rounds = min(rounds, max((one["round"] for one in raw["faults"]["events"]), default=2) + 5)
    raw["soak"] = _beside(rng, rounds, raw["cluster"]["warm_spares"])
    return raw


def _beside(rng: random.Random, rounds: int, num_spares: int) -> Raw:
    """What no configuration says: rounds in which spares die, and behind which the run is killed and resumed."""
    dying = rng.randint(1, 4) if num_spares and rng.random() < 0.6 else 0
    beside: Raw = {"spares": sorted(rng.randrange(rounds) for _ in range(dying))}
    return beside | ({"killed": rng.randrange(rounds - 1)} if rng.random() < 0.4 else {})


def _task(rng: random.Random, name: str) -> Raw:
    if name in {"fzoos", "cbo"}:
        return {"name": "quadratic", "dimension": 5, "samples_per_node": 2}
    if name in {"just_one_byte", "mezo", "gradient_coding"}:
        return {"name": f"{HERE}:Unequal", "width": rng.choice([3, 3000])}
    return {
        "name": f"{HERE}:Unequal",
        "num_samples": rng.choice([12, 37, 80]),
        "width": rng.choice([3, 3, 3000]),
        "batch_norm": rng.random() < 0.2,
        "dropout": rng.random() < 0.1,
    }


def _data(rng: random.Random) -> Raw:
    partition = rng.choice(["iid", "iid", {"name": "quantity", "alpha": 1.0, "min_samples": 1}])
    return {
        "batch_size": rng.choice([2, 5, 16]),
        "partition": partition,
        "sampler": rng.choice(["epoch"] * 3 + ["poisson"]),
    }


def _optimizer(rng: random.Random) -> Raw:
    kind = rng.choice([{"name": "sgd"}, {"name": "sgd"}, {"name": "sgd", "momentum": 0.9}, {"name": "adamw"}])
    return kind | {
        "lr": 0.01,
        "rollback": rng.random() < 0.4,
        "on_join": rng.choice(["fresh", "donor"]),
        "grad_clip": rng.choice([None, 1.0]),
    }


def _network(rng: random.Random, nodes: int) -> Raw:
    speeds = {node: rng.choice([0.05, 0.2, 0.5, 1.0, 3.0]) for node in range(nodes)} if rng.random() < 0.5 else {}
    return {
        "start_s": rng.choice([0, 0.001, 0.02, 0.15, 1.0]),
        "adopt_s": rng.choice([0, 0.01]),
        "step_ms": rng.choice([0, 5, 20, 100]),
        "speeds": speeds,
        "bandwidth_mbps": rng.choice([None, None, 20, 2]),
        "latency_ms": rng.choice([0, 0, 3, 40]),
    }


def _cluster(rng: random.Random, nodes: int, num_late: int) -> Raw:
    least = min(rng.choice([1, 1, 1, 2, nodes]), nodes - num_late)
    return {
        "nodes": {"min": least, "target": nodes},
        "quorum_fraction": rng.choice([0.01, 0.5, 0.5, 1.0]),
        "warm_spares": rng.choice([0, 0, 0, 1, 2]),
        "round_deadline_s": rng.choice([0.02, 0.1, 0.3, 2, 20]),
        "cancel_grace_s": rng.choice([0.001, 0.05, 0.5]),
        "drain_s": rng.choice([0.001, 0.01, 0.05, 0.2, 2]),
        "min_nodes_timeout_s": rng.choice([5, 60]),
    }


def _late(rng: random.Random, nodes: int, rounds: int) -> list[Raw]:
    if rng.random() < 0.6:
        return []
    who = [0] if rng.random() < 0.5 else rng.sample(range(nodes), rng.randint(1, max(1, nodes // 2)))
    return [{"kind": "late_join", "node": node, "round": rng.randrange(rounds)} for node in who[: nodes - 1]]


def _faults(rng: random.Random, who: list[Any], rounds: int, phases: tuple[str, ...]) -> list[Raw]:
    events: list[Raw] = []
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 2, 3, 3])):
        # A chain at one node, or one node after another, each link close after the one before.
        node, number = rng.choice(who), rng.randrange(rounds)
        # Killed, replaced, told to leave, killed again; or anything.
        kinds = ("kill", "preempt", "kill") if rng.random() < 0.2 else ()
        for place in range(len(kinds) or rng.randint(1, 5)):
            kind = kinds[place] if kinds else rng.choice(["kill", "kill", "preempt", "preempt", "hang"])
            events.append({"kind": kind, "node": node, "round": number, "phase": rng.choice(phases)})
            number = min(rounds - 1, number + rng.choice([0, 0, 1, 1, 2]))
            node = node if kinds or rng.random() < 0.75 else rng.choice(who)
    return events
