"""Just One Byte and MeZO, exactly: Z1 to Z7, Z9 and Z10 of their specification; Z8, the codes, is elsewhere."""

from __future__ import annotations

import hashlib
import math
import struct
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import Tensor, nn

from starling import simulate as run_simulation
from starling.actors.tasks import Task, TensorSamples
from starling.actors.tasks.logistic import Logistic
from starling.actors.tasks.quadratic import Quadratic
from starling.actors.training.gradients import Gradients
from starling.actors.training.node_optimizer import NodeOptimizer
from starling.algorithms.api import Node
from starling.algorithms.layout import Layout, LayoutEntry
from starling.algorithms.noise import fill
from starling.algorithms.seeds import derive_seed
from starling.algorithms.zeroth_order import records, steps
from starling.algorithms.zeroth_order.just_one_byte import JustOneByte
from starling.algorithms.zeroth_order.mezo import MeZO
from starling.algorithms.zeroth_order.steps import Moved, PerturbationStep
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records.rebuild import rebuild
from starling.orchestrator.records.round_log import NAME, Sealed, read
from tests.membership import scripted
from tests.toys import Ran, attempt, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from starling.actors.replica.replica import Replica

TABLE = f"{__name__}:Table"
SAME: dict[str, Any] = {"name": "quadratic", "dimension": 12, "heterogeneity": 0.0}  # all nodes' samples are alike
FP64: dict[str, Any] = {"precision": "fp64"}


def spsa(nodes: int = 1, name: str = "just_one_byte", task: Any = SAME, rounds: int = 5, **keys: Any) -> Ran:
    others = {key: keys.pop(key) for key in ("data", "on_nan", "optimizer", "seed", "evaluation") if key in keys}
    algorithm = {"name": name, "lr": 0.05} | keys
    return simulate(
        {"evaluation": {"every_rounds": 0}} | others, nodes=nodes, algorithm=algorithm, task=task, rounds=rounds
    )


def direction(round_: int, number: int, size: int, seed: int = 0, distribution: Any = "gaussian") -> Tensor:
    key = derive_seed("direction", seed, round_, number)
    return fill(torch.empty(size, dtype=torch.float64), distribution, key)


# --- the update -----------------------------------------------------------------------------------------------------


OPTIONS: list[dict[str, Any]] = [
    {},
    {"distribution": "rademacher", "samples": 3},
    {"one_sided": True, "samples": 2},
    {"normalizer": "sqrt", "samples": 2},
    {"clip": 0.3},
    {"eps": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_definition(options: dict[str, Any]):
    """Against an implementation of ten lines, with whole directions and the exact gradients of quadratics (Z6)."""
    nodes, rounds, lr = 3, 4, 0.05
    task = Quadratic(dimension=7, samples_per_node=1)
    raw = {"name": "quadratic", "dimension": 7, "samples_per_node": 1}
    ran = spsa(nodes, task=raw, rounds=rounds, code="fp32", optimizer=FP64, **options)
    one = JustOneByte.model_validate({"lr": lr} | options)
    theta = torch.zeros(7, dtype=torch.float64)
    for number in range(rounds):
        total, count = torch.zeros_like(theta), 0
        for node in range(nodes):
            gradient = task.curvature(node) @ (theta - task.center(node))
            for sample in range(one.samples):
                z = direction(number, node * one.samples + sample, 7, distribution=one.distribution)
                estimate = z @ gradient
                if one.one_sided:
                    estimate = estimate + one.eps / 2 * (z @ task.curvature(node) @ z)
                if one.clip:
                    estimate = estimate.clamp(-one.clip, one.clip)
                total += estimate.float().double() * z
                count += 1
        theta = theta - lr / (count if one.normalizer == "mean" else math.sqrt(count)) * total
    # The estimates are rounded to float32: its last bit is all that may differ.
    torch.testing.assert_close(ran.parameters, theta, rtol=0, atol=1e-6)
    assert theta.norm() > 0.03


SEEN: list[float] = []


class Watching(JustOneByte):
    """Shows its estimates before they are coded."""

    async def _estimates(self, node: Node) -> list[float]:
        estimates = await super()._estimates(node)
        SEEN.extend(estimates)
        return estimates


@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_a_projected_gradient_of_a_quadratic_is_exact_for_any_distance(eps: float):
    """Z6: ĝ = zᵀ(Aθ − b) to 1e-10. The estimate is looked at before it is coded."""
    SEEN.clear()
    task = Quadratic(dimension=9, samples_per_node=1)
    raw = {"name": "quadratic", "dimension": 9, "samples_per_node": 1}
    spsa(name=f"{__name__}:Watching", task=raw, rounds=1, eps=eps, optimizer=FP64)
    exact = direction(0, 0, 9) @ (task.curvature(0) @ -task.center(0))
    assert [pytest.approx(float(exact), abs=1e-10)] == SEEN


def test_weight_decay_leaves_vectors_out():
    """θ ← (1 − ηλ) θ − η ĝ z on matrices; without λ on biases."""
    keys: Any = {"name": "test_toy", "model": "linear"}
    plain = spsa(task=keys, rounds=1, lr=0.1).parameters
    decayed = spsa(task=keys, rounds=1, lr=0.1, weight_decay=0.5).parameters
    initial = spsa(task=keys, rounds=1, lr=1e-30).parameters
    difference = plain - decayed
    torch.testing.assert_close(difference[:18], 0.05 * initial[:18], rtol=0, atol=1e-6)  # the weight, 3 × 6
    assert torch.equal(plain[18:], decayed[18:])


def test_layers_have_estimates_of_their_own():
    """With two layers: two bytes, each from losses at which the other layer is where it was."""
    layers = (("a.weight", 0, 4), ("a.bias", 4, 6), ("b.weight", 6, 9), ("top", 9, 10))
    layout = Layout(
        tuple(LayoutEntry(name, start, stop, (stop - start,), "") for name, start, stop in layers), torch.float32
    )
    assert JustOneByte(layerwise=True)._spans(layout) == [(0, 6), (6, 9), (9, 10)]
    assert JustOneByte()._spans(layout) == [(0, 10)]
    ran = spsa(2, task={"name": "test_toy", "model": "mlp"}, rounds=2, samples=3, layerwise=True)
    assert [record.payload_bytes for record in ran.rounds] == [2 * 3 * 2] * 2 == [ran.expected_bytes] * 2
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1
    # On a sum of functions of one layer each, an estimate for each layer is that layer's own.
    whole = spsa(task={"name": "test_toy", "model": "linear"}, rounds=2)
    layered = spsa(task={"name": "test_toy", "model": "linear"}, rounds=2, layerwise=True)
    assert torch.equal(whole.parameters, layered.parameters), "one layer is all there is"


class TwoBowls(Task):
    """½‖θ‖² of two layers, 3 and 4 values, which begin at 1 and 2."""

    def train_samples(self, num_nodes: int) -> TensorSamples:
        return TensorSamples(torch.zeros(4 * num_nodes, 1))

    validation_samples = train_samples

    def build(self) -> nn.Module:
        module = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(4, 1, bias=False))
        for number, one in enumerate(module.parameters(), start=1):
            nn.init.constant_(one, number)
        return module

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return sum((one.square().sum() / 2 for one in module.parameters()), torch.zeros(()))


@pytest.mark.parametrize("perturb", ["copy", "on_use"])
def test_an_estimate_of_a_layer_moves_that_layer_alone(perturb: str):
    """Along its own values of the whole direction: θ_l ← θ_l − η (z_lᵀθ_l) z_l."""
    task = {"name": f"{__name__}:TwoBowls"}
    ran = spsa(task=task, rounds=2, layerwise=True, code="fp32", perturb=perturb, optimizer=FP64)
    theta = torch.tensor([1.0] * 3 + [2.0] * 4, dtype=torch.float64)
    for number in range(2):
        z = direction(number, 0, 7)
        for layer in (slice(0, 3), slice(3, 7)):
            theta[layer] -= 0.05 * (z[layer] @ theta[layer]) * z[layer]
    torch.testing.assert_close(ran.parameters, theta, rtol=0, atol=1e-6)


def test_a_digest_is_that_of_the_step_taken_whole():
    """It is made piece by piece, and each piece must have its own part of a direction."""
    size, rng = steps._AT_ONCE + 40, torch.Generator().manual_seed(0)
    parameters = torch.randn(size, generator=rng)
    moved = [Moved(0, 100, [(3, 0.5)]), Moved(100, size, [(4, -0.25)])]
    step = PerturbationStep(moved, [(steps._AT_ONCE - 10, size)], 0.5, "rademacher")
    digest = step.digest(parameters)
    step.apply(parameters)
    assert digest == hashlib.sha256(parameters.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(("size", "rate"), [(10, 0.05), (4000, 0.05), (10_000, 0.02), (50_000, 0.004)])
def test_a_rate_that_is_not_given_fits_the_model(size: int, rate: float):
    """η = 200 / P, at most 0.05; where c is a root, by the root of all directions less."""
    layout = Layout((LayoutEntry("weight", 0, size, (size,), ""),), torch.float32)
    assert JustOneByte().rate(layout, 9) == pytest.approx(rate)
    assert JustOneByte(normalizer="sqrt", samples=4).rate(layout, 9) == pytest.approx(rate / 6)
    assert JustOneByte(lr=0.3, normalizer="sqrt").rate(layout, 9) == 0.3
    for kind in (JustOneByte, MeZO):
        huge = Layout((LayoutEntry("weight", 0, 10**9, (10**9,), ""),), torch.float32)
        assert kind().rate(huge, 9) == kind.least_lr < 1e-2


def test_a_run_is_rebuilt_with_the_rates_that_it_had(tmp_path: Path):
    """With c the root of how many there are, a rate depends on who was there: the log has it."""
    algorithm = {"name": "just_one_byte", "normalizer": "sqrt", "verify_every": 2}
    raw = {"algorithm": algorithm, "task": SAME, "rounds": 4, "tracking": "none"}
    ran = run_simulation(raw | {"cluster": {"nodes": {"target": 3}}}, run_dir=tmp_path / "run")
    assert rebuild(tmp_path / "run").digest == ran.digest


def test_a_record_is_rate_distance_count_codes_and_a_digest():
    codes = {0: torch.tensor([7, 8], dtype=torch.uint8), 3: torch.tensor([9, 255], dtype=torch.uint8)}
    record = records.pack(0.25, 0.5, codes, "ab" * 32)
    by_hand = struct.pack("<ddHi2Bi2B", 0.25, 0.5, 2, 0, 7, 8, 3, 9, 255) + b"\xab" * 32
    assert record == by_hand
    found = records.unpack(record, 2, with_digest=True)
    assert found is not None
    assert (found.lr, found.eps, found.digest) == (0.25, 0.5, "ab" * 32)
    assert {member: one.tolist() for member, one in found.codes.items()} == {0: [7, 8], 3: [9, 255]}
    for wrong in (b"", record[:-1], record + b"\0", record[:-32]):
        assert records.unpack(wrong, 2, with_digest=True) is None
    assert records.unpack(record, 2, with_digest=False) is None
    assert records.unpack(record, 3, with_digest=True) is None


# --- replicas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_replicas_are_equal_to_the_last_bit(nodes: int):
    """Z1."""
    task = {"name": "digits", "model": {"name": "mlp", "width": 16}}
    ran = spsa(nodes, task=task, rounds=6, verify_every=2, code={"name": "log8", "rounding": "stochastic"})
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1
    assert len({one.shared.digest() for one in ran.replicas.values()}) == 1
    assert "parameters" in ran.replicas[0].shared


def test_the_model_is_never_perturbed_but_for_a_probe():
    """After 100 rounds without a step the parameters are what they were: nothing is left of 200 probes."""
    ran = spsa(task={"name": "test_toy", "model": "mlp"}, rounds=100, lr=1e-30, samples=1)
    assert torch.equal(ran.parameters, spsa(task={"name": "test_toy", "model": "mlp"}, rounds=1, lr=1e-30).parameters)


@pytest.mark.parametrize(("nodes", "samples"), [(2, 3), (3, 2), (6, 1)])
@pytest.mark.parametrize("code", ["log8", "fp16"])
def test_n_nodes_with_k_samples_are_one_node_with_n_times_k(nodes: int, samples: int, code: str):
    """Z5."""
    alone = spsa(1, samples=6, code=code)
    many = spsa(nodes, samples=samples, code=code)
    assert many.digest == alone.digest
    assert torch.equal(many.parameters, alone.parameters)


def test_seeds_are_of_run_round_node_and_sample():
    def first(**keys: Any) -> Tensor:
        return spsa(rounds=1, **keys).parameters

    assert not torch.equal(first(), first(seed=1))
    assert not torch.equal(spsa(rounds=2).parameters - first(), first())


def members(watch: dict[int, dict[int, Tensor]]) -> Callable[[int, Mapping[int, Replica]], None]:
    def look(number: int, replicas: Mapping[int, Replica]) -> None:
        watch[number] = {node: one.parameters.clone() for node, one in replicas.items()}

    return look


def changing(views: Sequence[tuple[int, ...]], **keys: Any) -> dict[int, dict[int, Tensor]]:
    seen: dict[int, dict[int, Tensor]] = {}
    task = {"name": "test_toy", "model": "mlp"}
    scripted(views, members(seen), algorithm={"name": "just_one_byte", "samples": 2, "lr": 0.05} | keys, task=task)
    return seen


def test_a_joiner_ends_with_the_founders_bits():
    """Z3."""
    seen = changing([(0, 1)] * 3 + [(0, 1, 2)] * 4)
    last = seen[6]
    assert torch.equal(last[0], last[1])
    assert torch.equal(last[0], last[2])


def test_who_leaves_is_missing_and_nothing_else():
    """Z4: what remains is equal, and equal to a run in which node 2 never sent after round 2."""
    seen = changing([(0, 1, 2)] * 3 + [(0, 1)] * 4)
    longer = changing([(0, 1, 2)] * 3 + [(0, 1)] * 2 + [(0, 1)] * 2 + [(0, 1, 2)] * 2)
    assert torch.equal(seen[6][0], seen[6][1])
    assert torch.equal(seen[6][0], longer[6][0])
    assert not torch.equal(seen[6][0], changing([(0, 1, 2)] * 7)[6][0])


def test_flapping_members_stay_equal():
    views = [(0, 1, 2), (0, 2), (0, 1, 2), (0, 1), (0, 1, 2), (1, 2), (0, 1, 2)]
    last = changing(views)[6]
    assert torch.equal(last[0], last[1])
    assert torch.equal(last[0], last[2])
    assert all(torch.equal(last[0], one) for one in changing(views, perturb="on_use")[6].values())


@pytest.mark.parametrize("perturb", ["copy", "on_use"])
@pytest.mark.parametrize("phase", ["train", "post", "commit"])
def test_a_crash_costs_what_the_lost_node_would_have_sent(phase: str, perturb: str):
    faults = {"events": [{"kind": "kill", "node": 2, "round": 2, "phase": phase}]}
    cluster = {"nodes": {"target": 3}}
    task = {"name": "test_toy", "model": "mlp"}
    algorithm = {"name": "just_one_byte", "perturb": perturb}
    ran = simulate(algorithm=algorithm, task=task, rounds=6, nodes=3, faults=faults, cluster=cluster)
    assert ran.summary is not None
    assert ran.summary.nodes["lost"] == 1
    last = ran.sought("commit")[-1]["committed"]
    assert set(last) >= {0, 1}
    assert len({ran.replicas[node].model_digest() for node in last}) == 1


PERTURBED: list[dict[str, Any]] = [
    {},
    {"one_sided": True, "distribution": "rademacher", "weight_decay": 0.1},
    {"layerwise": True, "clip": 0.5, "code": {"name": "log8", "rounding": "stochastic"}},
    {"name": "mezo", "normalizer": "sqrt"},
]


@pytest.mark.parametrize("options", PERTURBED, ids=str)
@pytest.mark.parametrize("task", ["digits", "text_lm"])
def test_without_a_copy_a_run_has_the_same_bits(task: str, options: dict[str, Any], tmp_path: Path):
    """The model, the log of rounds with its digests, and what they are rebuilt to."""
    tasks: dict[str, dict[str, Any]] = {
        "digits": {"model": {"name": "mlp", "width": 16}},
        "text_lm": {"context": 8, "model": {"layers": 1, "width": 8, "heads": 2}, "max_bytes": 100_000},
    }
    logs: list[list[Sealed]] = []
    digests: set[str | None] = set()
    for perturb in ("copy", "on_use"):
        algorithm = {"name": "just_one_byte", "lr": 0.02, "samples": 2, "verify_every": 2, "perturb": perturb} | options
        config = {"algorithm": algorithm, "task": {"name": task} | tasks[task], "rounds": 4, "tracking": "none"}
        more = {"cluster": {"nodes": {"target": 3}}, "evaluation": {"every_rounds": 2, "max_batches": 1}}
        digests.add(run_simulation(config | more, run_dir=tmp_path / perturb).digest)
        logs.append([one for one in read(tmp_path / perturb / NAME) if isinstance(one, Sealed)])
        digests.add(rebuild(tmp_path / perturb).digest)
    assert len(digests) == 1
    assert logs[0] == logs[1]


@pytest.mark.parametrize("perturb", ["copy", "on_use"])
def test_a_round_that_is_given_up_leaves_nothing(perturb: str):
    """Too few are left once a code was sent: everybody goes back, and the round is done again with all."""
    faults = {"events": [{"kind": "kill", "node": 2, "round": 2, "phase": "post"}]}
    cluster = {"nodes": {"target": 3, "min": 3}}
    keys: dict[str, Any] = {"algorithm": {"name": "just_one_byte", "lr": 0.05, "perturb": perturb}, "rounds": 6}
    ran = simulate(keys, task={"name": "test_toy", "model": "mlp"}, nodes=3, faults=faults, cluster=cluster)
    assert ran.sought("abort")
    undisturbed = {"name": "just_one_byte", "lr": 0.05}
    assert ran.digest == simulate(keys | {"algorithm": undisturbed}, nodes=3, cluster=cluster).digest


# --- what it does on average ----------------------------------------------------------------------------------------


ENDS: list[float] = []


class Again(JustOneByte):
    """Begins each round at θ = 1, and notes ‖θ‖²/P after it."""

    def init(self, node: Node) -> None:
        super().init(node)
        node.parameters.fill_(1.0)

    async def round(self, node: Node) -> None:
        await super().round(node)
        ENDS.append(float(node.parameters.square().mean()))
        node.parameters.fill_(1.0)


class Bowl(Task):
    """½‖θ‖²."""

    size: int = 10

    def train_samples(self, num_nodes: int) -> TensorSamples:
        return TensorSamples(torch.zeros(4 * num_nodes, 1))

    validation_samples = train_samples

    def build(self) -> nn.Module:
        return nn.Linear(self.size, 1, bias=False)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return sum((one.square().sum() / 2 for one in module.parameters()), torch.zeros(()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nodes", "samples", "distribution"), [(1, 1, "gaussian"), (1, 2, "rademacher"), (2, 1, "rademacher")]
)
def test_expected_contraction(nodes: int, samples: int, distribution: str):
    """Z7: E‖θ⁺‖² = (1 − 2η + η²(1 + (P + κ)/(N·K)))‖θ‖² on ½‖θ‖², κ = 1 for gaussians, −1 for signs; 600 rounds."""
    size, rate, trials = 10, 0.1, 600
    ENDS.clear()
    keys: dict[str, Any] = {"code": "fp32", "distribution": distribution, "verify_every": 0, "optimizer": FP64}
    task = {"name": f"{__name__}:Bowl", "size": size}
    spsa(nodes, name=f"{__name__}:Again", task=task, rounds=trials, lr=rate, samples=samples, **keys)
    total = torch.tensor(ENDS[::nodes], dtype=torch.float64)
    assert len(total) == trials
    kurtosis = 1 if distribution == "gaussian" else -1
    expected = 1 - 2 * rate + rate**2 * (1 + (size + kurtosis) / (nodes * samples))
    assert abs(float(total.mean()) - expected) < 3 * float(total.std()) / math.sqrt(trials)


@pytest.mark.slow
def test_logistic_regression_comes_close_to_its_optimum():
    """Z10: d = 20, gap below 1e-2."""
    task = {"name": "logistic", "dimension": 20, "heterogeneity": 0.3}
    ran = spsa(4, task=task, rounds=300, samples=4, lr=0.5, data={"batch_size": 64}, distribution="rademacher")
    problem = Logistic(dimension=20, heterogeneity=0.3)
    best = problem.objective(problem.optimum(4), 4)
    assert problem.objective(ran.parameters, 4) - best < 1e-2
    assert problem.objective(torch.zeros(20), 4) - best > 0.1


def test_mezo_is_one_node_with_four_bytes():
    mezo = spsa(name="mezo", task={"name": "test_toy", "model": "mlp"})
    one = spsa(task={"name": "test_toy", "model": "mlp"}, code="fp32")
    assert torch.equal(mezo.parameters, one.parameters)
    assert MeZO().expected_bytes(mezo.replicas[0].layout, 1) == 0


LEARNED: dict[str, dict[str, Any]] = {
    "digits": {
        "task": {"name": "digits", "model": {"name": "mlp", "width": 32}},
        "lr": 0.07,  # up to 0.1 serves, with 16 directions; docs/algorithms.md has why
        "rounds": 250,
        "distribution": "rademacher",
    },
    "text_lm": {
        "task": {"name": "text_lm", "context": 16, "model": {"layers": 1, "width": 16, "heads": 2}},
        "lr": 0.05,
        "rounds": 60,
        "evaluation": {"every_rounds": 0, "max_batches": 4},
    },
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "seeds"), [("digits", (0, 1)), ("text_lm", (0,))])
def test_one_byte_on_four_nodes_learns_as_mezo_does_on_one(name: str, seeds: tuple[int, ...]):
    """At equal function evaluations: 4 · 4 directions a round, of the same size of batch; the mean over seeds."""

    def loss(nodes: int, algorithm: str, **keys: Any) -> float:
        found = LEARNED[name] | {"data": {"batch_size": 32}} | keys
        ran = spsa(nodes, name=algorithm, samples=16 // nodes, **found)
        assert ran.summary is not None
        return ran.summary.metrics["loss"]

    start = loss(1, "mezo", rounds=1, lr=1e-12)
    alone = sum(loss(1, "mezo", seed=seed) for seed in seeds) / len(seeds)
    together = sum(loss(4, "just_one_byte", seed=seed) for seed in seeds) / len(seeds)
    assert alone < (0.4 if name == "digits" else 0.9) * start
    assert abs(together - alone) < 0.1 * (start - alone)


# --- bytes and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "nbytes"), [("log8", 1), ("fp16", 2), ("fp32", 4)])
def test_payload_is_the_samples_alone_whatever_the_model(code: str, nbytes: int):
    """Z9, by the ledger: P = 10⁴ and 10⁶."""
    for rows in (100, 10_000):
        ran = spsa(3, task={"name": TABLE, "rows": rows}, rounds=1, samples=5, code=code)
        assert ran.replicas[0].layout.num_values == 100 * rows
        assert ran.rounds[0].payload_bytes == 3 * 2 * 5 * nbytes == ran.expected_bytes


@pytest.mark.slow
def test_a_hundred_million_parameters_send_the_same_bytes():
    """Z9: 400 MB of parameters at each of two nodes, and no copy of them; the model moves, and both agree on it."""
    task = {"name": TABLE, "rows": 1_000_000}
    ran = spsa(2, task=task, rounds=2, samples=1, perturb="on_use", verify_every=2, lr=1e-6)
    assert ran.replicas[0].layout.num_values == 10**8
    assert [record.payload_bytes for record in ran.rounds] == [2 * 1 * 1 * 1] * 2
    one, other = (replica.parameters for replica in ran.replicas.values())
    assert torch.equal(one, other)
    assert float(one.abs().max()) > 0
    assert len(cast("str", ran.replicas[0].shared["parameters"])) == 64


@pytest.mark.parametrize("perturb", ["copy", "on_use"])
def test_gradients_and_moments_are_never_allocated(perturb: str, monkeypatch: pytest.MonkeyPatch):
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a gradient was asked for")

    for name in ("_ready", "differentiate"):
        monkeypatch.setattr(Gradients, name, forbidden)
    monkeypatch.setattr(NodeOptimizer, "step", forbidden)
    monkeypatch.setattr(Tensor, "backward", forbidden)
    task = {"name": "test_toy", "model": "mlp"}
    ran = spsa(2, task=task, optimizer={"name": "adam"}, perturb=perturb, verify_every=1)
    for one in ran.replicas.values():
        assert one.bench.gradients.values is None
        assert (one.optimizer.moments, one.optimizer.age) == ({}, 0)
        assert all(parameter.grad is None for parameter in one.bench.shared.module.parameters())
        rows = {slab.data_ptr() for slab in (one.slab._parameters, one.slab._committed_parameters)}
        assert len(rows) == (2 if perturb == "copy" else 1)


# --- bad input ------------------------------------------------------------------------------------------------------


class Table(Task):
    """An embedding of ``rows`` · 100 values, of which a batch looks at a few; it begins at zero."""

    rows: int = 100

    def train_samples(self, num_nodes: int) -> TensorSamples:
        return TensorSamples(torch.arange(8 * num_nodes) % 50, torch.linspace(-1, 1, 8 * num_nodes))

    validation_samples = train_samples

    def build(self) -> nn.Module:
        return nn.Embedding(self.rows, 100, _weight=torch.zeros(self.rows, 100))

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return (module(batch[0]).sum(dim=1) - batch[1]).square().mean()


class Wall(Task):
    """½‖θ − 1‖², and no number where θ₀ is above ``wall``."""

    wall: float = 0.0
    module: str = "point"

    def train_samples(self, num_nodes: int) -> TensorSamples:
        return TensorSamples(torch.ones(16, 3))

    validation_samples = train_samples

    def build(self) -> nn.Module:
        return MODULES[self.module]()

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        theta = next(module.parameters()).view(-1)
        return (theta - 1).square().sum() / 2 + (torch.nan if float(theta.detach()[0]) > self.wall else 0)


def _point() -> nn.Module:
    module = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(module.weight)
    return module


def _quantized() -> nn.Module:
    module = nn.Sequential(_point())
    module.register_parameter("scale", nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False))
    return module


MODULES: dict[str, Callable[[], nn.Module]] = {
    "point": _point,
    "dropout": lambda: nn.Sequential(_point(), nn.Sequential(nn.Dropout(0.25))),
    "quantized": _quantized,
    "attention": lambda: nn.Sequential(_point(), nn.MultiheadAttention(4, 1, dropout=0.1)),
    "statistics": lambda: nn.Sequential(_point(), nn.BatchNorm1d(3)),
}
WALL = f"{__name__}:Wall"


def test_losses_that_are_no_numbers_are_dropped_with_a_count(capsys: pytest.CaptureFixture[str]):
    """Directions with |z₀| above ½ have one loss behind the wall. On a cluster the count goes to the node's log."""
    spsa(2, task={"name": WALL, "wall": 0.0005}, rounds=3, samples=8, lr=1e-9)
    lines = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    expected = [
        sum(abs(float(direction(number, node * 8 + sample, 3)[0])) > 0.5 for sample in range(8))
        for number in range(3)
        for node in range(2)
    ]
    assert min(expected) > 0
    assert sum(expected) < 48
    assert lines == [
        f"round {place // 2}: {count} of 8 estimates were not finite, and are dropped"
        for place, count in enumerate(expected)
    ]


def test_a_dropped_sample_is_not_counted():
    """What is left has the weight of what is left: c is the number of those that count."""
    ran = spsa(1, task={"name": WALL, "wall": 0.0005}, rounds=1, samples=8, lr=0.01, code="fp32")
    zs = [direction(0, sample, 3) for sample in range(8)]
    kept = [z for z in zs if abs(float(z[0])) <= 0.5]
    step = sum(((z @ -torch.ones(3, dtype=torch.float64)) * z for z in kept), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(ran.parameters.double(), -0.01 * step / len(kept), rtol=1e-3, atol=0)


def test_a_round_without_any_number_changes_nothing():
    ran = spsa(2, task={"name": WALL, "wall": -1.0}, rounds=2, samples=2)
    assert torch.equal(ran.parameters, torch.zeros(3))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("dropout", r"layer 1\.0 has dropout 0\.25; set it to 0"),
        ("attention", r"layer 1 has dropout 0\.1; set it to 0"),
        ("statistics", r"layer 1 keeps running statistics, which each loss would move; use a layer or group norm"),
        ("quantized", r"layer Sequential has integer parameters \(scale, int8\), which cannot be moved a little"),
    ],
)
def test_models_whose_losses_cannot_be_compared_are_refused(module: str, words: str):
    ran = attempt(algorithm="just_one_byte", task={"name": WALL, "module": module})
    assert ran.error is not None
    assert "\n" not in str(ran.error)
    with pytest.raises(type(ran.error), match=rf"node \d, round 0: losses of this model cannot be compared: {words}"):
        raise ran.error


@pytest.mark.parametrize("key", ["eps", "lr"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_distances_and_rates_are_positive(key: str, value: float):
    with pytest.raises(ConfigError, match=rf"algorithm\.{key}"):
        spsa(**{key: value})
