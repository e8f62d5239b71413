"""Outer optimizers against torch.optim, and DiLoCo's own sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from starling.algorithms.outer import SGD, Adam, Nesterov, OuterOptimizer
from starling.algorithms.registry import table

STEPS = 25

# ours, torch's, tolerance: the same formula, so all that may differ is the rounding of one operation or another
CASES: list[tuple[OuterOptimizer, Any]] = [
    (SGD(lr=0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
    (SGD(lr=0.3, momentum=0.8), lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.8)),
    (Nesterov(lr=0.7, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True)),
    (Adam(lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    (Adam(lr=0.1, betas=(0.5, 0.6), eps=1e-3), lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.5, 0.6), eps=1e-3)),
    (Adam(lr=0.1, betas=(0, 0)), lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.0))),
]


def names(case: Any) -> str:
    return repr(case) if isinstance(case, OuterOptimizer) else ""


@pytest.mark.parametrize(("ours", "theirs"), CASES, ids=names)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_like_torch(ours: OuterOptimizer, theirs: Any, dtype: torch.dtype, tolerance: float):
    rng = torch.Generator().manual_seed(0)
    point = torch.randn(50, generator=rng, dtype=dtype)
    parameter = torch.nn.Parameter(point.clone())
    optimizer = theirs([parameter])
    state = ours.init(point)
    for _ in range(STEPS):
        gradient = torch.randn(50, generator=rng, dtype=dtype)
        parameter.grad = gradient.clone()
        optimizer.step()
        step, state = ours.update(gradient, state)
        point = point + step
        torch.testing.assert_close(point, parameter.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("ours", [case[0] for case in CASES], ids=names)
def test_nothing_is_written_in_place(ours: OuterOptimizer):
    rng = torch.Generator().manual_seed(1)
    gradient = torch.randn(10, generator=rng)
    state = ours.init(gradient)
    for _ in range(2):
        kept: Any = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
        before = gradient.clone()
        step, following = ours.update(gradient, state)
        assert torch.equal(gradient, before)
        for key, value in state.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, kept[key])
                assert following[key] is not value
            else:
                assert value == kept[key]
        assert step.shape == gradient.shape
        state = following


def test_nesterov_of_a_constant_gradient():
    """DiLoCo's first outer steps from θ = 0 with Δ = 1 (test D5 of its specification)."""
    outer = Nesterov(lr=0.7, momentum=0.9)
    point = torch.zeros(1, dtype=torch.float64)
    gradient = torch.ones(1, dtype=torch.float64)
    state = outer.init(point)
    seen = []
    for _ in range(5):
        step, state = outer.update(gradient, state)
        point = point + step
        seen.append(point.item())
    assert seen == pytest.approx([-1.33, -3.227, -5.6343, -8.50087, -11.780783], rel=1e-14)
    for _ in range(1000):
        _, state = outer.update(gradient, state)
    assert outer.update(gradient, state)[0].item() == pytest.approx(-7.0, rel=1e-14)  # η / (1 − β)


def test_first_step_of_nesterov():
    step, _ = Nesterov(lr=0.7, momentum=0.9).update(torch.tensor([2.0]), {"velocity": torch.zeros(1)})
    assert step.item() == pytest.approx(-0.7 * 1.9 * 2)


def test_without_momentum_all_are_gradient_descent():
    gradient = torch.randn(20, generator=torch.Generator().manual_seed(0))
    plain, _ = SGD(lr=0.5).update(gradient, {})
    assert torch.equal(plain, gradient * -0.5)
    nesterov = Nesterov(lr=0.5, momentum=0)
    assert torch.equal(nesterov.update(gradient, nesterov.init(gradient))[0], plain)
    assert SGD(lr=0.5).init(gradient) == {}


def test_plain_averaging_is_exact():
    step, _ = SGD().update(torch.tensor([0.1, -3.7]), {})
    assert step.tolist() == (-torch.tensor([0.1, -3.7])).tolist()


def test_names_and_ranges():
    assert {"sgd", "nesterov", "adam"} <= table(OuterOptimizer).keys()
    assert OuterOptimizer.model_validate("nesterov") == Nesterov()
    for wrong in (
        {"name": "sgd", "lr": 0},
        {"name": "sgd", "momentum": 1},
        {"name": "nesterov", "momentum": -0.1},
        {"name": "adam", "betas": [0.9, 1.0]},
        {"name": "adam", "betas": [-0.1, 0.9]},
        {"name": "adam", "eps": 0},
    ):
        with pytest.raises(ValidationError):
            OuterOptimizer.model_validate(wrong)
