"""EDiT and A-EDiT, exactly: tests E1 to E10 of their specification, and losses of nodes."""

from __future__ import annotations

import math
import random
import threading
from collections import deque
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from starling.actors.replica.replica import Replica
from starling.actors.tasks.quadratic import Quadratic
from starling.algorithms.api import Node, NodeId, Train
from starling.algorithms.low_communication.a_edit import AEDiT
from starling.algorithms.low_communication.anchors import known
from starling.algorithms.low_communication.anomalies import Detector, norm_of, weights_of
from starling.algorithms.low_communication.edit import EDiT
from starling.algorithms.low_communication.fragments import gather, modules_of
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError
from tests.toys import Ran, Toy, begin, replica, simulate

STEPS = 3
OUTER = {"name": "nesterov", "lr": 0.7, "momentum": 0.8}
EARLY = {"warmup": 4, "decay": 0.3}


def run(name: str = "edit", *, nodes: int = 3, rounds: int = 4, task: Any = None, **algorithm: Any) -> Ran:
    task = task or Toy()
    keys = {key: algorithm.pop(key) for key in ("faults", "network", "cluster", "on_divergence") if key in algorithm}
    return simulate(
        algorithm={"name": name, "inner_steps": STEPS} | algorithm,
        task={"name": task.name, **task.model_dump(exclude={"name"})},
        nodes=nodes,
        rounds=rounds,
        optimizer={"name": "sgd", "lr": 0.1},
        data={"batch_size": 8},
        evaluation={"every_rounds": 0},
        **keys,
    )


class Astray(EDiT, name="test_astray"):
    """In one round some nodes go much further than they should."""

    at: int = 0
    who: tuple[int, ...] = ()
    factor: float = 1e4

    async def steps_alone(self, node: Node) -> dict[NodeId, float]:
        begun = node.parameters.clone()
        await super().steps_alone(node)
        if node.round == self.at and node.id in self.who:
            node.parameters.copy_(begun + self.factor * (node.parameters - begun))
        return {}


class Reference:
    """EDiT with N models in one loop; ``sync`` brings one module together, at a time of its own."""

    def __init__(self, nodes: int) -> None:
        self.replicas = [replica(node, num_nodes=nodes) for node in range(nodes)]
        self.modules = modules_of(self.replicas[0].layout)
        self.anchor = self.replicas[0].parameters.clone()
        self.velocity = torch.zeros_like(self.anchor)

    def train(self, number: int) -> list[Tensor]:
        for one in self.replicas:
            one.parameters.copy_(self.anchor)
            begin(one, number, tuple(range(len(self.replicas))))
            one.trainer.train(Train(steps=STEPS), threading.Event())
        return [one.parameters.clone() for one in self.replicas]

    def sync(self, module: int, local: list[Tensor], left_out: tuple[int, ...] = (), limit: float = 10.0) -> None:
        ranges = self.modules[module]
        anchor = gather(self.anchor, ranges)
        deltas = {node: anchor - gather(one, ranges) for node, one in enumerate(local) if node not in left_out}
        norms = torch.tensor([norm_of(delta) for delta in deltas.values()], dtype=torch.float64)
        weights = [float(weight) for weight in torch.softmax(-norms, dim=0)]
        first, *rest = (delta * weight for delta, weight in zip(deltas.values(), weights, strict=True))
        mean = first.clone()
        for one in rest:
            mean = mean + one
        mean = mean / sum(weights) if sum(weights) != 1.0 else mean
        mean = mean * min(1.0, limit / (norm_of(mean) + 1e-6))
        velocity = 0.8 * gather(self.velocity, ranges) + mean
        step = (velocity * 0.8 + mean) * -0.7
        for (start, stop), moved, speed in zip(ranges, _cut(step, ranges), _cut(velocity, ranges), strict=True):
            self.anchor[start:stop] += moved
            self.velocity[start:stop] = speed


def _cut(values: Tensor, ranges: Any) -> tuple[Tensor, ...]:
    return values.split([stop - start for start, stop in ranges])


# --- E1: when a module is synchronized ------------------------------------------------------------------------------


def test_e1_synchronized_just_before_it_is_used():
    """A hook before each module's next forward pass, in the order in which that pass comes by: the same bits."""
    ran, reference = run(rounds=3), Reference(3)
    for number in range(3):
        local = reference.train(number)
        pending = dict(enumerate(("0", "2")))

        def hook(place: int, local: list[Tensor] = local, pending: dict[int, str] = pending) -> Any:
            def before(*_: Any) -> None:
                if pending.pop(place, None):
                    reference.sync(place, local)

            return before

        module: Any = reference.replicas[0].trainer.module
        handles = [layer.register_forward_pre_hook(hook(place)) for place, layer in enumerate((module[0], module[2]))]
        module(torch.zeros(1, 6))
        for handle in handles:
            handle.remove()
        assert not pending
    assert torch.equal(ran.parameters, reference.anchor)


# --- E2, E3: DiLoCo -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "batch_norm", "tied", "frozen"])
def test_e2_without_penalty_and_limit_it_is_diloco(model: Any):
    ours = run(task=Toy(model=model), penalty=False, max_norm=None, outer=OUTER)
    theirs = run("diloco", task=Toy(model=model), outer=OUTER)
    assert ours.digest == theirs.digest


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_e3_equal_norms_are_diloco(nodes: int):
    task = Quadratic(dimension=5, heterogeneity=0)
    ours, theirs = run(nodes=nodes, task=task, max_norm=None), run("diloco", nodes=nodes, task=task, outer=OUTER)
    torch.testing.assert_close(ours.parameters, theirs.parameters, rtol=1e-5, atol=1e-6)
    assert nodes == 3 or torch.equal(ours.parameters, theirs.parameters)


# --- E4, E5: who goes astray ----------------------------------------------------------------------------------------


def test_e4_an_outlier_is_as_if_it_were_not_there():
    ran, reference = run("test_astray", nodes=4, rounds=7, at=6, who=(2,), detector=EARLY), Reference(4)
    for number in range(7):
        local = reference.train(number)
        for module in range(2):
            reference.sync(module, local, left_out=(2,) if number == 6 else ())
    assert torch.equal(ran.parameters, reference.anchor)


def test_e4_before_the_detector_has_warmed_up_it_only_weighs_less():
    """Its weight is e^-‖Δ‖ of the others', and there is no outlier yet."""
    ran = run("test_astray", nodes=3, rounds=1, at=0, who=(2,), factor=3.0, detector=EARLY)
    calm = run("test_astray", nodes=3, rounds=1, detector=EARLY)
    assert not torch.equal(ran.parameters, calm.parameters)
    assert all(int(one.local["norms"]["count"][0]) == 1 for one in ran.replicas.values())  # type: ignore[index,call-overload,arg-type]


def test_e5_when_all_go_astray_it_is_rolled_back():
    keys: dict[str, Any] = {"at": 6, "who": (0, 1, 2), "detector": EARLY}
    before, after = (run("test_astray", rounds=rounds, **keys) for rounds in (6, 7))
    assert torch.equal(before.parameters, after.parameters)
    for one, other in zip(known(before.replicas[0]), known(after.replicas[0]), strict=True):
        assert torch.equal(one["anchor"], other["anchor"])
        assert torch.equal(one["outer"]["velocity"], other["outer"]["velocity"])  # type: ignore[arg-type]
    on = run("test_astray", rounds=8, **keys)
    assert not torch.equal(on.parameters, after.parameters)
    # What was refused was learned from all the same: norms that stay where they are, are accepted some day.
    counts = [one.local["norms"]["count"].tolist() for one in on.replicas.values()]  # type: ignore[index,call-overload,union-attr]
    assert counts == [[8, 8]] * 3
    assert [one.local["rolled back"] for one in after.replicas.values()] == [[1, 1]] * 3
    assert [one.local["rolled back"] for one in on.replicas.values()] == [[0, 0]] * 3


class Lost(EDiT, name="test_lost"):
    """Nodes whose norms are not finite from round 1 on."""

    async def steps_alone(self, node: Node) -> dict[NodeId, float]:
        await super().steps_alone(node)
        if node.round:
            node.parameters.mul_(1e300)
        return {}


def test_a_module_that_is_rolled_back_for_many_rounds_is_told(capsys: pytest.CaptureFixture[str]):
    run("test_lost", nodes=2, rounds=12)
    said = [line for line in capsys.readouterr().out.splitlines() if "rolled back" in line]
    assert sorted(said) == [f"round 10: module {place} was rolled back in the last 10 rounds" for place in (0, 0, 1, 1)]


# --- E6: the limit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.01, 0.1, 1e6])
def test_e6_no_module_moves_further_than_the_limit(limit: float):
    start = replica(task=Toy()).parameters
    ran = run(rounds=1, outer={"name": "sgd", "lr": 1.0}, max_norm=limit)
    moved = [norm_of(gather(ran.parameters - start, one)) for one in modules_of(ran.replicas[0].layout)]
    assert all(one <= limit * (1 + 1e-5) for one in moved)
    if limit < 0.05:
        assert moved == pytest.approx([limit] * 2, rel=1e-3)


# --- E7: weights ----------------------------------------------------------------------------------------------------


@given(norms=st.lists(st.floats(0, 50), min_size=1, max_size=8), temperature=st.floats(0.1, 10))
def test_e7_weights(norms: list[float], temperature: float):
    found = weights_of({node: torch.tensor([norm]) for node, norm in enumerate(norms)}, temperature, {})
    weights = [found[node][0] for node in range(len(norms))]
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
    for norm, weight in zip(norms, weights, strict=True):
        for other, its in zip(norms, weights, strict=True):
            assert weight >= its or norm >= other
    exact = [math.exp(-(float(torch.tensor(norm)) - min(norms)) / temperature) for norm in norms]
    assert weights == pytest.approx([one / sum(exact) for one in exact], rel=1e-5, abs=1e-12)


def test_e7_shares_of_steps():
    """By hand: half of a weight by norms, half by steps; an outlier that took half of all steps is as if not there."""
    norms = {0: torch.tensor([1.0]), 1: torch.tensor([1.0]), 2: torch.tensor([torch.inf])}
    found = weights_of(norms, 1.0, {0: 0.5 * 0.75, 1: 0.5 * 0.25, 2: 0.0})
    assert [found[node][0] for node in range(3)] == pytest.approx([0.625, 0.375, 0.0])
    found = weights_of(norms, 1.0, {0: 0.5 * 0.375, 1: 0.5 * 0.125, 2: 0.5 * 0.5})
    assert [found[node][0] for node in range(3)] == pytest.approx([0.625, 0.375, 0.0])
    found = weights_of(norms, 1.0, {0: 0.0, 1: 0.0, 2: 0.5})  # all steps are the outlier's
    assert [found[node][0] for node in range(3)] == pytest.approx([0.5, 0.5, 0.0])
    whole = {0: torch.tensor([0.0]), 1: torch.tensor([math.log(3)]), 2: torch.tensor([math.log(6)])}
    found = weights_of(whole, 1.0, {0: 0.1, 1: 0.1, 2: 0.2})  # softmax: 2/3, 2/9, 1/9, of which 0.6
    assert [found[node][0] for node in range(3)] == pytest.approx([0.5, 0.1 + 0.4 / 3, 0.2 + 0.2 / 3])
    assert weights_of({0: norms[2], 1: norms[2]}, 1.0, {}) == {0: [0.0], 1: [0.0]}
    assert weights_of({0: norms[2], 1: norms[2]}, 1.0, {0: 0.2, 1: 0.3}) == {0: [0.0], 1: [0.0]}


# --- E8: the detector -----------------------------------------------------------------------------------------------


def flags_of_atorch(values: list[float], *, alpha: float = 0.02, steps: int = 120, base: float = 3.0) -> list[bool]:
    """By the description of atorch's detector: judge by the state before, learn from all, score by the state after."""
    mean, m2, count, flags = 0.0, 0.0, 0, list[bool]()
    last: deque[float] = deque(maxlen=steps)
    for value in values:
        center = math.fsum(last) / max(1, len(last))
        spread = math.sqrt(math.fsum((score - center) ** 2 for score in last) / max(1, len(last) - 1))
        limit = base * max(1.0, spread)
        flags.append(count >= steps and m2 > 0 and (value - mean) / math.sqrt(m2) > limit)
        count, delta = count + 1, value - mean
        mean += alpha * delta
        m2 = (1 - alpha) * (m2 + alpha * delta * (value - mean))
        last.append((value - mean) / math.sqrt(m2) if count >= steps and m2 > 0 else 0.0)
    return flags


def flags_of_ours(columns: list[list[float]], detector: Detector) -> list[list[bool]]:
    history, flags = detector.fresh(len(columns)), []
    for row in torch.tensor(columns, dtype=torch.float64).T:
        flags.append(detector.outliers(history, row).tolist())
        history = detector.updated(history, row)
    return [list(column) for column in zip(*flags, strict=True)]


@pytest.mark.slow
def test_e8_decides_as_atorch():
    """60 000 log-normal norms, one in a hundred of them five times as large; in 100 histories of 600."""
    rng = random.Random(5)
    columns = [[rng.lognormvariate(0, 0.3) * (5 if rng.random() < 0.01 else 1) for _ in range(600)] for _ in range(100)]
    ours, theirs = flags_of_ours(columns, Detector()), [flags_of_atorch(column) for column in columns]
    assert ours == theirs
    assert sum(map(sum, ours)) > 300


@given(
    values=st.lists(st.integers(0, 100), min_size=1, max_size=40),
    warmup=st.integers(1, 10),
)
def test_e8_any_numbers(values: list[int], warmup: int):
    numbers = [value + 0.37 * place for place, value in enumerate(values)]
    expected = flags_of_atorch(numbers, alpha=0.1, steps=warmup, base=2.0)
    assert flags_of_ours([numbers], Detector(decay=0.1, warmup=warmup, threshold=2.0)) == [expected]


def test_e8_decides_as_atorch_where_scores_are_wide():
    """Heavy tails and a short memory: the threshold is made of the scores, whose deviation is often above 1."""
    rng = random.Random(7)
    columns = [[rng.paretovariate(1.0) for _ in range(80)] for _ in range(20)]
    keys: dict[str, Any] = {"alpha": 0.3, "steps": 5, "base": 1.0}
    expected = [flags_of_atorch(column, **keys) for column in columns]
    assert flags_of_ours(columns, Detector(decay=0.3, warmup=5, threshold=1.0)) == expected
    assert 50 < sum(map(sum, expected)) < 800


def test_e8_numbers_far_below_all_others_are_no_outliers():
    """Of 200 around 1 the deviation is 0.02: 1.5 is an outlier, by 25 of those, and 0.5 is none."""
    rng = random.Random(2)
    detector = Detector()
    history = detector.fresh(2)
    for _ in range(400):
        history = detector.updated(history, torch.tensor([rng.gauss(1, 0.02)] * 2, dtype=torch.float64))
    assert detector.outliers(history, torch.tensor([1.5, 0.5], dtype=torch.float64)).tolist() == [True, False]


def test_e8_a_level_that_stays_is_accepted_again():
    """Norms that rise for good, by ten standard deviations: flagged some rounds, and not for ever."""
    rng = random.Random(1)
    numbers = [rng.gauss(1, 0.02) for _ in range(400)] + [rng.gauss(1.2, 0.02) for _ in range(400)]
    (flags,) = flags_of_ours([numbers], Detector())
    assert flags[400]
    assert not any(flags[430:])


def test_e8_what_is_not_finite_is_an_outlier_and_teaches_nothing():
    detector = Detector(**EARLY)
    history = detector.fresh(2)
    odd = torch.tensor([math.nan, math.inf], dtype=torch.float64)
    assert detector.outliers(history, odd).all()
    after = detector.updated(history, odd)
    assert all(torch.equal(after[key], history[key]) for key in history)  # type: ignore[arg-type]


def test_e8_one_sided_and_silent_at_first():
    detector = Detector(**EARLY)
    history = detector.fresh(1)
    assert not detector.outliers(history, torch.tensor([1e9], dtype=torch.float64)).any()
    for value in (1.0, 1.1, 0.9, 1.0, 1.05):
        history = detector.updated(history, torch.tensor([value], dtype=torch.float64))
    assert detector.outliers(history, torch.tensor([100.0], dtype=torch.float64)).all()
    assert not detector.outliers(history, torch.tensor([0.0], dtype=torch.float64)).any()


# --- E9: by the clock -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_ms", [10, 7, 0.3])
def test_e9_with_equal_speeds_the_clock_is_a_counter(step_ms: float):
    network = {"step_ms": step_ms, "latency_ms": 1.3}
    ours = run("a_edit", interval_s=STEPS * step_ms / 1000, min_total_steps=1, network=network)
    theirs = run(network=network)
    assert ours.digest == theirs.digest


def steps_taken(ran: Ran) -> list[int]:
    return [one.schedule.step for one in ran.replicas.values()]


def test_unequal_nodes_take_as_many_steps_as_they_can():
    network = {"step_ms": 10, "speeds": {0: 2.0, 2: 0.5}}
    ran = run("a_edit", interval_s=0.08, min_total_steps=1, rounds=2, network=network)
    assert steps_taken(ran) == [2 * 16, 2 * 8, 2 * 4]
    assert ran.virtual_seconds == pytest.approx(0.16, rel=1e-6)


def test_too_few_steps_in_all_are_not_synchronized():
    ran = run("a_edit", interval_s=0.03, min_total_steps=20, rounds=1, network={"step_ms": 10})
    assert steps_taken(ran) == [9] * 3  # 9 and 18 are too few, 27 are not
    stopped = run("a_edit", interval_s=0.03, min_total_steps=20, max_steps=4, rounds=1, network={"step_ms": 10})
    assert steps_taken(stopped) == [4] * 3
    assert stopped.virtual_seconds == pytest.approx(0.06, rel=1e-6)


def test_as_many_steps_as_are_asked_for_are_enough():
    ran = run("a_edit", interval_s=0.03, min_total_steps=9, rounds=1, network={"step_ms": 10})
    assert steps_taken(ran) == [3] * 3


def test_one_node_at_its_limit_waits_for_the_others():
    """After 0.04 s one node has taken its 8 steps, and there are 16 of at least 20; after 0.08 s there are 24."""
    network = {"step_ms": 10, "speeds": {0: 4.0}}
    ran = run("a_edit", interval_s=0.04, min_total_steps=20, max_steps=8, rounds=1, network=network)
    assert steps_taken(ran) == [8] * 3
    assert ran.virtual_seconds == pytest.approx(0.08, rel=1e-6)


def test_who_does_more_counts_more():
    """By hand: θ - Σ w_m Δ_m, with the nodes' own steps (12, 4 and 4) and the weights' definition."""
    network = {"step_ms": 10, "speeds": {0: 3.0}}
    keys: dict[str, Any] = {"interval_s": 0.04, "min_total_steps": 1, "rounds": 1, "network": network}
    ran = run("a_edit", step_share=0.5, outer={"name": "sgd", "lr": 1.0}, max_norm=None, **keys)
    workers: list[Replica] = [replica(node, num_nodes=3) for node in range(3)]
    start, deltas = workers[0].parameters.clone(), list[Tensor]()
    for one, steps in zip(workers, (12, 4, 4), strict=True):
        begin(one, 0, (0, 1, 2))
        one.trainer.train(Train(steps=steps), threading.Event())
        deltas.append(start - one.parameters)
    expected = start.clone()
    for ranges in modules_of(workers[0].layout):
        parts = [gather(delta, ranges) for delta in deltas]
        odds = [math.exp(-float(part.norm())) for part in parts]
        weights = [0.5 * odd / sum(odds) + 0.5 * steps / 20 for odd, steps in zip(odds, (12, 4, 4), strict=True)]
        step = torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)]).sum(0)
        for (low, high), moved in zip(ranges, _cut(step, ranges), strict=True):
            expected[low:high] -= moved
    torch.testing.assert_close(ran.parameters, expected, rtol=1e-5, atol=1e-6)
    assert AEDiT().steps_per_round(1, 1) == 128


# --- E10: the warm-up -----------------------------------------------------------------------------------------------


def test_e10_the_warm_up_is_data_parallel():
    ours, theirs = run(warmup_steps=4 * STEPS), run("ddp")
    assert ours.digest == theirs.digest
    assert [one.payload_bytes for one in ours.rounds] == [one.payload_bytes for one in theirs.rounds]


def test_the_anchor_is_where_the_warm_up_ends():
    ran = run(warmup_steps=2 * STEPS, rounds=3)
    warm = run("ddp", rounds=2)
    reference = Reference(3)
    reference.anchor = warm.parameters.clone()
    for one, other in zip(reference.replicas, warm.replicas.values(), strict=True):
        one.data.position = other.data.position
        one.schedule.step = other.schedule.step
    local = reference.train(2)
    for module in range(2):
        reference.sync(module, local)
    assert torch.equal(ran.parameters, reference.anchor)
    assert [ran.planned_bytes(number) for number in range(3)] == [one.payload_bytes for one in ran.rounds]


# --- losses ---------------------------------------------------------------------------------------------------------


def test_after_a_loss_the_mean_is_that_of_the_others():
    """In the round of the loss the others' weights are what they would be without the node that is gone."""
    faults = {"events": [{"kind": "kill", "node": 1, "round": 1, "phase": "train"}]}
    ran, reference = run(rounds=2, faults=faults, network={"start_s": 10.0}), Reference(3)
    for number in range(2):
        local = reference.train(number)
        for module in range(2):
            reference.sync(module, local, left_out=(1,) if number else ())
    assert torch.equal(ran.parameters, reference.anchor)


@pytest.mark.parametrize("name", ["edit", "a_edit"])
@pytest.mark.parametrize("phase", ["train", "post", "secure", "deliver", "commit"])
def test_a_loss_does_not_end_a_run(name: str, phase: str):
    faults = {"events": [{"kind": "kill", "node": 1, "round": 2, "phase": phase}]}
    extra = {"interval_s": 0.03, "min_total_steps": 1} if name == "a_edit" else {}
    ran = run(name, rounds=6, faults=faults, network={"start_s": 0.02, "latency_ms": 1}, **extra)
    assert ran.summary is not None
    assert (ran.summary.rounds, ran.summary.nodes["lost"]) == (6, 1)
    # All that the joiner knows of φ and v it has from a donor: the same bits.
    one, other = (known(ran.replicas[node]) for node in (0, 1))
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours["anchor"], theirs["anchor"])
        assert torch.equal(ours["outer"]["velocity"], theirs["outer"]["velocity"])  # type: ignore[arg-type]


def test_a_joiner_has_no_history():
    faults = {"events": [{"kind": "kill", "node": 1, "round": 2, "phase": "train"}]}
    ran = run(rounds=6, faults=faults, network={"start_s": 0.0})

    def count(one: Replica) -> int:
        return int(one.local["norms"]["count"][0])  # type: ignore[index,call-overload,arg-type]

    assert count(ran.replicas[0]) == 6
    assert count(ran.replicas[1]) < 6


class Odd(EDiT, name="test_odd"):
    """In round 2 the shared state of node 1 is another."""

    async def round(self, node: Node) -> None:
        await super().round(node)
        node.shared["odd"] = node.round == 2 and node.id == 1


def test_a_node_that_is_given_the_others_state_has_no_history():
    """It is the process that it was, and yet joins: norms that led it astray are no measure of the next ones."""
    ran = run("test_odd", rounds=7, on_divergence="heal", network={"start_s": 0.0})
    (transfer,) = ran.sought("transfer")
    assert (transfer["node"], ran.replicas[1].incarnation) == (1, 0)
    counts = [int(one.local["norms"]["count"][0]) for one in ran.replicas.values()]  # type: ignore[index,call-overload,arg-type]
    assert counts == [7, 7 - transfer["round"], 7]


def test_bad_settings():
    with pytest.raises(ConfigError, match="warmup_steps: 100 is not a multiple of inner_steps, 32; take 96"):
        parse({"algorithm": {"name": "edit", "inner_steps": 32, "warmup_steps": 100}, "task": "digits"})
    with pytest.raises(ConfigError, match=r"algorithm.detector.decay"):
        parse({"algorithm": {"name": "edit", "detector": {"decay": 2}}, "task": "digits"})
