"""The inner optimizer: the ``optimizer`` section of the configuration, and what is built from it.

Any optimizer of ``torch.optim`` or, where torch has none of the name, of ``pytorch_optimizer``; its own options are
further keys of the section, checked against its signature::

    optimizer: {name: adamw, lr: 3.0e-4, betas: [0.9, 0.95], schedule: cosine}

Optimizers that local training cannot serve are left out. A step here is one gradient, taken from one batch, at the
parameters that are also evaluated and exchanged. It draws random numbers from its node's generator alone.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any, Literal, Self, cast

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from torch import Tensor
from torch.optim import Optimizer

from starling.actors.training.optimizer_options import Option, is_known_good, options_of, read_option, try_steps
from starling.algorithms.errors import SettingsError, StarlingError
from starling.algorithms.registry import did_you_mean

ELEMENTWISE = frozenset(
    {
        *("sgd", "adam", "adamw", "adamax", "nadam", "radam", "rmsprop", "rprop", "adagrad", "adadelta", "asgd"),
        *("lion", "tiger", "signsgd", "adabelief", "yogi", "laprop", "qhadam", "qhm"),
    }
)
"""Optimizers whose update of one value depends on that value's own history alone, with all of their options."""

_REFUSED = {
    "calls the loss more than once per step (a closure)": (
        *("lbfgs", "alig", "bsam", "sam", "asam", "gsam", "wsam", "looksam", "fsam", "esam"),
    ),
    "needs second derivatives": ("adahessian", "sophiah"),
    "takes a model, not parameters": ("lomo", "adalomo", "adammini"),
    "takes sparse gradients only": ("sparseadam",),
    "draws from the global random generators": ("dash", "gravity", "kron", "magma", "sara", "spam"),
    "evaluates the model at other parameters than it trains": (
        *("schedulefreeadamw", "schedulefreeradam", "schedulefreesgd", "splus"),
    ),
}


_OTHER_LR = 0.01
"""Default learning rate of optimizers other than SGD."""


class Schedule(BaseModel):
    """Learning-rate schedule: a linear warm-up over ``warmup_steps`` (w), then a shape to the last step (T).

    With p = (step − w) / (T − w), and f = ``final_fraction``, step counted from 0:

        warm-up   (step + 1) / w
        constant  1
        linear    f + (1 − f) (1 − p)
        cosine    f + (1 − f) (1 + cos πp) / 2

    From step T on it stays f. Steps are those of the run (``actors.replica.pace``): all nodes are at the same one,
    whichever rounds they have been in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: NonNegativeInt = 0
    total_steps: PositiveInt | None = None  # T; null: those of the whole run
    final_fraction: float = Field(default=0.0, ge=0, le=1)  # of lr

    @model_validator(mode="before")
    @classmethod
    def _accept_a_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_total(self) -> Self:
        if self.total_steps is not None and not self._fits(self.total_steps):
            raise PydanticCustomError("schedule", "{text}", {"text": self._complaint(self.total_steps)})
        return self

    @property
    def is_flat(self) -> bool:
        """Whether the learning rate is the same at every step."""
        return self.name == "constant" and not self.warmup_steps

    def factor(self, step: float, total_steps: float) -> float:
        """Return the factor of the learning rate at ``step``; ``total_steps`` serves where the field is null.

        >>> schedule = Schedule(name="linear", warmup_steps=2)
        >>> [schedule.factor(step, total_steps=6) for step in range(8)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

        Raises:
            SettingsError: the warm-up would fill all of the steps; true of every step or of none.
        """
        total = self.total_steps or total_steps
        if not self._fits(total):
            raise SettingsError(f"optimizer.schedule: {self._complaint(total)}")
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "constant":
            return 1.0
        progress = min((step - self.warmup_steps) / (total - self.warmup_steps), 1.0)
        falling = 1 - progress if self.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.final_fraction + (1 - self.final_fraction) * falling

    def _fits(self, total_steps: float) -> bool:
        return self.name == "constant" or total_steps > self.warmup_steps

    def _complaint(self, total_steps: float) -> str:
        return f"{self.name} needs more steps in total ({total_steps:.10g}) than warmup_steps ({self.warmup_steps})"


class OptimizerConfig(BaseModel):
    """The ``optimizer`` section; keys that are not fields are options of the optimizer that is named."""

    model_config = ConfigDict(frozen=True, extra="allow", validate_default=True, allow_inf_nan=False)

    name: str = "sgd"  # as in torch.optim or pytorch_optimizer; case and underscores do not matter
    lr: PositiveFloat = 0.1  # where another optimizer than sgd is named, 0.01
    schedule: Schedule = Schedule()
    grad_clip: PositiveFloat | None = None  # greatest norm of the gradient of all parameters together
    accumulate: PositiveInt = 1  # batches per optimizer step
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"  # bf16: by autocast, over fp32 parameters
    compile: bool = False  # the model through torch.compile; takes a C++ compiler, or on a GPU Triton
    rollback: bool = False  # of its state, with a round that is repeated or cancelled; costs a copy at each commit
    on_join: Literal["fresh", "donor"] = "fresh"  # what a node begins with that takes over another's model

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            return value
        keys = cast("dict[str, object]", value)
        if isinstance(name := keys.get("name"), str) and _plain(name) != "sgd":
            keys = {"lr": _OTHER_LR} | keys  # their steps do not shrink as gradients do
        types = _types_of(keys.get("name", cls.model_fields["name"].default))
        return {
            key: field if key in cls.model_fields else read_option(key, field, types.get(key, inspect.Parameter.empty))
            for key, field in keys.items()
        }

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        _resolve(name)
        return name

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        kind = _resolve(self.name)
        known = options_of(kind)
        for option in self.options:
            if option not in known:
                hint = did_you_mean(option, [*known, *type(self).model_fields])
                text = f"{option} is not an option of {self.name}{hint}"
                raise PydanticCustomError("unknown_option", "{text}", {"text": text})
        if is_known_good(_plain(self.name), self.options):
            return self
        try:
            # Two dimensions: some optimizers are for matrices alone.
            _construct(self, [torch.zeros(2, 2)])
            try_steps(kind, self.lr, self.options)
        except StarlingError as error:
            raise PydanticCustomError("bad_option", "{text}", {"text": str(error)}) from None
        return self

    @property
    def options(self) -> dict[str, Option]:
        """The optimizer's own options that are set."""
        return dict(self.model_extra or {})


def build(config: OptimizerConfig, parameters: list[Tensor]) -> Optimizer:
    """The optimizer that ``config`` describes, for ``parameters``, at the full learning rate.

    Raises:
        SettingsError: the optimizer does not take such parameters.
    """
    try:
        return _construct(config, parameters)
    except StarlingError as error:
        raise SettingsError(f"optimizer: {error}") from None


def is_elementwise(config: OptimizerConfig) -> bool:
    """Whether one flat tensor may stand for many: the updates are the same, bit for bit."""
    return _plain(config.name) in ELEMENTWISE


def _construct(config: OptimizerConfig, parameters: list[Tensor]) -> Optimizer:
    kind = cast("Any", _resolve(config.name))
    try:
        return kind(parameters, lr=config.lr, **config.options)
    except Exception as error:  # noqa: BLE001 - optimizers report a bad value with whatever exception they like
        raise SettingsError(f"{config.name}: {' '.join(str(error).split())}") from None


@functools.cache
def _resolve(name: str) -> type[Optimizer]:
    """The class of an optimizer.

    Raises:
        PydanticCustomError: there is none of that name, or it cannot be used here.
    """
    plain = _plain(name)
    for reason, names in _REFUSED.items():
        if plain in names:
            text = f"{name} {reason}, and local training cannot serve that; choose another optimizer"
            raise PydanticCustomError("refused_optimizer", "{text}", {"text": text})
    kinds = _torch_optimizers()
    if plain not in kinds:
        kinds = _other_optimizers() | kinds
    if plain not in kinds:
        refused = {name for names in _REFUSED.values() for name in names}
        hint = did_you_mean(plain, sorted(set(kinds) - refused))
        text = f"no optimizer is called {name!r} in torch.optim or pytorch_optimizer{hint}"
        raise PydanticCustomError("unknown_name", "{text}", {"text": text})
    return kinds[plain]


def _torch_optimizers() -> dict[str, type[Optimizer]]:
    classes = [value for value in vars(torch.optim).values() if inspect.isclass(value)]
    return {kind.__name__.lower(): kind for kind in classes if issubclass(kind, Optimizer) and kind is not Optimizer}


def _other_optimizers() -> dict[str, type[Optimizer]]:
    from pytorch_optimizer import get_supported_optimizers, load_optimizer

    return {_plain(name): cast("type[Optimizer]", load_optimizer(name)) for name in get_supported_optimizers()}


def _types_of(name: object) -> dict[str, Any]:
    """The options of an optimizer and their types; none of a name that is refused anyway."""
    try:
        return options_of(_resolve(name)) if isinstance(name, str) else {}
    except PydanticCustomError:
        return {}


def _plain(name: str) -> str:
    return name.lower().replace("_", "")
