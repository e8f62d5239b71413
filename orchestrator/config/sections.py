"""Sections of the configuration that other parts of a run know by name: the network, faults, checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from starling.algorithms.api import SERVER, NodeId
from starling.orchestrator.config.messages import shown
from starling.orchestrator.given_path import checked, shown_path

_STORAGE_SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "hdfs")


class Section(BaseModel):
    """A part of the file: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def _off(value: Any) -> AfterValidator:  # noqa: ANN401 - any scalar or list of a section
    """Accept only the value that switches a feature off, while it is not built."""

    def check(given: Any) -> Any:  # noqa: ANN401 - as above
        if given != value:
            written = "null" if value is None else "[]" if value == () else str(value)
            raise PydanticCustomError("not_built", "is not built yet; leave it at {off}", {"off": written})
        return given

    return AfterValidator(check)


class LinkConfig(Section):
    """One pair of nodes with a link of its own."""

    between: tuple[NonNegativeInt, NonNegativeInt]
    """The two nodes."""
    bandwidth_mbps: PositiveFloat | None = None
    """Bandwidth of this link, if lower than the nodes' own; ``null``: only theirs count."""
    latency_ms: NonNegativeFloat | None = None
    """Latency one way; ``null``: ``network.latency_ms``."""


class NetworkConfig(Section):
    """Bandwidths and latencies of the simulator's network, and of a cluster throttled to it.

    Other delays are the simulator's alone: on a cluster they are real.
    """

    bandwidth_mbps: PositiveFloat | None = None
    """Bandwidth of each node's access link, each way; ``null`` is infinite."""
    latency_ms: NonNegativeFloat = 0
    """Latency one way, between any two nodes."""
    links: tuple[LinkConfig, ...] = ()
    """Pairs of nodes with links of their own."""
    step_ms: NonNegativeFloat = 10
    """Duration of an optimizer step of a node of speed 1."""
    start_s: NonNegativeFloat = 5
    """Seconds until a node that is started, say in place of a lost one, is ready."""
    adopt_s: NonNegativeFloat = 0.5
    """Seconds until a warm spare that takes a lost node's place is ready."""
    speeds: dict[NonNegativeInt, PositiveFloat] = {}
    """Relative speed by node; 1 if not named."""


FaultPhase: TypeAlias = Literal["train", "post", "measure", "secure", "deliver", "receive", "commit", "transfer"]
"""The begin of a round; the node's first contribution; a step of an exchange, any of them; the node's first message
of the round; the round's end; before the round, when the node gives state to another or is given it. Rounds of
asynchronous runs are each node's own."""

SERVER_NAME = "server"


class FaultEvent(Section):
    """A fault of a node, once."""

    kind: Literal["kill", "hang", "preempt", "late_join"]
    """Kind: its process ends; it stands still and answers nothing; it is told to leave, and ends ``cluster.drain_s``
    later; or it joins at this moment."""
    node: NonNegativeInt | Literal["server"]
    round: NonNegativeInt
    phase: FaultPhase = "train"
    """Moment of the round."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.kind == "late_join" and (self.node == SERVER_NAME or self.phase != "train"):
            raise ValueError("late_join is of a node, not of the server, and at the begin of a round (phase: train)")
        return self

    @property
    def who(self) -> NodeId:
        """The node's id."""
        return self.node if isinstance(self.node, int) else SERVER


class FaultsConfig(Section):
    """Scheduled faults."""

    rate_per_hour: Annotated[float, _off(0)] = 0
    """Random losses per node."""
    seed: int = 0
    """Seed of the random losses."""
    events: tuple[FaultEvent, ...] = ()
    """Faults of nodes at given rounds."""

    @property
    def late(self) -> tuple[NodeId, ...]:
        """The nodes that a run begins without."""
        return tuple(sorted({event.who for event in self.events if event.kind == "late_join"}))


class CheckpointConfig(Section):
    """Place and cadence of checkpoints."""

    uri: str | None = None
    """Place of checkpoints: a folder, or an address that pyarrow.fs knows (``s3://bucket/folder``, ``gs://…``).
    Default: the run directory."""
    every_rounds: NonNegativeInt | Literal["auto"] = "auto"
    """Committed rounds between two; 0: never. ``auto``: as often as that costs less than a hundredth of the time."""
    every_s: PositiveFloat | None = None
    """Seconds between two, instead of rounds; the first commit after them is saved."""
    keep: PositiveInt = 3
    """Checkpoints that are kept."""

    @model_validator(mode="after")
    def _one_cadence(self) -> Self:
        if self.every_s is not None and self.every_rounds != "auto":
            raise ValueError("takes every_rounds or every_s, not both; leave out one of them")
        return self

    @field_validator("uri")
    @classmethod
    def _check_uri(cls, uri: str | None) -> str | None:
        scheme, colon, _ = (uri or "").partition("://")
        if colon and scheme not in _STORAGE_SCHEMES:
            known = ", ".join(f"{one}://" for one in _STORAGE_SCHEMES)
            raise ValueError(f"must be a folder or an address ({known}), got {shown(without_password(uri or ''))}")
        if uri is None or colon:
            return uri
        found, reason = checked(uri)
        if reason is not None:
            raise ValueError(f"must be a folder or an address, got {shown_path(uri)}: {reason}")
        return str(found)  # whoever resumes the run may stand in another folder

    @property
    def is_on(self) -> bool:
        """Whether checkpoints are written."""
        return self.every_rounds != 0


def without_password(uri: str) -> str:
    """Hide the password in an address.

    >>> without_password("postgresql://me:secret@host/runs")
    'postgresql://me:***@host/runs'
    """
    return re.sub(r"^([^:/]+://[^:@/]*):[^@]*@", r"\1:***@", uri)
