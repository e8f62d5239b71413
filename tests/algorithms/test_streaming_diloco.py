"""Streaming DiLoCo, exactly: tests S1 to S6 of its specification, its fragments, bytes and losses of nodes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starling.actors.host.build import build_replicas, load_data
from starling.actors.host.host import Host
from starling.actors.host.recorded_clock import Times
from starling.actors.host.round_order import RoundOrder
from starling.actors.tasks import Task, TensorSamples
from starling.actors.wire.tickets import Contributed, Posted, Returned, Waiting
from starling.algorithms.api import View, all_reduce_bytes
from starling.algorithms.codecs import Identity
from starling.algorithms.codecs.fp4 import FP4
from starling.algorithms.errors import SettingsError
from starling.algorithms.layout import Layout, LayoutEntry
from starling.algorithms.low_communication.anchors import known
from starling.algorithms.low_communication.fragments import fragments_of, gather, modules_of, scatter, size_of
from starling.algorithms.low_communication.streaming_diloco import StreamingDiLoCo
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError
from tests.toys import Ran, attempt, replica, simulate

EXACT = {"codec": "identity", "result_codec": "identity"}
NESTEROV = {"name": "nesterov", "lr": 0.7, "momentum": 0.9}
HALVES = {"fragments": 2, "pattern": "size"}


def run(*, nodes: int = 3, rounds: int = 4, task: Any = "test_toy", optimizer: Any = None, **algorithm: Any) -> Ran:
    keys = {key: algorithm.pop(key) for key in ("faults", "network", "cluster", "seed") if key in algorithm}
    return simulate(
        algorithm={"name": "streaming_diloco", "outer": NESTEROV} | algorithm,
        task=task,
        nodes=nodes,
        rounds=rounds,
        optimizer={"name": "adamw", "lr": 0.01} | (optimizer or {}),
        data={"batch_size": 8},
        evaluation={"every_rounds": 0},
        **keys,
    )


def diloco(*, nodes: int = 3, rounds: int = 4, steps: int = 6, task: Any = "test_toy") -> Ran:
    return simulate(
        algorithm={"name": "diloco", "inner_steps": steps, "outer": NESTEROV},
        task=task,
        nodes=nodes,
        rounds=rounds,
        optimizer={"name": "adamw", "lr": 0.01},
        data={"batch_size": 8},
        evaluation={"every_rounds": 0},
    )


def outer_model(ran: Ran) -> Tensor:
    return ran.config.algorithm.model(ran.replicas[0])


# --- S1, S2: DiLoCo -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["test_toy", {"name": "test_toy", "model": "batch_norm"}])
def test_s1_one_fragment_without_overlap_is_diloco(task: Any):
    keys = {"inner_steps": 6, "fragments": 1, "pattern": "size", "overlap_steps": 0, "merge_alpha": 0.0} | EXACT
    ours, theirs = run(task=task, **keys), diloco(task=task)
    assert ours.digest == theirs.digest
    assert torch.equal(ours.parameters, theirs.parameters)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_s2_all_fragments_at_once_are_diloco(count: int):
    keys = {"inner_steps": 42, "fragments": count, "staggered": False, "overlap_steps": 0, "merge_alpha": 0.0}
    ours, theirs = run(pattern="size", rounds=2, **keys, **EXACT), diloco(steps=42, rounds=2)
    assert ours.digest == theirs.digest


# --- S3: nothing is merged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 2])
def test_s3_alpha_of_one_is_alone(overlap: int):
    ran = run(inner_steps=6, overlap_steps=overlap, merge_alpha=1.0, rounds=5, **HALVES)
    local = simulate(
        algorithm="test_silent",
        nodes=3,
        rounds=15,
        optimizer={"name": "adamw", "lr": 0.01},
        data={"batch_size": 8},
        evaluation={"every_rounds": 0},
    )
    for node, one in ran.replicas.items():
        assert torch.equal(one.parameters, local.replicas[node].parameters)
    assert not torch.equal(ran.replicas[0].parameters, ran.replicas[1].parameters)


# --- S4: torchft's golden trajectories ------------------------------------------------------------------------------


SEEN: list[list[float]] = []


class Slide(Task, name="test_slide"):
    """f(θ) = Σ θ from θ = 1: the gradient is one everywhere. What the model is before each step is kept."""

    def train_samples(self, num_nodes: int) -> TensorSamples:
        return TensorSamples(torch.zeros(num_nodes, 1))

    validation_samples = train_samples

    def build(self) -> nn.Module:
        module = nn.Linear(2, 1, bias=False)
        nn.init.ones_(module.weight)
        return module

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        weight = next(module.parameters())
        SEEN.append(weight.detach().flatten().tolist())
        return weight.sum()


GOLDEN = {
    (0, 0.0): [
        *[(1, 1), (-1, -1), (-3, -3), (-11, -5), (-13, -7), (-15, -9), (-17, -23), (-19, -25), (-21, -27), (-35, -29)],
        *[(-37, -31), (-39, -33), (-41, -47), (-43, -49), (-45, -51), (-59, -53)],
    ],
    (0, 0.5): {3: (-8, -5), 6: (-14, -17), 9: (-24.5, -23), 12: (-30.5, -32), 15: (-40.25, -38)},
    (1, 0.0): {3: (-7, -5), 6: (-13, -19), 9: (-27, -25), 12: (-33, -39), 15: (-47, -45)},
    (1, 0.5): {3: (-6, -5), 6: (-12, -15), 9: (-21.5, -21), 12: (-27.5, -29), 15: (-35.75, -35)},
}


@pytest.mark.parametrize(("overlap", "alpha"), GOLDEN)
def test_s4_golden_trajectories(overlap: int, alpha: float):
    golden = GOLDEN[overlap, alpha]
    if isinstance(golden, dict):
        # Between the steps that synchronize, every value decreases by 2.
        points: dict[int, tuple[float, float]] = {0: (1, 1)} | golden
        golden = [
            tuple(value - 2 * (step - last) for value in points[last])
            for step in range(16)
            for last in [max(point for point in points if point <= step)]
        ]
    SEEN.clear()
    ran = run(
        task="test_slide",
        nodes=2,
        rounds=5,
        inner_steps=6,
        overlap_steps=overlap,
        merge_alpha=alpha,
        optimizer={"name": "sgd", "lr": 2.0},
        outer={"name": "sgd", "lr": 2.0},
        **HALVES,
        **EXACT,
    )
    for one in ran.replicas.values():
        assert one.parameters.tolist() == list(golden[15])
    # Both nodes, step by step; the last one is not followed by another.
    assert sorted(SEEN[: 2 * 15]) == sorted([list(point) for point in golden[:15]] * 2)
    assert {tuple(point) for point in SEEN} >= set(golden[:15])


# --- S5: a node dies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["train", "post", "secure", "deliver", "commit"])
@pytest.mark.parametrize("overlap", [0, 2])
def test_s5_replicas_agree_after_a_loss(phase: str, overlap: int):
    """Also between ``Start`` and ``Wait``: a fragment is large enough here to take its time on the network."""
    faults = {"events": [{"kind": "kill", "node": 0, "round": 2, "phase": phase}]}
    task = {"name": "digits", "model": {"name": "mlp", "width": 500}}
    network = {"bandwidth_mbps": 20, "start_s": 0.05}
    keys = {"inner_steps": 8, "overlap_steps": overlap, "faults": faults, "network": network} | EXACT
    ran = run(task=task, rounds=8, **keys, **HALVES)
    assert ran.summary is not None
    assert ran.summary.rounds == 8
    assert ran.summary.nodes["lost"] == 1
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1
    assert ran.sought("transfer"), "the replacement has received the state"
    again = run(task=task, rounds=8, **keys, **HALVES)
    assert again.digest == ran.digest


def test_s5_a_fragment_is_the_mean_of_those_that_are_left():
    """Where nothing is merged (α = 1) and the outer step is the mean: that of the survivors' own models, by hand."""
    faults = {"events": [{"kind": "kill", "node": 0, "round": 2, "phase": "train"}]}
    keys: dict[str, Any] = {"inner_steps": 6, "overlap_steps": 0, "merge_alpha": 1.0, **HALVES, **EXACT}
    ran = run(rounds=3, faults=faults, network={"start_s": 100.0}, outer={"name": "sgd", "lr": 1.0}, **keys)
    # Rounds of 3 steps: fragment 1 was last exchanged after 6, among all, and fragment 0 after 9.
    optimizer, data = {"name": "adamw", "lr": 0.01}, {"batch_size": 8}
    for p, steps, members in ((1, 6, (0, 1, 2)), (0, 9, (1, 2))):
        alone = simulate(algorithm="test_silent", nodes=3, rounds=steps, optimizer=optimizer, data=data)
        ranges = fragments_of(alone.replicas[0].layout, 2, "size")[p]
        own = torch.stack([gather(alone.replicas[node].parameters, ranges) for node in members])
        found = gather(ran.config.algorithm.model(ran.replicas[1]), ranges)
        torch.testing.assert_close(found, own.mean(0), rtol=1e-5, atol=1e-6)


def test_a_joiner_begins_at_the_anchor():
    faults = {"events": [{"kind": "kill", "node": 1, "round": 1, "phase": "post"}]}
    ran = run(
        inner_steps=6, overlap_steps=1, merge_alpha=1.0, rounds=3, faults=faults, network={"start_s": 0.0}, **HALVES
    )
    (transfer,) = ran.sought("transfer")
    assert transfer["node"] == 1
    # With α = 1 what a node trains is its own from where it began: the joiner's is one round from the anchor.
    alone = replica(1, num_nodes=3, algorithm=ran.config.algorithm, name="adamw", lr=0.01)
    assert alone.parameters.shape == ran.replicas[1].parameters.shape
    moved = (ran.replicas[1].parameters - outer_model(ran)).norm()
    assert moved < (ran.replicas[0].parameters - outer_model(ran)).norm()


def test_a_joiner_trains_from_the_anchor_on():
    """At α = 1 a node's model is its own: three steps of 0.1 a round along a gradient of one, from where it began."""
    late = {"events": [{"kind": "late_join", "node": 2, "round": 1}]}
    keys: dict[str, Any] = {"inner_steps": 6, "overlap_steps": 1, "merge_alpha": 1.0, "faults": late, **HALVES, **EXACT}
    keys |= {"task": "test_slope", "optimizer": {"name": "sgd", "lr": 0.1}, "network": {"start_s": 0.0}}
    ran = run(rounds=3, **keys)
    (transfer,) = ran.sought("transfer")
    assert (transfer["node"], transfer["round"]) == (2, 2), "its first round is the run's last"
    anchor = outer_model(run(rounds=2, **keys))
    assert ran.replicas[0].parameters.tolist() == pytest.approx([-3 * 0.3] * 2)
    assert ran.replicas[2].parameters.tolist() == pytest.approx([value - 0.3 for value in anchor.tolist()])
    assert not any(value == pytest.approx(-2 * 0.3) for value in anchor.tolist())


# --- S6: bytes ------------------------------------------------------------------------------------------------------


def test_s6_a_fragment_at_a_time_and_all_of_them_in_a_period():
    task = {"name": "text_lm", "model": {"layers": 6, "width": 32, "heads": 2}, "context": 16, "max_bytes": 100_000}
    keys = {"inner_steps": 3, "overlap_steps": 0, "rounds": 6, "nodes": 2, "task": task}
    ran = run(fragments=3, **keys, **EXACT)
    layout = ran.replicas[0].layout
    sizes = [size_of(one) for one in fragments_of(layout, 3, "strided")]
    sent = [record.payload_bytes for record in ran.rounds]
    assert sent == [all_reduce_bytes(4 * size, 2) for size in sizes] * 2
    assert max(sent) == max(all_reduce_bytes(4 * size, 2) for size in sizes)
    whole = run(fragments=3, staggered=False, **keys | {"rounds": 1}, **EXACT)
    assert sum(sent[:3]) == whole.rounds[0].payload_bytes == 2 * 4 * layout.num_values
    assert ran.planned_bytes(4) == sent[4]


@pytest.mark.parametrize(("back", "times"), [("bf16", 159.5), ("fp4", 393.8)])
def test_times_less_than_data_parallel_in_bf16(back: str, times: float):
    """All bytes of the ledger at H = 100: 4 a value and step in bf16, and 0.508 + 2 or + 0.508 here, with scales."""
    ran = simulate(
        algorithm={"name": "streaming_diloco", "inner_steps": 100, "result_codec": back, **HALVES},
        task={"name": "digits", "model": {"name": "mlp", "width": 4000}},
        nodes=2,
        rounds=2,
        data={"batch_size": 1},
        evaluation={"every_rounds": 0, "max_batches": 1},
    )
    data_parallel = 100 * 2 * 2 * ran.replicas[0].layout.num_values
    assert data_parallel / sum(record.payload_bytes for record in ran.rounds) == pytest.approx(times, abs=0.1)


# --- fragments ------------------------------------------------------------------------------------------------------


def layout(*sizes: tuple[str, int]) -> Layout:
    entries, start = [], 0
    for name, size in sizes:
        block = ".".join(name.split(".")[:2]) if name.startswith("blocks") else ""
        entries.append(LayoutEntry(name, start, start + size, (size,), block))
        start += size
    return Layout(tuple(entries), torch.float32)


SIX = layout(("embedding", 30), *[(f"blocks.{number}.{part}", 5) for number in range(6) for part in "ab"], ("norm", 3))


def test_strided_fragments():
    first, second = fragments_of(SIX, 2, "strided")
    assert first == ((0, 40), (50, 60), (70, 80))  # the embedding, and blocks 0, 2 and 4
    assert second == ((40, 50), (60, 70), (80, 93))


def test_sequential_fragments():
    assert fragments_of(SIX, 2, "sequential") == (((0, 60),), ((60, 93),))
    assert [size_of(one) for one in fragments_of(SIX, 3, "sequential")] == [50, 23, 20]


@pytest.mark.parametrize("pattern", ["strided", "sequential", "size"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_fragments_are_a_partition(count: int, pattern: Any):
    found = fragments_of(SIX, count, pattern)
    values = torch.arange(93.0)
    assert len(found) == count
    assert sorted(torch.cat([gather(values, one) for one in found]).tolist()) == values.tolist()
    again = torch.zeros(93)
    for one in found:
        scatter(gather(values, one), again, one)
    assert torch.equal(again, values)
    if pattern == "size":
        assert max(map(size_of, found)) - min(map(size_of, found)) <= 1


def test_modules():
    assert modules_of(SIX) == ((((0, 30),)), *(((30 + 10 * n, 40 + 10 * n),) for n in range(6)), ((90, 93),))


@pytest.mark.parametrize("pattern", ["strided", "sequential"])
def test_a_model_without_blocks_is_refused(pattern: str):
    algorithm = {"name": "streaming_diloco", "inner_steps": 6, "fragments": 2, "pattern": pattern}
    ran = attempt(algorithm=algorithm, task={"name": "test_toy", "model": "linear"})
    assert isinstance(ran.error, SettingsError)
    assert str(ran.error) == (
        f"algorithm.pattern: {pattern} divides blocks (numbered modules); this model has 0, and algorithm.fragments "
        f"is 2: set algorithm.pattern: size"
    )
    with pytest.raises(SettingsError, match=r"is 7: set algorithm.pattern: size, or take fewer fragments"):
        fragments_of(SIX, 7, "strided")
    with pytest.raises(SettingsError, match="take no more fragments"):
        fragments_of(SIX, 94, "size")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"inner_steps": 100, "fragments": 3}, "inner_steps: 100 is not a multiple of the 3 fragments; take 99 or 102"),
        ({"inner_steps": 12, "overlap_steps": 3}, "overlap_steps: 3 do not fit before the end of a round's 3 steps"),
        ({"merge_alpha": 1.01}, "merge_alpha should be less than or equal to 1"),
        ({"merge_alpha": -0.1}, "merge_alpha should be greater than or equal to 0"),
        ({"codec": "sign"}, "what sign leaves out would never be sent; set error_feedback: true"),
        ({"result_codec": "top_k"}, "result_codec: top_k needs error feedback"),
    ],
)
def test_bad_settings_are_one_line(keys: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        parse({"algorithm": {"name": "streaming_diloco"} | keys, "task": "digits"})
    assert "\n" not in str(caught.value)


# --- the rest -------------------------------------------------------------------------------------------------------


def test_defaults():
    ours = StreamingDiLoCo()
    assert (ours.steps, ours.due(0), ours.due(5)) == (25, (0,), (1,))
    assert (ours.codec, ours.error_feedback) == (FP4(), False)
    assert StreamingDiLoCo(staggered=False).due(3) == (0, 1, 2, 3)


def test_the_model_is_the_outer_one():
    ran = run(inner_steps=6, overlap_steps=1, **HALVES)
    model = outer_model(ran)
    assert all(torch.equal(ran.config.algorithm.model(one), model) for one in ran.replicas.values())
    assert not any(torch.equal(one.parameters, model) for one in ran.replicas.values())


def test_buffers_are_averaged_uncompressed():
    ran = run(task={"name": "test_toy", "model": "batch_norm"}, inner_steps=6, overlap_steps=1, **HALVES)
    assert ran.replicas[0].buffers.any()
    assert all(torch.equal(one.buffers, ran.replicas[0].buffers) for one in ran.replicas.values())


def test_fragments_of_one_round_draw_places_of_their_own():
    """A quarter of each half of 40 values whose gradients are all alike: five places in each, and not alike."""
    codec = {"name": "random_k", "fraction": 0.25}
    keys: dict[str, Any] = {"inner_steps": 2, "overlap_steps": 0, "staggered": False, "codec": codec, **HALVES}
    task, optimizer = {"name": "test_slope", "size": 40}, {"name": "sgd", "lr": 1.0}
    ran = run(task=task, nodes=1, rounds=1, result_codec="identity", optimizer=optimizer, **keys)
    first, second = (outer_model(ran) != 0).view(2, 20)
    assert (int(first.sum()), int(second.sum())) == (5, 5)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("codec", ["sign", {"name": "top_k", "fraction": 0.2}, {"name": "random_k", "unbiased": False}])
def test_error_feedback_loses_nothing(codec: Any):
    """Σ of what arrived + the residual = Σ of what was to be sent: seen at α = 1, where nodes train alone."""
    keys = {"inner_steps": 6, "overlap_steps": 1, "merge_alpha": 1.0, "outer": {"name": "sgd", "lr": 1.0}, **HALVES}
    plain = run(nodes=1, rounds=2, **keys, **EXACT)
    fed = run(nodes=1, rounds=2, **keys, **EXACT | {"codec": codec}, error_feedback=True)
    # Both fragments were sent once: θ − Δ, and θ − C(Δ), which is that plus what is left.
    ranges = fragments_of(plain.replicas[0].layout, 2, "size")
    left = [fed.replicas[0].local[f"residual {p}"] for p in range(2)]
    for p, one in enumerate(ranges):
        expected = gather(outer_model(plain), one) + left[p]
        torch.testing.assert_close(gather(outer_model(fed), one), expected, rtol=1e-5, atol=1e-6)
        assert left[p].any()  # type: ignore[union-attr]


def test_a_residual_survives_the_loss_of_another_node():
    faults = {"events": [{"kind": "kill", "node": 2, "round": 3, "phase": "train"}]}
    keys = {"inner_steps": 6, "codec": "sign", "error_feedback": True, "merge_alpha": 1.0, **HALVES}
    whole = run(rounds=4, **keys)
    hurt = run(rounds=4, faults=faults, network={"start_s": 0.0}, **keys)
    for key in ("residual 0", "residual 1"):
        # Round 3 exchanges fragment 1: of the other fragment node 0 has what it had, and nothing is in it of node 2.
        assert torch.equal(hurt.replicas[0].local[key], whole.replicas[0].local[key])  # type: ignore[arg-type]
    assert sum(len(one.local) for one in hurt.replicas.values()) >= 4


FED = {"inner_steps": 6, "codec": "sign", "error_feedback": True, "merge_alpha": 1.0, **HALVES}


def fault(kind: str, number: int, phase: str = "train") -> dict[str, Any]:
    return {"kind": kind, "node": 2, "round": number, "phase": phase}


@pytest.mark.parametrize("phase", ["train", "post", "commit"])
def test_a_residual_that_is_lost_with_its_node_is_accounted(phase: str):
    hurt = run(rounds=4, faults={"events": [fault("kill", 2, phase)]}, network={"start_s": 0.0}, **FED)
    # What node 2 had committed last: of round 1, or where it dies after the commit of round 2 of that.
    calm = run(rounds=3 if phase == "commit" else 2, **FED)
    norm = calm.replicas[2].spec.algorithm.unsent(calm.replicas[2])
    assert norm == pytest.approx(math.hypot(*(float(calm.replicas[2].local[f"residual {p}"].norm()) for p in (0, 1))))  # type: ignore[union-attr]
    assert norm > 0
    assert hurt.summary.lost == {"residuals": 1, "residual_norm": pytest.approx(norm)}
    (told,) = hurt.sought("residual_lost")
    assert (told["node"], told["norm"]) == (2, pytest.approx(norm))
    per_round = [record.residuals_lost for record in hurt.rounds]
    assert sum(one or 0 for one in per_round) == 1
    assert None not in per_round
    assert max(record.residual_norm_lost or 0 for record in hurt.rounds) == pytest.approx(norm)


def test_a_node_that_leaves_on_notice_hands_its_residual_over():
    calm = run(rounds=4, **FED)
    left = run(rounds=4, faults={"events": [fault("preempt", 1)]}, network={"start_s": 0.0}, **FED)
    assert left.summary.nodes["drained"] == 1
    assert left.summary.lost == {"residuals": 0, "residual_norm": 0.0}
    assert left.replicas[2].incarnation == 1
    for key in ("residual 0", "residual 1"):
        assert torch.equal(left.replicas[2].local[key], calm.replicas[2].local[key])  # type: ignore[arg-type]


def test_what_was_handed_over_is_kept_until_the_successor_has_committed():
    """It dies before: the next one is given the same, and nothing is lost."""
    events = [fault("preempt", 1), fault("kill", 2)]
    ran = run(rounds=5, faults={"events": events}, network={"start_s": 0.0}, **FED)
    assert (ran.summary.nodes["drained"], ran.summary.nodes["lost"]) == (1, 1)
    assert ran.summary.lost["residuals"] == 0


def test_without_feedback_there_is_nothing_to_lose():
    ran = run(rounds=3, faults={"events": [fault("kill", 1)]}, network={"start_s": 0.0}, inner_steps=6, **HALVES)
    assert ran.summary.lost == {"residuals": 0, "residual_norm": 0.0}
    assert {record.residuals_lost for record in ran.rounds} == {None}


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_outer_state_is_on_the_cpu_wherever_the_node_computes(device: str):
    """Driven by hand: two nodes, the exchange started, two steps, and what comes back."""
    algorithm = {"name": "streaming_diloco", "inner_steps": 8, "overlap_steps": 2} | HALVES
    config = parse({"algorithm": algorithm, "task": {"name": "digits", "model": "cnn"}})
    data = load_data(config.task, config.data, 2, 0)
    times = Times()
    host = Host(build_replicas((0, 1), config.replica_spec(), data, [torch.device(device, 0)] * 2, times), times)
    host.init()
    for number in range(4):
        host.begin(RoundOrder(0, number, View(0, (0, 1)), number - 1), (0, 1))
        inline: list[list[Contributed]] = []
        tickets = dict(host.drive([(0, None), (1, None)]))
        while not isinstance(tickets[0], Returned):
            ticket = tickets[0]
            if isinstance(ticket, Posted):
                posted = {node: one for node, one in tickets.items() if isinstance(one, Posted)}
                inline.append(
                    [
                        Contributed(node, one.weight, one.specs, one.inline)
                        for node, one in posted.items()
                        if one.specs is not None and one.inline is not None
                    ]
                )
                if not ticket.waits:
                    tickets = dict(host.drive([(0, None), (1, None)]))
                    continue
            assert isinstance(ticket, Posted | Waiting)
            host.exchanges.conclude_inline(0, ticket.seq, inline[ticket.seq])
            host.exchanges.release(ticket.seq)
            tickets = dict(host.drive([(node, host.exchanges.take(node, ticket.seq)) for node in (0, 1)]))
        assert isinstance(tickets[1], Returned)
        assert tickets[0].digest == tickets[1].digest
    host.settle({0: 3, 1: 3})
    one, other = host.replicas.values()
    assert one.parameters.device.type == device
    assert all(fragment["anchor"].device.type == "cpu" for fragment in known(one))
    assert torch.equal(config.algorithm.model(one), config.algorithm.model(other))
    assert config.algorithm.model(one).device.type == device


def test_identity_is_a_codec_like_any_other():
    assert Identity().at(3) == Identity()
    assert not Identity().needs_feedback
