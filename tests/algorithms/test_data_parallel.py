"""Data-parallel training, local SGD and PowerSGD, exactly."""

from __future__ import annotations

import itertools
import math
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from starling.algorithms.api import Gradient, Node, Train, all_reduce_bytes
from starling.algorithms.compressors.powersgd import PowerSGD
from starling.algorithms.layout import Layout, LayoutEntry
from starling.algorithms.low_communication.ddp import DDP
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError
from tests.toys import Ran, Toy, attempt, begin, replica, simulate

DIGITS = {"name": "digits", "model": {"name": "mlp", "width": 40}}


def run(*, nodes: int = 3, rounds: int = 4, task: Any = "test_toy", optimizer: Any = None, **keys: Any) -> Ran:
    others = {key: keys.pop(key) for key in ("faults", "network", "on_nan", "cluster") if key in keys}
    return simulate(
        algorithm={"name": "ddp"} | keys,
        task=task,
        nodes=nodes,
        rounds=rounds,
        optimizer={"name": "adamw", "lr": 0.01} | (optimizer or {}),
        data={"batch_size": 4},
        evaluation={"every_rounds": 0},
        **others,
    )


# --- data-parallel --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [{"name": "sgd", "lr": 0.2}, {"name": "adamw", "lr": 0.01, "grad_clip": 0.05}])
def test_steps_are_those_of_the_concatenated_batch(optimizer: dict[str, Any]):
    task, nodes = Toy(), 4
    ran = run(nodes=nodes, rounds=6, optimizer=optimizer | {"precision": "fp64"})
    together = replica(task=task, precision="fp64")
    module: Any = together.trainer.module
    samplers = [replica(node, task=task, num_nodes=nodes).data.own("test") for node in range(nodes)]
    samples = task.train_samples(nodes)
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    inner = kinds[optimizer["name"]](module.parameters(), lr=optimizer["lr"])
    for _ in range(6):
        inner.zero_grad()
        indices = torch.cat([sampler.next(4) for sampler in samplers])
        task.loss(module, tuple(one.double() for one in samples.batch(indices))).backward()
        if "grad_clip" in optimizer:
            torch.nn.utils.clip_grad_norm_(module.parameters(), optimizer["grad_clip"])
        inner.step()
    torch.testing.assert_close(ran.parameters, together.parameters, rtol=1e-11, atol=1e-12)
    assert all(torch.equal(one.parameters, ran.parameters) for one in ran.replicas.values())


def test_alone_it_is_plain_training_with_its_schedule():
    optimizer = {"schedule": {"name": "cosine", "warmup_steps": 3}}
    ran = run(nodes=1, rounds=5, inner_steps=4, optimizer=optimizer)
    alone = replica(name="adamw", lr=0.01, batch_size=4, algorithm=ran.config.algorithm, rounds=5, **optimizer)
    begin(alone)
    alone.trainer.train(Train(steps=20), threading.Event())
    assert torch.equal(ran.parameters, alone.parameters)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("codec", ["identity", "fp4", "qsgd", {"name": "random_k", "fraction": 0.1}])
def test_rounds_are_only_a_grouping(codec: Any, both: bool):
    """Also of the numbers that a codec draws: the same ones in step 5, whatever round that is in."""
    keys: dict[str, Any] = {"codec": codec} | ({"result_codec": codec} if both else {})
    one, other = run(rounds=6, inner_steps=1, **keys), run(rounds=2, inner_steps=3, **keys)
    assert torch.equal(one.parameters, other.parameters)
    assert sum(record.payload_bytes for record in one.rounds) == sum(record.payload_bytes for record in other.rounds)


def test_each_step_draws_places_of_its_own():
    """8 steps at a tenth of 83 places: more than the 9 places of one draw, in one round as in eight."""
    moved = []
    for steps in (1, 8):
        keys: dict[str, Any] = {"optimizer": {"name": "sgd", "lr": 0.1}, "inner_steps": steps, "rounds": 8 // steps}
        ran = run(codec={"name": "random_k", "fraction": 0.1}, **keys)
        moved.append(int((ran.parameters != replica().parameters).sum()))
    assert ran.parameters.numel() == 83
    assert moved[0] == moved[1] > 3 * 9


class Swerve(DDP, name="test_swerve"):
    """In round 2 node 1 leaves the others behind."""

    async def steps_together(self, node: Node, steps: int) -> None:
        await super().steps_together(node, steps)
        if node.round == 2 and node.id == 1:
            node.parameters.add_(1e-3)


def test_replicas_that_part_are_noticed_in_that_round():
    """The model is shared state: commits compare it as it is at the round's end, and a joiner is given that."""
    ran = attempt(algorithm="test_swerve", nodes=3, rounds=5)
    (diverged,) = ran.sought("diverged")
    assert (diverged["round"], diverged["groups"]) == (2, ((0, 2), (1,)))


def test_the_loss_is_told():
    ran = run(rounds=2, inner_steps=3)
    assert all(record.loss is not None and math.isfinite(record.loss) for record in ran.rounds)


@pytest.mark.parametrize("phase", ["train", "post", "commit"])
def test_replicas_stay_the_same_when_one_is_replaced(phase: str):
    """Adam's moments too: a joiner has none, so that all begin anew."""
    faults = {"events": [{"kind": "kill", "node": 1, "round": 3, "phase": phase}]}
    ran = run(rounds=8, faults=faults, network={"start_s": 0.015})
    assert ran.summary is not None
    assert ran.summary.nodes["lost"] == 1
    assert ran.sought("transfer")
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1


def test_replicas_stay_the_same_when_a_loss_is_nan():
    ran = run(task={"name": "test_toy", "poison": 7}, rounds=12, on_nan="skip")
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1
    assert ran.parameters.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "codec", ["sign", {"name": "top_k", "fraction": 0.1}, {"name": "qsgd", "block_size": 64}, "fp4"]
)
def test_it_learns_through_codecs(codec: Any):
    feedback = "qsgd" not in str(codec)
    ran = run(task=DIGITS, rounds=140, codec=codec, error_feedback=feedback, optimizer={"name": "sgd", "lr": 0.3})
    assert ran.summary is not None
    assert ran.summary.metrics["accuracy"] > 0.8


def test_what_a_codec_leaves_out_is_what_is_left():
    """x_T = x_0 − η (Σ g − e_T) with plain steps: nothing is lost and nothing invented."""
    keys: dict[str, Any] = {"nodes": 1, "rounds": 5, "optimizer": {"name": "sgd", "lr": 0.5}}
    keys |= {"codec": {"name": "top_k", "fraction": 0.1}, "error_feedback": True}
    fed = run(**keys)
    # Gradients at the points where the run was, one after another.
    again = replica(batch_size=4, algorithm=fed.config.algorithm)
    points = [again.parameters.clone()]
    points += [run(**keys | {"rounds": rounds}).parameters for rounds in range(1, 5)]
    begin(again)
    total = torch.zeros_like(again.parameters)
    for point in points:
        total += again.trainer.gradient(Gradient(at=point)).gradient
    residual = fed.replicas[0].local["residual"]
    assert isinstance(residual, Tensor)
    torch.testing.assert_close(fed.parameters, points[0] - 0.5 * (total - residual), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ddp", "local_sgd"])
def test_bytes_of_codecs_in_either_direction(name: str):
    """75 010 values on three nodes: (N - 1)(b_in + b_out), and with data-parallel training that in each step."""
    values = 75 * 1000 + 10
    sizes = {"bf16": 2 * values, "int8": values + 4 * -(-values // 256)}
    for codec, result_codec in (("int8", "bf16"), ("bf16", "int8")):
        ran = simulate(
            algorithm={"name": name, "inner_steps": 3, "codec": codec, "result_codec": result_codec},
            task={"name": "digits", "model": {"name": "mlp", "width": 1000}},
            data={"batch_size": 1},
            nodes=3,
            rounds=1,
            evaluation={"every_rounds": 0, "max_batches": 1},
        )
        exchange = 2 * (sizes[codec] + sizes[result_codec])
        assert ran.rounds[0].payload_bytes == ran.expected_bytes == (3 if name == "ddp" else 1) * exchange


# --- local SGD ------------------------------------------------------------------------------------------------------


def test_local_sgd_of_one_plain_step_is_data_parallel():
    sgd = {"name": "sgd", "lr": 0.1, "precision": "fp64"}
    keys: Any = {"task": "test_toy", "nodes": 3, "rounds": 5, "optimizer": sgd, "data": {"batch_size": 4}}
    local = simulate(algorithm={"name": "local_sgd", "inner_steps": 1}, **keys)
    parallel = simulate(algorithm="ddp", **keys)
    torch.testing.assert_close(local.parameters, parallel.parameters, rtol=1e-12, atol=1e-12)


def test_local_sgd_is_diloco_with_plain_averaging():
    keys: Any = {"task": {"name": "test_toy", "model": "batch_norm"}, "nodes": 3, "rounds": 4}
    local = simulate(algorithm={"name": "local_sgd", "inner_steps": 5}, **keys)
    outer = {"name": "sgd", "lr": 1.0}
    diloco = simulate(algorithm={"name": "diloco", "inner_steps": 5, "outer": outer}, **keys)
    assert local.digest == diloco.digest


@pytest.mark.parametrize("nodes", [1, 2])
def test_local_sgd_sends_later_what_was_left_out(nodes: int):
    """EF-SGD by hand: c = Δ + e, the 11 largest of 108 values arrive, e = c - what arrived. Δ is -2 G in each round."""
    ran = simulate(
        algorithm={
            "name": "local_sgd",
            "inner_steps": 2,
            "codec": {"name": "top_k", "fraction": 0.1},
            "error_feedback": True,
        },
        task={"name": "test_planes", "rank": 3},
        nodes=nodes,
        rounds=6,
        optimizer={"name": "sgd", "lr": 1.0},
        data={"batch_size": 1},
        evaluation={"every_rounds": 0},
    )
    model, left = torch.zeros(108), torch.zeros(108)
    for _ in range(6):
        whole = left - 2 * low_rank(3).flatten()
        sent = torch.zeros(108)
        places = whole.abs().topk(11).indices
        sent[places] = whole[places]
        model, left = model - sent, whole - sent
    torch.testing.assert_close(ran.parameters, model, rtol=1e-5, atol=1e-5)


# --- PowerSGD -------------------------------------------------------------------------------------------------------


def test_a_matrix_of_low_rank_is_recovered_after_one_step():
    """Of f(x) = tr(GᵀX) the gradient is G whatever X is: rank 2 here, and a first guess that is random."""
    exact = compressed(rank=2, of=2, nodes=1, rounds=1)
    torch.testing.assert_close(exact.parameters, expected(2, 1), rtol=1e-5, atol=1e-5)
    coarse = compressed(rank=1, of=2, nodes=1, rounds=1)
    assert (coarse.parameters - expected(2, 1)).norm() > 0.1


def test_what_is_left_out_is_sent_later():
    """Σ of what arrived + mean e = Σ of gradients, for each rank; and after some rounds little is left."""
    for nodes in (1, 3):
        ran = compressed(rank=1, of=3, nodes=nodes, rounds=6)
        left = torch.stack([one.local["powersgd"] for one in ran.replicas.values()]).mean(0)  # type: ignore[arg-type]
        torch.testing.assert_close(ran.parameters - left, expected(3, 6), rtol=1e-5, atol=1e-4)


def test_it_compresses_the_mean():
    """Nodes whose gradients differ, by their place: the result is that of one node with the mean of them."""
    many, one = compressed(rank=2, of=4, nodes=4, rounds=3, apart=1.0), compressed(rank=2, of=4, nodes=1, rounds=3)
    torch.testing.assert_close(many.parameters, one.parameters, rtol=1e-4, atol=1e-4)


def test_powersgd_goes_on_from_the_last_factors_and_errors():
    """Three times on two matrices of the same form and a bias: Algorithm 1 in numpy, on one node."""
    shapes = ((4, 3), (4, 3), (2,))
    stops = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    entries = [
        LayoutEntry(str(place), stop - math.prod(shape), stop, shape, "")
        for place, (shape, stop) in enumerate(zip(shapes, stops, strict=True))
    ]
    layout = Layout(tuple(entries), torch.float64)
    node: Any = SimpleNamespace(layout=layout, parameters=torch.zeros(26).double(), local={}, shared={})
    algorithm = PowerSGD(rank=1)
    algorithm.init(node)
    q = node.shared["powersgd"].numpy().reshape(2, 3, 1).copy()
    assert not np.allclose(q[0], q[1]), "each matrix begins with a Q of its own"
    error = np.zeros((2, 4, 3))
    for number in range(3):
        gradient = torch.randn(26, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        whole = gradient[:24].numpy().reshape(2, 4, 3) + error
        p = np.stack([np.linalg.qr(m @ one)[0] for m, one in zip(whole, q, strict=True)])
        q = whole.transpose(0, 2, 1) @ p
        expected = p @ q.transpose(0, 2, 1)
        error = whole - expected
        program: Any = algorithm.all_reduce(node, gradient)
        answer: Any = None
        with pytest.raises(StopIteration) as ended:
            while True:
                reduction = program.send(answer)
                answer = SimpleNamespace(value=reduction.tensors, members=(0,), weight=1.0)
        found = ended.value.value.value
        np.testing.assert_allclose(found[:24].numpy(), expected.ravel(), rtol=0, atol=1e-12)
        assert torch.equal(found[24:], gradient[24:])
        np.testing.assert_allclose(node.local["powersgd"][:24].numpy(), error.ravel(), rtol=0, atol=1e-12)


def test_bytes_of_powersgd():
    ran = run(task={"name": "digits", "model": {"name": "mlp", "width": 600}}, compressor="powersgd", rounds=2)
    layout = ran.replicas[0].layout
    shapes = [entry.shape for entry in layout.entries]
    assert shapes == [(600, 64), (600,), (10, 600), (10,)]
    left = 4 * (4 * (600 + 10) + 600 + 10)
    right = 4 * 4 * (64 + 600)
    assert ran.expected_bytes == all_reduce_bytes(left, 3) + all_reduce_bytes(right, 3)
    assert [record.payload_bytes for record in ran.rounds] == [ran.expected_bytes] * 2
    assert ran.expected_bytes < DDP().expected_bytes(layout, 3) / 5


def test_small_matrices_are_sent_whole():
    assert PowerSGD(rank=4).matrices(replica().layout) == []
    ran, plain = run(compressor={"name": "powersgd", "rank": 4}), run()
    assert torch.equal(ran.parameters, plain.parameters)


def test_powersgd_learns_and_survives_a_loss():
    faults = {"events": [{"kind": "kill", "node": 1, "round": 20, "phase": "post"}]}
    ran = run(
        task=DIGITS,
        rounds=100,
        compressor={"name": "powersgd", "rank": 2},
        faults=faults,
        network={"start_s": 0.05},
        optimizer={"name": "sgd", "lr": 0.3},
    )
    assert ran.summary is not None
    assert ran.summary.metrics["accuracy"] > 0.8
    assert ran.summary.lost["residuals"] == 1
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1


@pytest.mark.parametrize("codec", ["qsgd", "random_k"])
def test_errors_that_would_grow_are_not_fed_back(codec: str):
    with pytest.raises(ConfigError, match=f"error_feedback: the errors of {codec} cancel"):
        parse({"algorithm": {"name": "ddp", "codec": codec, "error_feedback": True}, "task": "digits"})


def test_two_ways_to_compress_are_refused():
    with pytest.raises(ConfigError, match="compressor: powersgd sends in its own form; leave the codecs at identity"):
        parse({"algorithm": {"name": "ddp", "compressor": "powersgd", "codec": "int8"}, "task": "digits"})


# A matrix whose gradient is constant: f(X) = −tr(GᵀX), G of shape (12, 9) and given rank; node k adds its own part.


def low_rank(rank: int) -> Tensor:
    rng = torch.Generator().manual_seed(rank)
    return torch.randn(12, rank, generator=rng) @ torch.randn(rank, 9, generator=rng) / rank**0.5


def expected(rank: int, steps: int) -> Tensor:
    return low_rank(rank).flatten() * steps


class Planes(Toy, name="test_planes"):
    rank: int = 1
    apart: float = 0.0

    def train_samples(self, num_nodes: int) -> Any:
        from starling.actors.tasks import TensorSamples

        rng = torch.Generator().manual_seed(0)
        own = self.apart * torch.randn(num_nodes, 12, 9, generator=rng)
        own -= own.mean(0)
        return TensorSamples(low_rank(self.rank) + own)

    validation_samples = train_samples

    def build(self) -> Any:
        module = torch.nn.Linear(9, 12, bias=False)
        torch.nn.init.zeros_(module.weight)
        return module

    def loss(self, module: torch.nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return -(batch[0] * next(module.parameters())).sum() / len(batch[0])


def compressed(*, rank: int, of: int, nodes: int, rounds: int, apart: float = 0.0) -> Ran:
    return simulate(
        algorithm={"name": "ddp", "compressor": {"name": "powersgd", "rank": rank}},
        task={"name": "test_planes", "rank": of, "apart": apart},
        nodes=nodes,
        rounds=rounds,
        optimizer={"name": "sgd", "lr": 1.0},
        data={"batch_size": 1},
        evaluation={"every_rounds": 0},
    )
