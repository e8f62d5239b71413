"""Checks of Hugging Face models: that a causal one sees no later token, and that what was written is the model.

Both are one forward pass of a few tokens in evaluation mode.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_TOKENS = 8
_TOLERANCE = 1e-4
"""Tolerance relative to the largest logit: rounding is below it, and what a model sees or has lost is above."""


def looks_ahead(module: Any, vocabulary: int) -> bool:  # noqa: ANN401 - transformers' own types
    """Whether the logits of a text's first token change with its last one."""
    one = torch.arange(_TOKENS).remainder(vocabulary).unsqueeze(0)
    other = one.clone()
    other[0, -1] = (one[0, -1] + max(1, vocabulary // 2)) % vocabulary
    first, second = (_in_evaluation(module, lambda tokens=tokens: _logits(module, tokens)) for tokens in (one, other))
    return _differ(first[0, : _TOKENS - 1], second[0, : _TOKENS - 1])


def outputs(module: Any, vocabulary: int) -> Tensor:  # noqa: ANN401 - as above
    """The logits of a few tokens."""
    tokens = torch.arange(2 * _TOKENS).remainder(vocabulary).view(2, _TOKENS)
    return _in_evaluation(module, lambda: _logits(module, tokens))


def difference(expected: Tensor, found: Tensor) -> float | None:
    """The largest difference of logits; ``None`` if it is but rounding."""
    if expected.shape != found.shape:
        return float("inf")
    return float((expected - found).abs().max()) if _differ(expected, found) else None


def untied(module: Any) -> Any:  # noqa: ANN401 - as above
    """A copy of an adapted model whose adapted layers share no weights with other layers.

    Merging an adapter adds it to the layer's weights: where head and embedding are one tensor, to those of both.
    """
    module = copy.deepcopy(module)
    owners: dict[int, int] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            owners[parameter.data_ptr()] = owners.get(parameter.data_ptr(), 0) + 1
    has_untied = False
    for layer in module.modules():
        base = getattr(layer, "base_layer", None)
        weight = getattr(base, "weight", None)
        if base is not None and weight is not None and owners.get(weight.data_ptr(), 0) > 1:
            base.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            has_untied = True
    if has_untied:
        for one in module.modules():
            config: Any = getattr(one, "config", None)
            if hasattr(config, "tie_word_embeddings"):
                config.tie_word_embeddings = False
    return module


def _logits(module: Any, tokens: Tensor) -> Tensor:  # noqa: ANN401 - as above
    device = next(module.parameters()).device
    return module(input_ids=tokens.to(device), attention_mask=torch.ones_like(tokens).to(device)).logits.float().cpu()


def _in_evaluation(module: Any, call: Callable[[], Tensor]) -> Tensor:  # noqa: ANN401 - as above
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return call()
    finally:
        module.train(was_training)


def _differ(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) > _TOLERANCE * float(one.abs().max().clamp(min=1e-6))
