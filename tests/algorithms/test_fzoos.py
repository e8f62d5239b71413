"""FZooS, exactly: F1 to F5 of its specification, and the round against a plain one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.tasks.quadratic import Quadratic
from algorithms.errors import ProgramError
from algorithms.zeroth_order import FZooS
from algorithms.zeroth_order.queries import nearest, rebased
from algorithms.zeroth_order.surrogates import FourierFeatures, GaussianProcess
from tests.membership import scripted
from tests.toys import simulate

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
