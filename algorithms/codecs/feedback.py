"""Check that lossy codecs are used with error feedback, and unbiased ones without."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starling.algorithms.codecs.base import Codec


def refuse_lossy(codec: Codec, result_codec: Codec, *, feedback: bool | None) -> None:
    """Refuse codecs with which something would never arrive; ``feedback`` is ``None`` where there is no such field.

    Raises:
        ValueError: says which would do.
    """
    if codec.needs_feedback and not feedback:
        cure = "take fp4, int8, bf16 or identity"
        if feedback is not None:
            cure = f"set error_feedback: true, or {cure}"
        raise ValueError(f"codec: what {codec.name} leaves out would never be sent; {cure}")
    if feedback and not codec.is_contraction:
        raise ValueError(
            f"error_feedback: the errors of {codec.name} cancel, and would grow if fed back; set it to false"
        )
    if result_codec.needs_feedback:
        why = "nobody keeps what it leaves out of a result"
        raise ValueError(f"result_codec: {result_codec.name} needs error feedback, and {why}; take fp4, int8 or bf16")
