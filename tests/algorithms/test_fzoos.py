"""FZooS, exactly: F1 to F5 of its specification, and the round against a plain one."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from starling.actors.tasks.quadratic import Quadratic
from starling.algorithms.api import AllReduce, Loss
from starling.algorithms.errors import ProgramError
from starling.algorithms.zeroth_order.fzoos import FZooS
from starling.algorithms.zeroth_order.queries import around, nearest, rebased, scaled
from starling.algorithms.zeroth_order.surrogates import FourierFeatures, GaussianProcess
from tests.membership import scripted
from tests.toys import simulate

if TYPE_CHECKING:
    from collections.abc import Callable

TASK: dict[str, Any] = {"name": "quadratic", "dimension": 6}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1.0, 2.5])
def test_features_approximate_the_kernel(length: float):
    """F1: φ(x)ᵀφ(y) comes to exp(−‖x − y‖²/2ℓ²) as D^(−1/2)."""
    points = normal(6, 4) * length
    kernel = (-torch.cdist(points, points).square() / (2 * length**2)).exp()
    errors: list[float] = []
    for count in (100, 10_000):
        features = FourierFeatures(count, 4, seed=3, length=length)(points)
        errors.append(float((features @ features.T - kernel).abs().max()))
        assert errors[-1] < 4 / math.sqrt(count)
    assert errors[1] < errors[0] / 3


def test_features_are_the_same_wherever_their_seed_is():
    points = normal(3, 4)
    assert torch.equal(FourierFeatures(20, 4, seed=1)(points), FourierFeatures(20, 4, seed=1)(points))
    assert not torch.equal(FourierFeatures(20, 4, seed=1)(points), FourierFeatures(20, 4, seed=2)(points))
    phases = FourierFeatures(5000, 2, seed=1)._phases
    assert 0 <= float(phases.min()) < 0.01
    assert 2 * math.pi - 0.01 < float(phases.max()) < 2 * math.pi


def test_the_gradient_of_the_features_is_that_of_their_sum():
    """Against central differences of νᵀφ."""
    features, weights, at = FourierFeatures(50, 4, seed=0), normal(50, seed=1), normal(4, seed=2)
    steps = torch.eye(4, dtype=torch.float64) * 1e-5
    values = [(features((at + step).unsqueeze(0)) - features((at - step).unsqueeze(0))) @ weights for step in steps]
    expected = torch.cat(values) / 2e-5
    torch.testing.assert_close(features.gradient(weights, at), expected, rtol=0, atol=1e-8)


def test_only_a_surrogate_that_differs_corrects():
    """F2: with ν = ν_i, on one node, the correction is zero, exactly; with the mean of two that differ it is not."""
    for nodes, same in ((1, True), (2, False)):
        keys: Any = {"task": TASK, "nodes": nodes, "rounds": 2}
        algorithm = {"name": "fzoos", "features": 40, "steps": 3}
        ran = simulate(algorithm=algorithm, **keys)
        more = simulate(algorithm=algorithm | {"correction": 9.0}, **keys)
        assert torch.equal(ran.parameters, more.parameters) is same


@pytest.mark.parametrize(("seed", "scale"), [(0, 1.0), (1, 0.02), (2, 4.0)])
def test_no_length_nearby_is_likelier(seed: int, scale: float):
    """By the density of a normal distribution with that covariance, as scipy has it."""
    points = normal(25, 3, seed=seed) * scale
    values = (points / scale).sin().sum(dim=1)

    def likelihood(length: float) -> float:
        rho = math.sqrt(5) * torch.cdist(points, points) / length
        covariance = (1 + rho + rho.square() / 3) * (-rho).exp() + 1e-6 * torch.eye(25)
        return float(multivariate_normal(cov=covariance.numpy()).logpdf(values.numpy()))

    length = GaussianProcess(points, values, length=None).length
    assert 0.3 * scale < length < 30 * scale
    assert likelihood(length) > max(likelihood(length * factor) for factor in (0.5, 0.8, 0.96, 1.04, 1.25, 2.0))


@pytest.mark.slow
def test_the_length_is_the_likeliest():
    """Against scikit-learn's Gaussian process, of the authors' settings."""
    process: Any = pytest.importorskip("sklearn.gaussian_process")
    for seed, scale in ((0, 1.0), (1, 0.02)):
        points = normal(40, 3, seed=seed) * scale
        values = (points / scale).sin().sum(dim=1)
        values = (values - values.min()) / (values.max() - values.min())
        kernel = process.kernels.Matern(nu=2.5)
        theirs = process.GaussianProcessRegressor(kernel, alpha=1e-6, n_restarts_optimizer=5, random_state=0)
        theirs.fit(points.numpy(), values.numpy())
        ours = GaussianProcess(points, values, length=None)
        assert ours.length == pytest.approx(float(theirs.kernel_.length_scale), rel=0.02)


def test_what_is_queried_is_what_is_least_certain():
    """Candidates among known points and candidates far from all: the far ones."""
    algorithm, x = FZooS(), torch.zeros(3, dtype=torch.float64)
    known = normal(30, 3) * 0.1, normal(30, seed=1)
    candidates = torch.cat([normal(20, 3, seed=2) * 0.05, normal(5, 3, seed=3) * 0.05 + 2])
    chosen = algorithm._least_certain(known, x, candidates, 5, length=1.0)
    assert sorted(chosen[:, 0].tolist()) == sorted(candidates[20:, 0].tolist())


def test_candidates_are_all_around():
    places = around(torch.tensor([5.0, -5.0], dtype=torch.float64), 0.5, 2000, torch.Generator().manual_seed(0))
    assert places.shape == (2000, 2)
    torch.testing.assert_close(places.amin(0), torch.tensor([4.5, -5.5], dtype=torch.float64), rtol=0, atol=0.01)
    torch.testing.assert_close(places.amax(0), torch.tensor([5.5, -4.5], dtype=torch.float64), rtol=0, atol=0.01)
    torch.testing.assert_close(places.mean(0), torch.tensor([5.0, -5.0], dtype=torch.float64), rtol=0, atol=0.03)


def test_values_are_between_0_and_1():
    unit, extent = scaled(torch.tensor([7.0, 3.0, 11.0]))
    assert (unit.tolist(), extent) == ([0.5, 0.0, 1.0], 8.0)
    unit, extent = scaled(torch.tensor([7.0, 7.0]))
    assert (unit.tolist(), extent) == ([0.0, 0.0], 1.0), "values that are all alike have no range"


def test_features_are_fitted_with_a_ridge():
    """ν = (ΦᵀΦ + σ²I)⁻¹ Φᵀy, which more points than features determine too."""
    features, points, values = FourierFeatures(8, 3, seed=0), normal(20, 3), normal(20, seed=1)
    phi = features(points)
    expected = torch.linalg.solve(phi.T @ phi + 0.5 * torch.eye(8, dtype=torch.float64), phi.T @ values)
    torch.testing.assert_close(features.fit(points, values, noise=0.5), expected, rtol=0, atol=1e-12)


def test_what_is_near_counts():
    known = torch.tensor([[0.0], [3.0], [1.0], [2.0]]), torch.tensor([0.0, 3.0, 1.0, 2.0], dtype=torch.float64)
    points, values = nearest(known, torch.tensor([2.2], dtype=torch.float64), 3)
    assert (points.flatten().tolist(), values.tolist()) == ([2.0, 3.0, 1.0],) * 2


def test_values_of_another_batch_are_shifted_to_agree():
    """A loss that is 7 higher everywhere: the values that were known are moved by 7, and the point is known once."""
    points = torch.tensor([[0.0], [1.0], [3.0], [1.0]])
    moved, values = rebased((points, torch.tensor([5.0, 6.0, 8.0, 13.0], dtype=torch.float64)))
    assert (moved.flatten().tolist(), values.tolist()) == ([0.0, 3.0, 1.0], [12.0, 15.0, 13.0])
    alone = points[:1], torch.tensor([5.0], dtype=torch.float64)
    assert rebased(alone) is alone


def test_batches_that_differ_by_a_constant_make_no_slope():
    """The second round's gradient is that of a loss without the constant: nodes move alike, to rounding."""
    seen: list[Tensor] = []
    for more in (0.0, 1000.0):
        queries = normal(40, 3) * 0.05, (normal(40, 3) * 0.05).sum(dim=1)
        x = torch.zeros(1, 3, dtype=torch.float64)
        known = torch.cat([queries[0], x]), torch.cat([queries[1], torch.zeros(1).double() + more])
        points, values = rebased(known)
        seen.append(GaussianProcess(points, values - values.min(), 1.0).gradient(x[0]))
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1.0, 3.0])
def test_the_gradient_of_the_process_is_that_of_its_mean(length: float):
    """F3: against central differences of the mean, to 1e-6."""
    points, values = normal(30, 5), normal(30, seed=1)
    process = GaussianProcess(points, values, length, noise=1e-3)
    at = normal(5, seed=2)
    steps = torch.eye(5, dtype=torch.float64) * 1e-5
    expected = torch.stack([(process.mean(at + step) - process.mean(at - step)) / 2e-5 for step in steps])
    torch.testing.assert_close(process.gradient(at), expected, rtol=0, atol=1e-6)


def test_the_process_goes_through_what_it_was_given():
    points, values = normal(20, 5), normal(20, seed=1)
    process = GaussianProcess(points, values, noise=1e-10)
    torch.testing.assert_close(torch.stack([process.mean(point) for point in points]), values, rtol=0, atol=1e-6)


def test_points_that_cannot_be_told_apart_or_are_no_numbers_apart():
    """Twice the same place, at a length at which rounding shows; and 1e200, whose square is infinite."""
    far = normal(5, 400) + 100
    points = torch.cat([far, far, far + 1e-9])
    assert GaussianProcess(points, normal(15), 1e-5).gradient(far[0]).isfinite().all()
    with pytest.raises(ProgramError, match="queries are too far apart"):
        GaussianProcess(points * 1e200, normal(15))


def test_the_gradient_is_most_certain_where_most_is_known():
    """Against the kernel's second derivatives by differences; and less where points are near."""
    points = normal(12, 3) * 0.3
    process = GaussianProcess(points, normal(12, seed=1), noise=1e-4)
    near, far = torch.zeros(3, dtype=torch.float64), torch.full((3,), 4.0, dtype=torch.float64)
    variances = process.gradient_variance(torch.stack([near, far]))
    assert 0 < variances[0] < variances[1] < 5.0 + 1e-9
    assert float(variances[1]) == pytest.approx(5.0, rel=0.05)  # far away it is the prior's, 5d/3
    rho = torch.cdist(points, points) * math.sqrt(5)
    covariance = (1 + rho + rho.square() / 3) * (-rho).exp() + 1e-4 * torch.eye(12)
    step = 1e-5
    jacobian = torch.stack(
        [
            (kernel(points, near, one * step) - kernel(points, near, one * -step)) / (2 * step)
            for one in torch.eye(3).double()
        ]
    )
    exact = 5.0 - torch.trace(jacobian @ torch.linalg.solve(covariance, jacobian.T))
    torch.testing.assert_close(variances[0], exact, rtol=1e-6, atol=1e-7)


def test_far_from_all_the_gradients_variance_is_the_priors():
    """d · 5 / (3ℓ²), of a longer kernel less."""
    process = GaussianProcess(normal(12, 3), normal(12, seed=1), length=2.0)
    far = torch.full((1, 3), 1000.0, dtype=torch.float64)
    assert float(process.gradient_variance(far)) == pytest.approx(3 * 5 / (3 * 4))


def kernel(points: Tensor, at: Tensor, step: Tensor) -> Tensor:
    rho = (points - at - step).norm(dim=1) * math.sqrt(5)
    return (1 + rho + rho.square() / 3) * (-rho).exp()


def test_with_enough_queries_the_direction_is_the_gradients():
    """F4: the cosine is above 0.99 on a quadratic."""
    problem = Quadratic(dimension=6)
    algorithm = FZooS()
    at = normal(6)
    points = at + normal(120, 6, seed=5) * 0.5
    values = torch.stack(
        [(point - problem.center(0)) @ problem.curvature(0) @ (point - problem.center(0)) / 2 for point in points]
    )
    process, extent = algorithm._process((points, values), at)
    gradient = process.gradient(at) * extent
    exact = problem.curvature(0) @ (at - problem.center(0))
    assert torch.cosine_similarity(gradient, exact, dim=0) > 0.99
    assert float(gradient.norm() / exact.norm()) == pytest.approx(1, abs=0.1)


def test_the_common_surrogate_has_the_mean_gradient():
    """F5: its gradient is Σ w_i of the nodes', to 1e-10; here in the run, with equal weights, in float64."""
    optimizer = {"precision": "fp64"}
    ran = simulate(
        algorithm={"name": "fzoos", "features": 60, "steps": 2}, task=TASK, nodes=3, rounds=2, optimizer=optimizer
    )
    features = FourierFeatures(60, 6, seed=0)
    at = normal(6)
    own = [features.gradient(one.local["surrogate"], at) for one in ran.replicas.values()]  # pyright: ignore[reportArgumentType]
    common: Any = ran.replicas[0].shared["surrogate"]
    torch.testing.assert_close(features.gradient(common, at), torch.stack(own).mean(0), rtol=0, atol=1e-10)


class Round:
    """A round of one node that has queried before, driven by hand: what it asks for is answered and written down."""

    def __init__(self, function: Callable[[Tensor], Tensor], moved: Tensor, difference: Tensor, **fields: Any) -> None:
        size = len(moved)
        self.algorithm = FZooS(
            features=30, queries=2, candidates=10, surrogate_queries=3, surrogate_candidates=5, **fields
        )
        self.start = normal(size, seed=4)
        # The last query of a round is at the x that the next one begins with.
        self.earlier = torch.cat([normal(12, size, seed=5) * 0.3 + self.start, self.start.unsqueeze(0)])
        surrogate = normal(30, seed=6)
        known = {"points": self.earlier, "values": torch.stack([function(one) for one in self.earlier])}
        self.node: Any = SimpleNamespace(
            id=1,
            parameters=self.start.clone(),
            layout=SimpleNamespace(num_values=size),
            seed=3,
            num_samples=7,
            local=known | {"surrogate": surrogate},
            shared={"surrogate": surrogate + difference},
            rng=lambda purpose: torch.Generator().manual_seed(len(purpose)),
        )
        self.asked: list[Tensor] = []
        self.reduced: list[AllReduce[Any]] = []
        program: Any = self.algorithm.round(self.node)
        answer: Any = None
        try:
            while True:
                awaited = program.send(answer)
                match awaited:
                    case Loss(at=at):
                        self.asked.append(at.clone())  # type: ignore[union-attr]
                        answer = float(function(at))  # type: ignore[arg-type]
                    case AllReduce():
                        self.reduced.append(awaited)
                        answer = SimpleNamespace(value=awaited.tensors if len(self.reduced) > 1 else moved)
                    case _:
                        answer = None
        except StopIteration:
            pass

    @property
    def steps(self) -> list[Tensor]:
        """x_1 to x_T: x itself comes first, and two queries after each step but the last."""
        return self.asked[1 : 1 + 3 * self.algorithm.steps : 3]


def test_steps_are_adams_along_the_corrected_gradient():
    """With a correction beside which μ_i's gradient is nothing: g_t = (γ_1 / t) ∇(ν − ν_i)ᵀφ(x_t)."""
    correction = normal(30, seed=7)
    ran = Round(lambda x: x.square().sum(), torch.zeros(4).double(), correction, steps=4, lr=0.05, correction=1e9)
    features = FourierFeatures(30, 4, seed=3)
    x = ran.start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for number, found in enumerate(ran.steps, start=1):
        x.grad = features.gradient(correction, x.detach()) * 1e9 / number
        optimizer.step()
        torch.testing.assert_close(found, x.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(ran.reduced[0].tensors, ran.start - x.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("share", "sign"), [(-0.3, -1), (-3.0, 1)])
def test_the_gradient_and_its_correction_are_in_the_units_of_the_loss(share: float, sign: int):
    """The loss has slope 1000 there; the correction, a share of that, turns the step round where it is larger."""
    unit = normal(30, seed=7)
    start = normal(1, seed=4)
    slope = float(FourierFeatures(30, 1, seed=3).gradient(unit, start))
    difference = unit * (1000 * share / slope)
    ran = Round(lambda x: 1000 * (x - start).sin().sum(), torch.zeros(1).double(), difference, steps=1, lr=0.05)
    assert float(ran.steps[0] - start) == pytest.approx(sign * 0.05, rel=1e-3)


def test_the_common_step_and_what_is_kept_of_queries():
    moved = normal(4, seed=8)
    ran = Round(lambda x: x.square().sum(), moved, torch.zeros(30).double(), steps=2, server_lr=0.5, history=15)
    common = ran.start - 0.5 * moved
    torch.testing.assert_close(ran.node.parameters, common, rtol=0, atol=1e-15)
    assert [one.weight for one in ran.reduced] == [7, 7], "by samples, of x and of ν"
    assert len(ran.asked) == 1 + 2 + 2 + 1 + 3, "x, two steps, two queries between them, the common x, three around it"
    torch.testing.assert_close(ran.asked[5], common, rtol=0, atol=1e-15)
    kept = torch.cat([ran.earlier[:-1], torch.stack(ran.asked)])[-15:]  # x is known once
    assert torch.equal(ran.node.local["points"], kept)
    assert torch.equal(ran.node.local["values"], kept.square().sum(dim=1))


@pytest.mark.slow
def test_it_comes_to_the_optimum_of_quadratics():
    task = {"name": "quadratic", "dimension": 10}
    algorithm = {"name": "fzoos", "features": 300, "steps": 5, "lr": 0.1}
    ran = simulate(algorithm=algorithm, task=task, nodes=4, rounds=6)
    problem = Quadratic(dimension=10)
    best = problem.objective(problem.optimum(4), 4)
    assert problem.objective(ran.parameters, 4) - best < 0.03
    assert problem.objective(torch.zeros(10), 4) - best > 1


def test_queries_that_are_kept_are_the_last_ones():
    keys = {"name": "fzoos", "features": 20, "steps": 3, "queries": 4, "surrogate_queries": 10, "history": 25}
    ran = simulate(algorithm=keys, task=TASK, nodes=2, rounds=3)
    values: Any = ran.replicas[0].local["values"]
    points: Any = ran.replicas[0].local["points"]
    assert values.shape == (25,)
    assert points.shape == (25, 6)


def test_a_joiner_makes_its_own_queries_first():
    seen: list[int] = []

    def watch(number: int, replicas: Any) -> None:
        seen.append(len(replicas[2].local["values"]) if "values" in replicas[2].local else 0)
        digests = {replicas[node].model_digest() for node in ((0, 1) if number < 2 else (0, 1, 2))}
        assert len(digests) == 1

    keys = {"name": "fzoos", "features": 20, "steps": 2, "queries": 3, "candidates": 30, "surrogate_queries": 10}
    scripted([(0, 1)] * 2 + [(0, 1, 2)] * 2, watch, algorithm=keys, task=TASK)
    # 10 at first; in each round x, two steps' ends, 3 after the first of them, the common x, and 10 around it. The
    # common x is the next round's x, and kept once.
    assert seen == [0, 0, 10 + 17, 10 + 33]
