"""Probes: losses at several points that are compared, so that nothing but the point may make them differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from starling.algorithms.errors import ProgramError

if TYPE_CHECKING:
    from starling.actors.training.workbench import Workbench


_DROPOUTS = ("dropout", "attention_dropout")
"""Attributes that hold a layer's dropout rate when the layer calls a function, as attention and RNNs do."""


def check(bench: Workbench) -> None:
    """Raise ``ProgramError`` if losses of the model depend on chance, or change the model."""
    if not bench.can_be_probed:
        for name, layer in bench.shared.module.named_modules():
            reason = _reason(name, layer)
            if reason is not None:
                raise ProgramError(f"losses of this model cannot be compared: {reason}")
        bench.can_be_probed = True


def _reason(name: str, layer: nn.Module) -> str | None:
    """Return why a layer makes the loss depend on more than parameters and samples; ``None`` if it does not."""
    where = f"layer {name or type(layer).__name__}"
    drops = layer.p if isinstance(layer, nn.modules.dropout._DropoutNd) else 0.0  # noqa: SLF001 - all dropouts' base
    for attribute in _DROPOUTS:
        value = getattr(layer, attribute, None)
        drops = value if isinstance(value, float) and value > 0 else drops
    if drops > 0:
        return f"{where} has dropout {drops:g}; set it to 0"
    if getattr(layer, "running_mean", None) is not None:
        return f"{where} keeps running statistics, which each loss would move; use a layer or group norm"
    for part, parameter in layer.named_parameters(recurse=False):
        if not parameter.is_floating_point():
            what = str(parameter.dtype).removeprefix("torch.")
            return f"{where} has integer parameters ({part}, {what}), which cannot be moved a little; make them float"
    return None
