"""The page to read first: an algorithm is a program of one node.

An algorithm is written from the point of view of one node, as a coroutine that does one round. Everything that costs
compute or reaches outside the node is an *operation* that the program awaits::

    class LocalSGD(Algorithm, name="local_sgd"):
        steps: PositiveInt = 10

        async def round(self, node: Node) -> None:
            await Train(steps=self.steps)
            mean = await AllReduce(node.parameters)
            node.parameters.copy_(mean.value)

A coroutine cannot be stored, and need not be: a round is the unit of work. What must outlive a round lives in
``node.parameters``, ``node.buffers``, ``node.shared`` and ``node.local``, and nowhere else.

Rules that every program keeps:

* Assign to ``node.shared[…]`` and ``node.local[…]``; never write into what they hold. Assignments are staged, and
  become current when the round commits. ``node.parameters`` and ``node.buffers`` are written in place. A ``NodeState``
  gives keys types: ``Shared(node.shared).anchor``.
* Members may branch only on what all of them share (view, round, shared state, results), never on local state:
  collective operations are matched by their position in the program.
* Randomness comes from ``node.rng(purpose)``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from starling.algorithms.aggregators import Aggregator, Mean
from starling.algorithms.closing import ClosePolicy, Quorum
from starling.algorithms.codecs import Codec, Identity
from starling.algorithms.costs import INLINE_LIMIT_BYTES as INLINE_LIMIT_BYTES  # noqa: PLC0414 - offered here, as the next two
from starling.algorithms.costs import PART_BYTES as PART_BYTES  # noqa: PLC0414
from starling.algorithms.costs import all_reduce_bytes as all_reduce_bytes  # noqa: PLC0414
from starling.algorithms.errors import ProgramError
from starling.algorithms.layout import Layout
from starling.algorithms.noise import Perturbed as Perturbed  # noqa: PLC0414 - offered here
from starling.algorithms.registry import Part
from starling.algorithms.rules import DataBatch, Rule
from starling.algorithms.state import NodeState as NodeState  # noqa: PLC0414 - offered here
from starling.algorithms.topologies import Topology

if TYPE_CHECKING:
    from collections.abc import Callable

NodeId: TypeAlias = int
"""Names one logical participant for the whole run; a replacement process keeps the id."""

SERVER: NodeId = -1
"""The node that runs an algorithm's ``server`` program. It owns no data, and is no member of a view."""

State: TypeAlias = "Tensor | bool | int | float | str | Mapping[str, State] | Sequence[State] | None"
"""What ``node.shared`` and ``node.local`` may hold: it can be digested, stored without pickle, and handed over.

Mappings are ``dict``s and sequences ``list``s, no others; only so does a type checker take a ``list[int]``.
"""

Payload: TypeAlias = "Tensor | float | Mapping[str, Tensor | float]"
"""What may travel: a tensor, a number, or a flat mapping of them. Travels as raw buffers."""

T = TypeVar("T")
TensorsT = TypeVar("TensorsT", bound="Tensor | Mapping[str, Tensor]")
PayloadT = TypeVar("PayloadT", bound=Payload)

_MEAN, _IDENTITY, _QUORUM = Mean(), Identity(), Quorum()


# --- what a node looks like to its program --------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """The numbered set of members of a round."""

    number: int
    members: tuple[NodeId, ...]
    """Sorted."""
    joined: tuple[NodeId, ...] = ()
    """Members that were not in the committed set of the last committed round."""
    left: tuple[NodeId, ...] = ()
    """Members of the last committed round's view that are not in this one."""

    @property
    def changed(self) -> bool:
        """Whether anybody joined or left since the last committed round."""
        return bool(self.joined or self.left)


class Node(Protocol):
    """One logical participant, as its program sees it: replica, data and optimizer."""

    id: NodeId
    seed: int
    """The run's, the same on all nodes."""
    incarnation: int
    """Counts the processes that have embodied this node, from 0."""
    round: int
    num_rounds: int
    """How many the run is to do."""
    view: View
    participates: bool
    """Whether this node is in the round's cohort. One that is not awaits no ``Train`` and contributes ``None``."""
    num_samples: int
    """Training samples that this node owns; of one without a part of its own, those that it is handed, at least 1."""
    layout: Layout
    parameters: Tensor
    """The trainable values, flat and contiguous, shape (P,); the module's parameters are views into it."""
    buffers: Tensor
    """Floating-point buffers (batch-norm statistics), flat, shape (B,), often B = 0. Local unless averaged."""

    @property
    def committed(self) -> Tensor:
        """The parameters as of the last commit, shape (P,); not to be written to, and another's after the next."""
        ...

    @property
    def shared(self) -> MutableMapping[str, State]:
        """State that is bit-identical on all members."""
        ...

    @property
    def local(self) -> MutableMapping[str, State]:
        """State of this node alone."""
        ...

    @property
    def now(self) -> float:
        """The runtime's clock in seconds: virtual in the simulator."""
        ...

    def rng(self, purpose: str) -> torch.Generator:
        """A CPU generator that is a pure function of (run seed, round, node, purpose)."""
        ...

    def module(self, at: Tensor | None = None) -> Callable[..., Any]:
        """The model as a function of its inputs, at parameters ``at``, shape (P,), or at the current ones."""
        ...


# --- operations -----------------------------------------------------------------------------------------------------


class Operation(Generic[T]):
    """Something a program awaits; awaiting it returns its result of type ``T``.

    Plain generators, no event loop: ``await operation`` yields the operation itself to whoever drives the program,
    and returns what the driver sends back.
    """

    def __await__(self) -> Generator[Operation[T], T, T]:
        return (yield self)


class TrainReport(NamedTuple):
    """What a ``Train`` did."""

    loss: float
    """Mean over the samples; NaN when the node skips the round (``on_nan: skip``)."""
    num_samples: int
    """Those that were trained on: of the node's own part or, while others are away, of theirs."""
    num_steps: int
    seconds: float


@dataclass(frozen=True)
class Train(Operation[TrainReport]):
    """Take local optimizer steps on the node's own data: ``steps`` of them, or whole ``epochs``.

    With a ``rule`` each step uses the gradient that the rule gives, on the step's whole batch.
    """

    steps: int | None = None
    epochs: int | None = None
    rule: Rule | None = None

    def __post_init__(self) -> None:
        """Refuse anything but exactly one positive amount of work."""
        amount = self.epochs if self.steps is None else self.steps
        if amount is None or amount < 1 or (self.steps is not None and self.epochs is not None):
            message = f"Train takes either steps or epochs, at least 1; got steps={self.steps}, epochs={self.epochs}"
            raise ValueError(message)


@dataclass(frozen=True)
class Batch(Operation[DataBatch]):
    """Draw at most ``size`` samples (default: the configured batch size).

    From the node's own training data they are the next in its epoch. With ``part`` they come from the samples of that
    node, chosen at random without replacement: the same on all nodes that draw from a part in a round, call for call.
    Held-out data are drawn alike. With a ``key`` they depend on (run seed, part, key, size) alone, so that a later
    round can draw ``Batch(part=3, key="job 7")`` again.
    """

    source: Literal["train", "validation"] = "train"
    size: int | None = None
    part: NodeId | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        """Refuse a key without a part."""
        if self.key is not None and self.part is None:
            raise ValueError(f"Batch(key={self.key!r}) needs a part: only what is drawn from one can be drawn again")


@dataclass(frozen=True)
class GradientReport:
    """A gradient and the loss at the same point."""

    gradient: Tensor
    """Shape (P,)."""
    loss: float
    num_samples: int


@dataclass(frozen=True, eq=False)
class Gradient(Operation[GradientReport]):
    """The mean gradient at parameters ``at`` (default: the current ones) on ``batch`` (default: a fresh one).

    Shape (P,), a tensor of the program's own.
    """

    at: Tensor | None = None
    batch: DataBatch | None = None


@dataclass(frozen=True, eq=False)
class Step(Operation[TrainReport]):
    """Take one step of the node's optimizer along ``gradient``, shape (P,): clipped and scheduled as in ``Train``.

    For programs that combine gradients of several nodes first. The result has the loss and samples of ``report``, and
    no steps: their time is that of the ``Gradient``. Where all nodes step alike, their optimizers must have seen the
    same; with ``fresh`` each begins anew, as that of a joiner does.
    """

    gradient: Tensor
    report: GradientReport
    fresh: bool = False


@dataclass(frozen=True, eq=False)
class Loss(Operation[float]):
    """The mean loss at parameters ``at`` on ``batch``; defaults as for ``Gradient``. Forward only.

    At a ``Perturbed`` point each operation of the model takes its parameters perturbed, and they are dropped after it:
    what is in memory is the largest of them, and the bits are those at a tensor with the same values.

    With ``probe`` it is one of several that are compared with one another: a model whose loss depends on chance, or
    that keeps statistics, is refused with the layer's name, and a loss that is not finite is the program's to handle.
    """

    at: Tensor | Perturbed | None = None
    batch: DataBatch | None = None
    probe: bool = False


@dataclass(frozen=True, eq=False)
class Evaluate(Operation[dict[str, float]]):
    """The task's metrics on held-out data at parameters ``at``."""

    at: Tensor | None = None


@dataclass(frozen=True)
class Sleep(Operation[None]):
    """Let ``seconds`` of the runtime's clock pass."""

    seconds: float


@dataclass(frozen=True)
class Reduced(Generic[TensorsT]):
    """The result of an ``AllReduce``, identical on all members."""

    value: TensorsT
    """As the contributions: a tensor, or a dict of tensors."""
    members: tuple[NodeId, ...]
    """Whose contributions are in, sorted. For 1/N instead of 1/|members| scale by len(members)/len(view.members)."""
    weight: float
    """Sum of their weights."""


@dataclass(frozen=True, eq=False)
class AllReduce(Operation[Reduced[TensorsT]]):
    """Combine ``tensors`` of all members.

    A dict of tensors is closed over one set of contributors. ``None`` receives without contributing and does not
    count as a zero. ``buffers``, the node's, travel along; they are combined alike, and the result is written to them.
    Contributions are encoded by ``codec``, decoded and combined in sorted member order in float32
    (float64 if they are float64), and the result is encoded by ``result_codec`` before anybody, also its maker, sees
    it. The result has the contributions' dtypes and shapes.

    Bytes, when S of N members contribute b bytes each to a result of r bytes, each as encoded: (S−1)·b + (N−1)·r, or
    S·(N−1)·b up to ``INLINE_LIMIT_BYTES``.
    """

    tensors: TensorsT | None
    weight: float = 1.0
    aggregator: Aggregator = _MEAN
    codec: Codec = _IDENTITY
    result_codec: Codec = _IDENTITY
    close: ClosePolicy = _QUORUM
    buffers: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse weights with which there may be no mean, and names that the buffers' exchange needs."""
        if not 0 < self.weight < math.inf:
            message = f"AllReduce takes a weight above 0, and None instead of tensors for 0; got {self.weight}"
            raise ValueError(message)
        names = self.tensors if isinstance(self.tensors, Mapping) and self.buffers is not None else ()
        if "buffers" in names or "value" in names:
            raise ValueError("AllReduce with buffers= sends 'buffers' and 'value'; give its tensors other names")

    def __await__(self) -> Generator[Operation[Any], Any, Reduced[TensorsT]]:
        """Exchange tensors and buffers as one contribution, and write the combined buffers in place."""
        if self.buffers is None:
            return (yield self)
        both = None
        if self.tensors is not None:
            tensors = self.tensors if isinstance(self.tensors, Mapping) else {"value": self.tensors}
            both = {**tensors, "buffers": self.buffers}
        reduced = yield replace(self, tensors=both, buffers=None)
        combined: dict[str, Any] = dict(reduced.value)
        self.buffers.copy_(combined.pop("buffers"))
        return Reduced(combined.get("value", combined), reduced.members, reduced.weight)


@dataclass(frozen=True, eq=False)
class AllGather(Operation["dict[NodeId, PayloadT]"]):
    """Give every member every contribution: ``{node: payload}`` in sorted order, identical on all.

    Payloads may differ in shape between nodes. Bytes: (N−1)·Σ payload bytes; a number counts 8.
    """

    payload: PayloadT | None
    close: ClosePolicy = _QUORUM


@dataclass(frozen=True)
class Inbox(Generic[PayloadT]):
    """What a node received from its in-neighbours, and the mixing weights."""

    payloads: Mapping[NodeId, PayloadT]
    """By sender, sorted. Not to be written to: nodes of one process receive the same tensors."""
    weights: Mapping[NodeId, float]
    """This node's row of the mixing matrix, own weight included, sorted; they sum to 1."""
    mixed: Callable[[object, Tensor, str | None], Tensor | None] | None = field(default=None, repr=False, compare=False)
    """A runtime's own: gives what ``mix`` would, if it has worked that out for all its nodes at once."""

    def mix(self, own: Tensor, name: str | None = None) -> Tensor:
        """Σ w_j x_j over the inbox and ``own`` (whose weight is the one without a payload), in sorted order.

        Args:
            own: this node's values; its dtype and shape are the result's.
            name: of the tensor to mix, where payloads are mappings.
        """
        mixed = None if self.mixed is None else self.mixed(self.payloads, own, name)
        if mixed is not None:
            return mixed
        for node, weight in self.weights.items():
            payload: Any = self.payloads.get(node, own)
            values: Tensor = payload if payload is own or name is None else payload[name]
            # Product and sum are rounded apart: so are they when many nodes' are worked out at once.
            mixed = values * weight if mixed is None else mixed.add_(values * weight)
        assert mixed is not None, "a node has a weight of its own"
        return mixed


@dataclass(frozen=True, eq=False)
class NeighborAllGather(Operation[Inbox[PayloadT]]):
    """Give ``payload`` to this round's out-neighbours and receive those of the in-neighbours.

    The weights are the topology's rule on the graph of those that are really in, so that all nodes mix with rows of
    one matrix. Bytes: Σ over edges of the sender's payload; a number counts 8.
    """

    payload: PayloadT
    topology: Topology
    close: ClosePolicy = _QUORUM


@dataclass(frozen=True)
class Handle(Generic[T]):
    """A started operation. It belongs to its round: every handle must be waited for before the round returns."""

    sequence: int
    round: int


@dataclass(frozen=True, eq=False)
class Start(Operation[Handle[T]]):
    """Begin a collective operation and go on.

    What is contributed is taken now; it may alias ``node.parameters`` or ``node.buffers``, and other tensors in it must
    not be written to before the ``Wait``.
    """

    operation: Operation[T]

    def __post_init__(self) -> None:
        """Refuse an ``AllReduce`` with buffers, which would be written to behind the training's back."""
        operation: Any = self.operation
        if isinstance(operation, AllReduce) and operation.buffers is not None:
            raise ValueError("Start takes an AllReduce without buffers=; set averages_buffers to average them later")


@dataclass(frozen=True, eq=False)
class Wait(Operation[T]):
    """Return the result of a started operation; exactly once for each handle."""

    handle: Handle[T]


@dataclass(frozen=True, eq=False)
class Send(Operation[None]):
    """Put ``payload`` into the mailbox of ``to``. What is sent to a node that is gone is dropped.

    It counts as of the sender's round, whenever in it: a server that steps and then answers in the same round answers
    with the old version, by ``Message.staleness``. Let it answer at the begin of the next one (see ``fedbuff``).

    Bytes: those of the payload; a number counts 8.
    """

    to: NodeId
    payload: Payload


@dataclass(frozen=True)
class Message:
    """Something received."""

    sender: NodeId
    payload: Payload
    staleness: int
    """The receiver's round now, minus the receiver's round that the sender had last heard of when it sent."""
    round: int = 0
    """The sender's, in which it sent."""

    def tensor(self, name: str) -> Tensor:
        """Return the tensor ``name`` of a payload that is a mapping.

        Raises:
            ProgramError: the payload has none.
        """
        value = self._member(name)
        if not isinstance(value, Tensor):
            raise ProgramError(f"node {self.sender} sent {type(value).__name__} as {name!r}; it must be a tensor")
        return value

    def number(self, name: str) -> float:
        """Return the number ``name`` of a payload that is a mapping.

        Raises:
            ProgramError: the payload has none.
        """
        value = self._member(name)
        if isinstance(value, Tensor):
            raise ProgramError(f"node {self.sender} sent a tensor as {name!r}; it must be a number")
        return value

    def _member(self, name: str) -> Tensor | float:
        if not isinstance(self.payload, Mapping) or name not in self.payload:
            raise ProgramError(f"node {self.sender} sent a message without {name!r}")
        return self.payload[name]


@dataclass(frozen=True)
class Left:
    """A node is gone: told once to every other node, after what it had sent before."""

    node: NodeId


@dataclass(frozen=True)
class Timeout:
    """Nothing arrived in time."""


@dataclass(frozen=True)
class Receive(Operation[Message | Left | Timeout]):
    """Take the next message, waiting until ``until_s`` on ``node.now``'s clock (``None``: as long as it takes)."""

    until_s: float | None = None


@dataclass(frozen=True)
class Ping(Operation["frozenset[NodeId]"]):
    """Return those of ``nodes`` that answer within ``timeout_s``."""

    nodes: tuple[NodeId, ...]
    timeout_s: float


# --- algorithms -----------------------------------------------------------------------------------------------------


class Algorithm(Part, family="algorithm", catalog="starling.algorithms"):
    """A program of one node. Fields are hyper-parameters; a run's state lives in the node."""

    replicated: ClassVar[bool] = True
    """The shared state is bit-identical on all members, and checked at every commit."""
    synchronous: ClassVar[bool] = True
    """All members do the same round; otherwise each has its own, committed when its program returns.

    ``rounds`` of a run then counts the server's, or without a server those of the average node.
    """
    result: ClassVar[Literal["mean", "last"]] = "mean"
    """Without replicas or server a run ends with the mean of all ``model``s, or the last committer's (of a token)."""
    averages_buffers: ClassVar[bool] = False
    """Each round ends with the mean of all nodes' floating-point buffers, uncompressed: see ``whole_round``."""
    uses_optimizer: ClassVar[bool] = True
    """Rounds take steps of the nodes' own optimizers; otherwise there is no learning-rate schedule."""

    def validate_for(self, num_nodes: int) -> None:
        """Raise ``SettingsError`` if it cannot run on ``num_nodes`` nodes: if its topology cannot, say."""
        for part in dict(self).values():
            if isinstance(part, Topology):
                part.validate_for(num_nodes)

    def init(self, node: Node) -> None:
        """Make the initial state: before round 0, or on joining without a donor."""

    @abstractmethod
    async def round(self, node: Node) -> None:
        """Do one round."""

    async def server(self, node: Node) -> None:
        """Do one round of the coordinator, for asynchronous algorithms that have one: a program on one more node.

        That node is ``SERVER``; it has the model but no data, and meets the others in their mailboxes only.
        """
        raise NotImplementedError

    @property
    def has_server(self) -> bool:
        """Whether there is a ``server`` program; it then holds the run's model."""
        return type(self).server is not Algorithm.server

    def participants(self, view: View, rng: torch.Generator) -> tuple[NodeId, ...]:
        """Choose the round's cohort; ``rng`` is derived from (seed, round), so that all members choose alike."""
        del rng
        return view.members

    async def on_view_change(self, node: Node) -> None:
        """Repair what a change of membership breaks.

        Runs before ``round``, as its first part, on all members when the view changed; not in a run's first round.
        """

    async def join(self, node: Node) -> None:
        """Run after a state transfer, on the joiner."""

    def unsent(self, node: Node) -> float:
        """The norm of what ``node`` has left out of what it sent, and will send later; it is lost with the node."""
        del node
        return 0.0

    def sealed(self, node: Node) -> bytes | None:
        """What the run's log keeps of the round that ``node`` has just done, the same on all members: a few bytes."""

    @property
    def steps_at_commit(self) -> bool:
        """Whether rounds leave ``node.parameters`` alone, and ``replay`` does to them what ``sealed`` says on commit.

        Nodes then keep no committed copy of the parameters, as there is nothing to go back to.
        """
        return False

    def replay(self, node: Node, record: bytes) -> None:
        """Do to ``node``'s parameters and shared state what the round of ``record``, ``node.round``, did to them."""
        raise NotImplementedError

    def model(self, node: Node) -> Tensor:
        """The parameters that are evaluated, saved and digested, shape (P,); see ``result`` if not replicated."""
        return node.parameters

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int | None:
        """Return the payload bytes of one round over all nodes, without losses; ``None``: not known in advance.

        The mean of ``averages_buffers`` is not among them: see ``buffer_bytes``. The rounds of an asynchronous
        algorithm are those that a run's ``rounds`` count.
        """
        del layout, num_nodes
        return None

    def round_bytes(self, layout: Layout, num_nodes: int, number: int, num_rounds: int) -> int | None:
        """Return the payload bytes of round ``number`` of ``num_rounds``, if rounds differ; ``None``: not known.

        ``expected_bytes`` is then a typical round's.
        """
        del number, num_rounds
        return self.expected_bytes(layout, num_nodes)

    def buffer_bytes(self, layout: Layout, num_nodes: int) -> int:
        """Return the payload bytes of the mean of buffers that ends a round with ``averages_buffers``, else 0."""
        return all_reduce_bytes(layout.buffer_nbytes, num_nodes) if self.averages_buffers else 0

    def steps_per_round(self, num_samples: int, batch_size: int) -> int | None:
        """Return the local steps of a node in one round, at ``batch_size`` samples to a step; ``None``: not known.

        By default the field ``inner_steps`` or ``steps`` says it, or else ``epochs``: an algorithm with other rounds
        overrides this. Plans and learning-rate schedules need the steps. Where they are not known, a schedule needs
        its own ``optimizer.schedule.total_steps``. 0: no step of the node's optimizer, as without ``uses_optimizer``.
        """
        if not self.uses_optimizer:
            return 0
        fields = dict(self)
        steps = fields.get("inner_steps") or fields.get("steps")
        if isinstance(steps, int):
            return steps
        epochs = fields.get("epochs")
        return epochs * math.ceil(num_samples / batch_size) if isinstance(epochs, int) else None

    def node_rounds(self, num_nodes: int) -> float:
        """Rounds that a node does in one of the run, on average; another number than 1 only where a server counts."""
        del num_nodes
        return 1.0


async def whole_round(algorithm: Algorithm, node: Node, *, joins: bool = False, repairs: bool = False) -> None:
    """Run one round of a node with all that the contract puts around ``Algorithm.round``.

    ``join`` comes first on a node that was given another's state, then ``on_view_change`` where the view has changed.
    With ``averages_buffers`` the round ends with the mean of all nodes' floating-point buffers.
    """
    if joins:
        await algorithm.join(node)
    if repairs:
        await algorithm.on_view_change(node)
    await algorithm.round(node)
    if algorithm.averages_buffers and node.buffers.numel():
        node.buffers.copy_((await AllReduce(node.buffers)).value)
