"""The self-repellent walk: its kernel, its definition, its known variance, and what repulsion is good for."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from starling.actors.tasks.quadratic import Quadratic
from starling.algorithms.api import Gradient, GradientReport, Left, Message, Receive, Send
from starling.algorithms.gossip.random_walk import RandomWalk, covering, kernel, visited
from starling.algorithms.seeds import generator
from starling.algorithms.topologies import Ring, Topology
from starling.algorithms.topologies.erdos_renyi import ErdosRenyi
from starling.algorithms.topologies.random_matching import RandomMatching
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError
from tests.toys import Ran, simulate

TASK = Quadratic(dimension=3, heterogeneity=1.0, curvature_heterogeneity=1.0)


def run(*, nodes: int, rounds: int, seed: int = 0, network: Any = None, **keys: Any) -> Ran:
    return simulate(
        algorithm={"name": "random_walk"} | keys,
        task={"name": "quadratic", **TASK.model_dump(exclude={"name"})},
        nodes=nodes,
        rounds=rounds,
        seed=seed,
        optimizer={"lr": 0.1, "precision": "fp64"},
        evaluation={"every_rounds": 0},
        network=network or {},
    )


def path(ran: Ran) -> list[int]:
    """Who held the token in which step."""
    return [event["node"] for event in ran.sought("commit")]


def base(topology: Topology, nodes: int) -> Tensor:
    return torch.tensor(topology.mixing(range(nodes), 0, 0).matrix())


def reference(ran: Ran, topology: Topology, nodes: int, naive: Any) -> tuple[list[int], Tensor]:
    """Path and model, from the formulas and the nodes' random streams alone."""
    algorithm: Any = ran.config.algorithm
    transition = base(topology, nodes)
    x, theta = torch.full((nodes,), 1 / nodes, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    node, visits, holders = 0, [0] * nodes, []
    for n in range(1, ran.config.rounds * nodes + 1):
        holders.append(node)
        delta = torch.nn.functional.one_hot(torch.tensor(node), nodes)
        x = x + (n + 1) ** -algorithm.visits_exponent * (delta - x)
        gradient = TASK.curvature(node) @ (theta - TASK.center(node))
        theta = theta - algorithm.lr * (n + 1) ** -algorithm.step_exponent * gradient
        neighbors = transition[node].nonzero().flatten()
        chances = naive(transition[node][neighbors], x[neighbors])
        rng = generator(ran.config.seed, visits[node], node, "walk")
        visits[node] += 1
        node = int(neighbors[torch.multinomial(chances, 1, generator=rng)])
    return holders, theta


# --- the kernel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 5.0, 400.0])
def test_rows_sum_to_one_and_keep_to_the_edges(alpha: float):
    transition = base(ErdosRenyi(probability=0.4), 9)
    visits = torch.rand(9, dtype=torch.float64, generator=generator("visits")) + 0.01
    rows = kernel(transition, visits, alpha)
    torch.testing.assert_close(rows.sum(1), torch.ones(9, dtype=torch.float64), rtol=1e-12, atol=0)
    assert bool((rows[transition == 0] == 0).all())
    torch.testing.assert_close(kernel(transition, 1000 * visits, alpha), rows, rtol=1e-9, atol=1e-300)
    if alpha < 100:
        plain = transition * visits**-alpha
        torch.testing.assert_close(rows, plain / plain.sum(1, keepdim=True), rtol=1e-12, atol=0)


def test_even_visits_leave_the_walk_as_it_is():
    transition = base(Ring(), 7)
    for alpha in (0.0, 3.0, 200.0):
        even = torch.full((7,), 1 / 7, dtype=torch.float64)
        torch.testing.assert_close(kernel(transition, even, alpha), transition, rtol=1e-12, atol=0)


def test_rare_nodes_are_preferred_even_where_powers_overflow():
    visits = torch.tensor([1e-3, 2e-3, 0.997], dtype=torch.float64)
    assert kernel(torch.full((3,), 1 / 3, dtype=torch.float64), visits, 300.0).tolist() == [1.0, pytest.approx(0), 0.0]


def test_visits_are_shares():
    visits = torch.full((4,), 0.25, dtype=torch.float64)
    for n, node in enumerate([2, 2, 0, 1], start=1):
        visits = visited(visits, node, 1 / (n + 1))
    # With γ_n = 1/(n+1) each visit counts alike, the even start like one of them.
    torch.testing.assert_close(visits * 5, torch.tensor([1.25, 1.25, 2.25, 0.25], dtype=torch.float64))
    assert covering(visits, [0, 3]) is visits
    assert covering(visits, [1, 5])[4:].tolist() == [0.05, 0.05]


# --- the program ----------------------------------------------------------------------------------------------------


def test_without_repulsion_it_is_the_plain_walk():
    ran = run(nodes=6, rounds=20, repulsion=0.0)
    holders, theta = reference(ran, Ring(), 6, lambda row, _: row)
    assert path(ran) == holders
    assert set(holders) == set(range(6))
    torch.testing.assert_close(ran.replicas[holders[-1]].parameters, theta, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("topology", [Ring(), ErdosRenyi(probability=0.5)], ids=lambda one: one.name)
def test_definition(topology: Topology):
    keys: dict[str, Any] = {"repulsion": 3.0, "visits_exponent": 1.0, "step_exponent": 0.7, "lr": 0.8}
    ran = run(nodes=6, rounds=20, seed=5, topology=topology.model_dump(), **keys)
    holders, theta = reference(ran, topology, 6, lambda row, x: row * x**-3.0 / (row * x**-3.0).sum())
    assert path(ran) == holders
    torch.testing.assert_close(ran.replicas[holders[-1]].parameters, theta, rtol=1e-10, atol=1e-12)
    assert ran.summary is not None
    assert ran.summary.metrics["loss"] == pytest.approx(TASK.objective(theta, 6)), "the run's model is the token's"


def test_time_and_bytes_are_those_of_one_token():
    """A step and a hop after another; a token that stays costs neither time nor bytes on the way."""
    ran = run(nodes=6, rounds=30, repulsion=1.0, visits_exponent=0.8, network={"latency_ms": 100, "step_ms": 10})
    holders = path(ran)
    hops = sum(one != other for one, other in itertools.pairwise(holders))
    assert 0 < hops < len(holders) - 1
    assert ran.virtual_seconds == pytest.approx(len(holders) * 0.01 + hops * 0.1)
    size = 3 * 8 + 6 * 8 + 8
    sent = sum(record.payload_bytes for record in ran.rounds)
    assert sent in (hops * size, (hops + 1) * size), "the last holder has sent it on too, unless it stays"
    assert ran.expected_bytes == 6 * size * 2 // 3
    assert sent == pytest.approx(30 * ran.expected_bytes, rel=0.1)


def test_topology_must_be_symmetric():
    raw = {"algorithm": {"name": "random_walk", "topology": "exponential"}, "task": "quadratic"}
    with pytest.raises(ConfigError, match="random_walk needs symmetric weights"):
        parse(raw)


def test_who_is_gone_is_not_visited():
    """Node 1 of a ring of three hears that node 2 is gone while it waits for the token."""
    node: Any = SimpleNamespace(
        id=1,
        round=1,
        incarnation=0,
        view=SimpleNamespace(members=(0, 1, 2)),
        parameters=torch.zeros(2),
        buffers=torch.zeros(0),
        rng=generator,
    )
    program = RandomWalk(repulsion=50.0, lr=1.0, visits_exponent=0.8, step_exponent=0.9).round(node)
    token = {
        "parameters": torch.ones(2),
        "buffers": torch.zeros(0),
        "visits": torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64),
        "step": 8,
    }
    assert isinstance(program.send(None), Receive)
    assert isinstance(program.send(Left(2)), Receive)
    assert isinstance(program.send(Left(7)), Receive), "one that is not in the view any more"
    assert isinstance(program.send(Message(0, token, 0)), Gradient)
    sent = program.send(GradientReport(torch.full((2,), 10**0.9), 0.0, 1))
    assert isinstance(sent, Send)
    assert sent.to == 0, "node 2 has fewer visits, and is not there"
    payload: Any = sent.payload
    assert payload["step"] == 9
    assert node.parameters.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("step", [4, 5, 6])
def test_the_graph_is_that_of_the_walks_step(step: int):
    """In a graph of pairs that are drawn anew, a token that has seen its holder too often goes to the pair's other."""
    topology, members = RandomMatching(), tuple(range(6))
    node: Any = SimpleNamespace(
        id=2,
        round=1,
        incarnation=0,
        view=SimpleNamespace(members=members),
        parameters=torch.zeros(2),
        buffers=torch.zeros(0),
        rng=generator,
    )
    program = RandomWalk(topology=topology, graph_seed=7, repulsion=100.0).round(node)
    visits = torch.tensor([0.02, 0.02, 0.9, 0.02, 0.02, 0.02], dtype=torch.float64)
    token = {"parameters": torch.ones(2), "buffers": torch.zeros(0), "visits": visits, "step": step - 1}
    assert isinstance(program.send(None), Receive)
    assert isinstance(program.send(Message(0, token, 0)), Gradient)
    sent: Any = program.send(GradientReport(torch.zeros(2), 0.0, 1))
    (partner,) = set(topology.mixing(members, step, 7).weights[2]) - {2}
    assert sent.to == partner
    at_first = set(topology.mixing(members, 0, 7).weights[2])
    assert partner not in at_first, "a graph that never changed would show"


# --- statistics -----------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Any:
    """These tensors are small: threads would wait for one another longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def walk(transition: Tensor, alpha: float, runs: int, steps: int, exponent: float, seed: int) -> Any:
    """Many walks side by side: the node of each, step by step."""
    nodes = len(transition)
    rng = generator("walks", seed)
    here = torch.randint(nodes, (runs,), generator=rng)
    x = torch.full((runs, nodes), 1 / nodes, dtype=torch.float64)
    for n in range(1, steps + 1):
        yield n, here
        x = x.mul_(1 - (n + 1) ** -exponent)
        x[torch.arange(runs), here] += (n + 1) ** -exponent
        rows = kernel(transition[here], x, alpha)
        drawn = torch.rand(runs, 1, dtype=torch.float64, generator=rng)
        here = (rows.cumsum(1) < drawn).sum(1).clamp_(max=nodes - 1)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("alpha", [0.0, 2.0, 8.0])
def test_sampling_variance(alpha: float):
    """T·Var(mean g) → (1/N) Σ_k (u_kᵀg)² (1+λ_k)/(1−λ_k) / (2α(1+λ_k)+1), over the eigenpairs of P but the first."""
    transition = base(ErdosRenyi(probability=0.35), 10)
    values = torch.randn(10, dtype=torch.float64, generator=generator("values"))
    eigenvalues, vectors = torch.linalg.eigh(transition)
    lam, weights = eigenvalues[:-1], (vectors.T @ values)[:-1].square() / 10
    expected = float((weights * (1 + lam) / (1 - lam) / (2 * alpha * (1 + lam) + 1)).sum())
    runs, steps = 1000, 2500
    total = torch.zeros(runs, dtype=torch.float64)
    for _, here in walk(transition, alpha, runs, steps, 1.0, seed=1):
        total += values[here]
    measured = float((total / steps - values.mean()).square().mean()) * steps
    assert measured == pytest.approx(expected, rel=0.15)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_repulsion_makes_sgd_more_exact():
    """On f_i(θ) = ½ (θ − c_i)², whose optimum is the mean of the c_i, with a < b."""
    transition = base(Ring(), 10)
    centers = torch.randn(10, dtype=torch.float64, generator=generator("centers"))
    errors: list[float] = []
    for alpha in (0.0, 1.0, 5.0):
        theta = torch.zeros(300, dtype=torch.float64)
        for n, here in walk(transition, alpha, 300, 2500, 0.8, seed=2):
            theta += (n + 1) ** -0.9 * (centers[here] - theta)
        errors.append(float((theta - centers.mean()).square().mean()))
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.8 * errors[1]
