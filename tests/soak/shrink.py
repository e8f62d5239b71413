"""Makes a failing history smaller while it fails in the same way."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Raw = dict[str, Any]

PLAIN: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("evaluation", "every_rounds"): (0,),
    ("data", "partition"): ("iid",),
    ("data", "sampler"): ("epoch",),
    ("data", "batch_size"): (16,),
    ("optimizer", "name"): ("sgd",),
    ("optimizer", "rollback"): (False,),
    ("optimizer", "on_join"): ("fresh",),
    ("optimizer", "grad_clip"): (None,),
    ("on_divergence",): ("stop",),
    ("network", "speeds"): ({},),
    ("network", "bandwidth_mbps"): (None,),
    ("network", "latency_ms"): (0, 3),
    ("network", "step_ms"): (10,),
    ("network", "adopt_s"): (0,),
    ("network", "start_s"): (0, 0.02),
    ("cluster", "warm_spares"): (0,),
    ("cluster", "quorum_fraction"): (0.5,),
    ("cluster", "round_deadline_s"): (20, 2),
    ("cluster", "cancel_grace_s"): (0.5,),
    ("cluster", "drain_s"): (2, 0.2),
    ("cluster", "min_nodes_timeout_s"): (60,),
    ("cluster", "nodes", "min"): (1,),
    ("task", "width"): (3,),
    ("task", "num_samples"): (37,),
    ("task", "batch_norm"): (False,),
    ("task", "dropout"): (False,),
    ("seed",): (0,),
}
"""What each key would rather be."""


def shrink(raw: Raw, fails: Callable[[Raw], bool], tries: int = 150) -> Raw:
    """The smallest history that is found in so many tries; ``fails`` says whether one fails in the same way."""
    found = True
    while found and tries > 0:
        found = False
        for one in _smaller(raw):
            if tries <= 0:
                break
            tries -= 1
            if one != raw and fails(one):
                raw, found = one, True
                break
    return raw


def _smaller(raw: Raw) -> Iterator[Raw]:
    events = raw["faults"]["events"]
    if len(events) > 2:
        for half in (events[: len(events) // 2], events[len(events) // 2 :]):
            yield _with(raw, ("faults", "events"), half)
    for place in range(len(events)):
        yield _with(raw, ("faults", "events"), events[:place] + events[place + 1 :])
    last = max((event["round"] for event in events), default=0)
    last = max(last, raw.get("soak", {}).get("killed", 0) + 1)
    for rounds in (last + 1, last + 3, raw["rounds"] // 2, raw["rounds"] - 1):
        if last < rounds < raw["rounds"] and rounds > 0:
            yield _with(raw, ("rounds",), rounds)
    beside = raw.get("soak", {})
    for key, value in beside.items():
        yield raw | {"soak": {one: other for one, other in beside.items() if one != key}}
        if key == "killed" and value > 0:
            yield _with(raw, ("soak", key), value - 1)
        if key == "spares" and len(value) > 1:
            yield _with(raw, ("soak", key), value[:-1])
    first = min((event["round"] for event in events), default=0)
    if first > 1:
        earlier = _with(raw, ("rounds",), raw["rounds"] - 1)
        earlier["faults"]["events"] = [event | {"round": event["round"] - 1} for event in events]
        if beside:
            killed = {"killed": max(0, beside["killed"] - 1)} if "killed" in beside else {}
            earlier["soak"] = {"spares": [max(0, one - 1) for one in beside.get("spares", ())]} | killed
        yield earlier
    nodes = raw["cluster"]["nodes"]["target"]
    named = [event["node"] for event in events if isinstance(event["node"], int)]
    if nodes > 2 and nodes - 1 not in named:
        less = _with(raw, ("cluster", "nodes", "target"), nodes - 1)
        less["cluster"]["nodes"]["min"] = min(less["cluster"]["nodes"]["min"], nodes - 1)
        less["network"]["speeds"] = {
            node: speed for node, speed in raw["network"]["speeds"].items() if node < nodes - 1
        }
        yield less
    for place, values in PLAIN.items():
        current = _at(raw, place)
        for value in values[: values.index(current)] if current in values else values:
            if current is not _MISSING:
                yield _with(raw, place, value)
    for key in raw["algorithm"]:
        if key != "name":
            yield {**raw, "algorithm": {one: value for one, value in raw["algorithm"].items() if one != key}}


_MISSING = object()


def _at(raw: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        if key not in raw:
            return _MISSING
        raw = raw[key]
    return raw


def _with(raw: Raw, place: tuple[str, ...], value: Any) -> Raw:
    changed = copy.deepcopy(raw)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed
