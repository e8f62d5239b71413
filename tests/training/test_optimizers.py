"""Optimizers: names, options and their errors; schedules in closed form; one flat tensor stands for many."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from starling.actors.training.optimizer_options import is_known_good, try_steps
from starling.actors.training.optimizers import ELEMENTWISE, OptimizerConfig, Schedule, build, is_elementwise
from starling.algorithms.errors import StarlingError

SHAPES = [(3,), (5, 7), (), (129,), (4, 4, 3)]


def config(**keys: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate(keys)


def complaint(**keys: object) -> str:
    """The one line that a wrong section is answered with."""
    with pytest.raises(ValidationError) as caught:
        config(**keys)
    (error,) = caught.value.errors()
    assert "\n" not in error["msg"]
    return error["msg"]


# --- names and options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module", "kind"),
    [
        ("sgd", "torch.optim", "SGD"),
        ("AdamW", "torch.optim", "AdamW"),
        ("adam_w", "torch.optim", "AdamW"),
        ("RMSPROP", "torch.optim", "RMSprop"),
        ("lion", "pytorch_optimizer", "Lion"),
        ("ada_belief", "pytorch_optimizer", "AdaBelief"),
    ],
)
def test_names(name: str, module: str, kind: str):
    optimizer = build(config(name=name), [torch.zeros(3)])
    assert type(optimizer).__name__ == kind
    assert type(optimizer).__module__.startswith(module)


def test_options_reach_the_optimizer():
    section = config(name="adamw", lr=0.5, betas=[0.8, 0.9], weight_decay="1e-4", amsgrad=True)
    assert section.options == {"betas": (0.8, 0.9), "weight_decay": 1e-4, "amsgrad": True}
    (group,) = build(section, [torch.zeros(3)]).param_groups
    chosen = {"lr": 0.5, "betas": (0.8, 0.9), "weight_decay": 1e-4, "amsgrad": True, "foreach": None, "fused": None}
    assert {key: group[key] for key in chosen} == chosen
    assert config(**section.model_dump()) == section
    assert config(**section.model_dump(mode="json")) == section


def test_a_bare_name_is_enough():
    assert OptimizerConfig.model_validate("adam") == config(name="adam")
    assert config(schedule="cosine").schedule == Schedule(name="cosine")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"name": "adamm"},
            "no optimizer is called 'adamm' in torch.optim or pytorch_optimizer (did you mean adam or ",
        ),
        ({"name": "lbfgs"}, "lbfgs calls the loss more than once per step (a closure)"),
        ({"name": "SAM"}, "SAM calls the loss more than once per step (a closure)"),
        ({"name": "schedule_free_sgd"}, "schedule_free_sgd evaluates the model at other parameters than it trains"),
        ({"momentun": 0.9}, "momentun is not an option of sgd (did you mean momentum?)"),
        ({"grad_clp": 1.0}, "grad_clp is not an option of sgd (did you mean grad_clip?)"),
        ({"name": "adamw", "momentum": 0.9}, "momentum is not an option of adamw (there are: betas, eps,"),
        ({"name": "lion", "use_gc": True}, "use_gc is not an option of lion (there are: "),  # it takes **kwargs
        ({"params": []}, "params is not an option of sgd (there are: "),
        ({"momentum": -1}, "sgd: Invalid momentum value: -1"),
        ({"momentum": "much"}, "momentum must be a number, not 'much'"),
        ({"momentum": True}, "momentum must be a number, not True"),
        ({"momentum": [0.9]}, "momentum must be a number, not [0.9]"),
        ({"momentum": 0.9, "nesterov": "maybe"}, "nesterov must be true or false, not 'maybe'"),
        ({"momentum": 0.9, "nesterov": 2}, "nesterov must be true or false, not 2"),
        ({"name": "adamw", "betas": [0.9, 0.95, 0.99]}, "betas must be a list of 2 numbers, not [0.9, 0.95, 0.99]"),
        ({"name": "adamw", "betas": 0.9}, "betas must be a list of 2 numbers, not 0.9"),
        ({"name": "adamw", "betas": [0.9, "x"]}, "betas must be a list of 2 numbers, not [0.9, 'x']"),
        ({"name": "adamw", "eps": -1e-8}, "adamw: Invalid epsilon value"),
        ({"name": "lion", "betas": [0.9, 0.99, 0.999]}, "lion: too many values to unpack"),
        ({"name": "ranger21"}, "ranger21: Ranger21.__init__() missing 1 required positional argument"),
        ({"name": "muon", "ns_steps": 2.5}, "ns_steps must be a whole number, not 2.5"),
        ({"name": "adafactor", "eps": ["x", 1e-3]}, "eps must be a list of 2 "),
        ({"name": "mars", "mars_type": "sgd"}, "mars_type must be one of adamw, lion, shampoo, not 'sgd'"),
        ({"momentum": {"value": 1}}, "momentum must be a finite number, a text, or a list of them, not {'value': 1}"),
        ({"momentum": math.nan}, "momentum must be a finite number, a text, or a list of them, not nan"),
        ({"nesterov": True}, "sgd: Nesterov momentum requires a momentum and zero dampening"),
        ({"name": "adam", "betas": [0.9]}, "betas must be a list of 2 numbers, not [0.9]"),
        ({"lr": 0}, "Input should be greater than 0"),
        ({"schedule": {"name": "cosine", "warmup_steps": 9, "total_steps": 9}}, "cosine needs more steps in total (9)"),
        ({"schedule": {"name": "linear", "warm_up": 9}}, "Extra inputs are not permitted"),
    ],
)
def test_errors(keys: dict[str, Any], message: str):
    assert complaint(**keys).startswith(message)


FRACTION = st.sampled_from([0, 0.0, 1e-4, 0.5, 0.9, 0.999, 1, 1.0, 1.5, -0.1])
OPTIONS = {
    "sgd": {"momentum": FRACTION, "dampening": FRACTION, "weight_decay": FRACTION, "nesterov": st.booleans()},
    "adam": {
        "betas": st.tuples(FRACTION, FRACTION),
        "eps": st.sampled_from([0.0, 1e-40, 1e-8, 1e-3, 1, -1e-8]),
        "weight_decay": FRACTION,
        "amsgrad": st.booleans(),
    },
}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_options_that_are_not_tried_are_right(data: st.DataObject):
    """The others are tried, and torch says what is wrong with them."""
    name = data.draw(st.sampled_from(["sgd", "adam", "adamw"]))
    options = data.draw(st.fixed_dictionaries({}, optional=OPTIONS["sgd" if name == "sgd" else "adam"]))
    if is_known_good(name, options):
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
        try_steps(kind, 1.0, options)


@pytest.mark.parametrize(
    ("name", "options", "good"),
    [
        ("sgd", {}, True),
        ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}, True),
        ("sgd", {"nesterov": True}, False),
        ("sgd", {"momentum": 0.9, "dampening": 0.5, "nesterov": True}, False),
        ("sgd", {"momentum": 1.0}, False),
        ("sgd", {"foreach": True}, False),
        ("adam", {"betas": (0.9, 0.95), "eps": 1e-8}, True),
        ("adam", {"betas": (0.9, 1.0)}, False),
        ("adam", {"eps": 0.0}, False),
        ("lion", {}, False),
    ],
)
def test_which_options_are_not_tried(name: str, options: dict[str, Any], good: bool):
    assert is_known_good(name, options) is good


@pytest.mark.parametrize(
    ("written", "read"),
    [("false", False), ("no", False), ("Off", False), ("true", True), ("ON", True), (True, True), (False, False)],
)
def test_a_quoted_truth_value_is_one(written: object, read: bool):
    """A text is true to whoever asks ``if nesterov``."""
    assert config(momentum=0.9, nesterov=written).options["nesterov"] is read
    assert (
        OptimizerConfig.model_validate(config(momentum=0.9, nesterov=written).model_dump()).options["nesterov"] is read
    )


def test_options_have_the_type_that_the_optimizer_asks_for():
    muon = config(name="muon", ns_steps="5e0", nesterov="no", ns_coefficients=["3.4", -4.7, 2], adjust_lr_fn="original")
    expected = {"ns_steps": 5, "nesterov": False, "ns_coefficients": (3.4, -4.7, 2), "adjust_lr_fn": "original"}
    assert muon.options == expected
    assert type(muon.options["ns_steps"]) is int
    assert config(name="adafactor", eps=[None, 1e-3]).options == {"eps": (None, 1e-3)}


def test_an_optimizer_that_does_not_fit_the_trial_is_not_blamed_for_its_options():
    """Whatever fails without options too has another reason, which the real parameters will show or not."""

    class Cubes(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            if any(one.dim() != 3 for group in self.param_groups for one in group["params"]):
                raise ValueError("cubes only")

    try_steps(Cubes, 0.1, {"momentum": 0.9})


def test_parameters_that_an_optimizer_does_not_take():
    with pytest.raises(StarlingError, match="optimizer: muon: Muon only supports 2D parameters"):
        build(config(name="muon"), [torch.zeros(3)])


# --- one flat tensor for many ---------------------------------------------------------------------------------------


def trained(section: OptimizerConfig, parameters: list[Tensor], gradients: list[list[Tensor]]) -> Tensor:
    optimizer = build(section, parameters)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return torch.cat([parameter.flatten() for parameter in parameters])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_elementwise_updates_do_not_see_shapes(name: str, dtype: torch.dtype):
    section = config(name=name, lr=0.03, **({} if name == "rprop" else {"weight_decay": 0.01}))
    assert is_elementwise(section)
    rng = torch.Generator().manual_seed(0)
    draws = [[torch.randn(shape, dtype=dtype, generator=rng) for shape in SHAPES] for _ in range(13)]
    start, gradients = draws[0], draws[1:]
    flat_start = torch.cat([values.flatten() for values in start])
    flat_gradients = [[torch.cat([values.flatten() for values in step])] for step in gradients]
    flat = trained(section, [flat_start.clone()], flat_gradients)
    assert torch.equal(flat, trained(section, [values.clone() for values in start], gradients))
    assert not torch.equal(flat, flat_start)


@pytest.mark.parametrize("name", ["lamb", "adafactor", "muon", "adan"])
def test_others_are_not_claimed_to_be_elementwise(name: str):
    assert not is_elementwise(config(name=name))


# --- schedules ------------------------------------------------------------------------------------------------------


def test_closed_forms():
    cosine = Schedule(name="cosine", warmup_steps=4, final_fraction=0.1)
    assert [cosine.factor(step, 104) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert cosine.factor(54, 104) == pytest.approx(0.55)
    assert cosine.factor(29, 104) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert cosine.factor(104, 104) == cosine.factor(500, 104) == pytest.approx(0.1)
    linear = Schedule(name="linear", final_fraction=0.5)
    assert [linear.factor(step, 4) for step in range(6)] == [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
    constant = Schedule(warmup_steps=2)
    assert [constant.factor(step, 1) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_total_steps_of_the_section_win():
    assert Schedule(name="linear", total_steps=10).factor(5, 1000) == 0.5


@pytest.mark.parametrize("step", [0, 5, 100])
def test_a_warmup_that_fills_all_steps(step: int):
    with pytest.raises(
        StarlingError, match=r"optimizer.schedule: cosine needs more steps in total \(8\) than warmup_s"
    ):
        Schedule(name="cosine", warmup_steps=8).factor(step, 8)


@given(
    name=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 20),
    rest=st.integers(1, 50),
    final=st.floats(0, 1),
)
def test_factors_rise_then_fall(name: str, warmup: int, rest: int, final: float):
    schedule = Schedule.model_validate({"name": name, "warmup_steps": warmup, "final_fraction": final})
    factors = [schedule.factor(step, warmup + rest) for step in range(warmup + rest + 3)]
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert factors[warmup] == 1.0
    assert all(0 < factor <= 1 for factor in factors[: warmup + rest])
    assert factors[-1] == pytest.approx(1.0 if name == "constant" else final)
