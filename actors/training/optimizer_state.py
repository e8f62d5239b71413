"""The state of a torch optimizer as a state tree that can be kept, sent and loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from starling.algorithms.errors import ProgramError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from starling.algorithms.api import State
    from starling.algorithms.layout import Layout

_PARAMETERS = "params"
"""Key of a group's parameters in torch's state: they say which tensors, and remember nothing."""


def packed(optimizer: Optimizer) -> State:
    """A copy of ``optimizer.state_dict()`` with texts as keys and lists for tuples.

    Raises:
        ProgramError: it remembers something that is no tensor, number or text.
    """
    data = optimizer.state_dict()
    groups = [{key: value for key, value in group.items() if key != _PARAMETERS} for group in data["param_groups"]]
    state = {str(place): kept for place, kept in data["state"].items()}
    return _plain({"state": state, "groups": groups}, type(optimizer).__name__)


def unpack(optimizer: Optimizer, state: State) -> None:
    """Let a fresh optimizer remember what ``packed`` gave; it copies what it keeps."""
    kept = cast("dict[str, Any]", state)
    fresh = optimizer.state_dict()
    given_groups = kept["groups"] or [{}] * len(fresh["param_groups"])  # None: as they are
    groups = [
        group | {key: tuple(value) if isinstance(group.get(key), tuple) else value for key, value in given.items()}
        for group, given in zip(fresh["param_groups"], given_groups, strict=True)
    ]
    tensors = {int(place): _copied(one) for place, one in kept["state"].items()}
    optimizer.load_state_dict({"state": tensors, "param_groups": groups})


def taken_apart(state: State, layout: Layout) -> State:
    """Split the packed state of an optimizer of one flat parameter into the parameters of ``layout``."""
    kept = cast("dict[str, Any]", state)
    flat: dict[str, Any] = kept["state"].get("0", {})
    return {
        "groups": kept["groups"],
        "state": {
            str(place): {
                key: value[one.start : one.stop].view(one.shape) if _is_flat(value, layout) else value
                for key, value in flat.items()
            }
            for place, one in enumerate(layout.entries)
            if flat
        },
    }


def _is_flat(value: object, layout: Layout) -> bool:
    return isinstance(value, Tensor) and value.shape == (layout.num_values,)


def _plain(value: Any, name: str) -> State:  # noqa: ANN401 - whatever an optimizer keeps
    match value:
        case Tensor():
            return value.detach().clone()
        case bool() | int() | float() | str() | None:
            return value
        case list() | tuple():
            return [_plain(one, name) for one in cast("list[Any]", value)]
        case dict():
            return {str(key): _plain(one, name) for key, one in cast("dict[Any, Any]", value).items()}
        case _:
            raise ProgramError(
                f"optimizer {name} remembers a {type(value).__name__}, which can be neither kept nor sent; "
                "set optimizer.rollback: false and optimizer.on_join: fresh, or choose another optimizer"
            )


def _copied(value: Any) -> Any:  # noqa: ANN401 - as above
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_copied(one) for one in cast("list[Any]", value)]
    return value
