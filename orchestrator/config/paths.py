"""Paths through the models of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def model_in(model: type[BaseModel] | None, field: str) -> type[BaseModel] | None:
    """Return the model that a field holds, also as items of a list; None if it holds plain values."""
    info = model.model_fields.get(field) if model else None
    return next(_models(info.annotation), None) if info else None


def model_at(model: type[BaseModel] | None, path: Sequence[object]) -> type[BaseModel] | None:
    """Return the model at the end of ``path``, which may lead through lists; None if there is none."""
    for step in path:
        if not isinstance(step, int):
            model = model_in(model, str(step))
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:  # noqa: ANN401 - whatever an annotation may be
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
