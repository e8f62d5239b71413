"""The node actor: a process on a cluster that hosts one or several nodes.

A plain class that ``remote_class`` wraps (Ray's actor classes cannot be derived from). Its methods run in five
concurrency groups of one thread each: *compute* drives programs, *exchange* moves and reduces bytes, so that an
exchange proceeds while a program trains, *state* hands over what is saved, *control* is never behind any of these, and
*watch* parks one call whose failure tells the controller that the process is gone.

Calls carry the epoch that they belong to. Whatever belongs to an older one is answered with nothing done.
"""

from __future__ import annotations

import gc
import os
import platform
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from pydantic import ValidationError

from starling.actors import IMPORTED_AT
from starling.actors.data import DataConfig
from starling.actors.host.build import build_replicas, load_data
from starling.actors.host.compatibility import difference
from starling.actors.host.failures import failure
from starling.actors.host.host import Host
from starling.actors.host.node_log import Tee
from starling.actors.host.recorded_clock import Times
from starling.actors.remote.messages import (
    DeliveredResult,
    Expected,
    Inline,
    Letter,
    Ready,
    Reply,
    Round,
    SecureJob,
    Setup,
)
from starling.actors.remote.state_calls import StateCalls
from starling.actors.remote.system_metrics import Usage
from starling.actors.replica.replica import Replica
from starling.actors.replica.spec import ReplicaSpec
from starling.actors.tasks import Task
from starling.actors.training.optimizers import OptimizerConfig
from starling.actors.wire.tickets import Failed, Posted, Secured, Stale, Ticket
from starling.algorithms.api import Algorithm, Layout, Message
from starling.algorithms.errors import StarlingError
from starling.algorithms.registry import carry, problems

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray import ObjectRef

    from starling.actors.wire.buffers import Buffer
    from starling.algorithms.api import NodeId

# --- the actor --------------------------------------------------------------------------------------------------------


class NodeActor(StateCalls):
    """Hosts nodes in one process; see the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self._began = IMPORTED_AT
        self._notice = threading.Event()
        self._noticed = False
        self._drain_s = 0.0
        # Ray runs this in the process's main thread, which alone may set handlers. Ray's own would end it at once.
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._usage = Usage()
        self._epoch = -1
        self._reduced: dict[tuple[int, int], Buffer] = {}
        self._results: dict[int, list[Buffer]] = {}
        self._gathered: dict[int, dict[NodeId, Buffer]] = {}

    def _on_sigterm(self, *_: object) -> None:
        """Notice of the end: the controller is told, and ends this process when it has handed over what it holds."""
        if self._noticed or not self._drain_s:
            os._exit(128 + signal.SIGTERM)  # asked twice, or nothing to hand over
        self._noticed = True
        self._notice.set()
        # A controller that is gone, or too slow, must not keep it.
        timer = threading.Timer(self._drain_s, os._exit, [128 + signal.SIGTERM])
        timer.daemon = True
        timer.start()

    # --- compute -----------------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="compute")
    def setup(self, setup: Setup) -> Ready | Failed:
        """Get ready, and build the replicas if there are to be any. What a user's task raises comes back as data."""
        # One thread: nodes of one machine share its cores, and the order of additions in a matrix product, hence the
        # bits of the result, depends on the number of threads.
        torch.set_num_threads(1)
        unlike = difference(setup.versions)
        if unlike is not None:
            return Failed(f"{self._place()} cannot take part: {unlike}", None)
        # In the driver's order: a user's types.py must not hide the library's here if it does not there.
        driver = [folder for folder in setup.sys_path if Path(folder).exists()]
        sys.path[:] = [*driver, *(folder for folder in sys.path if folder not in driver)]
        carry(setup.parts)
        self._setup = setup
        self._fetch_timeout_s = setup.fetch_timeout_s
        try:
            self._spec = ReplicaSpec(
                algorithm=Algorithm.model_validate(setup.algorithm),
                task=Task.model_validate(setup.task),
                optimizer=OptimizerConfig.model_validate(setup.optimizer),
                batch_size=setup.data["batch_size"],
                seed=setup.seed,
                rounds=setup.rounds,
                skip_nan=setup.skip_nan,
                min_batch=setup.data["min_batch"],
            )
            self._data = load_data(self._spec.task, DataConfig.model_validate(setup.data), setup.num_nodes, setup.seed)
            if not setup.nodes:
                self._spec.bench(torch.device("cpu"))  # what a first model imports and compiles is there from now on
        except StarlingError as error:
            return Failed(str(error), None)
        except ValidationError as error:
            return Failed(f"{self._place()}: {'; '.join(problems(error.errors()))}", None)
        except Exception as error:  # noqa: BLE001 - whatever a user's task raises is data here
            return failure(setup.nodes[0] if setup.nodes else 0, 0, error)
        if setup.nodes:
            return self._embody(setup.nodes, setup.incarnation)
        self._drain_s = setup.drain_s
        return self._ready([], [], (), (), {})

    @ray.method(concurrency_group="compute")
    def embody(self, nodes: Sequence[NodeId], incarnation: int) -> Ready | Failed:
        """Build the replicas of ``nodes``, in their initial state, in a process that stands by."""
        self._began = time.monotonic()  # it was there before it was needed
        return self._embody(nodes, incarnation)

    def _embody(self, nodes: Sequence[NodeId], incarnation: int) -> Ready | Failed:
        devices, gpus, warnings = _pin_devices(len(nodes))
        try:
            times = Times()
            replicas = build_replicas(nodes, self._spec, self._data, devices, times, incarnation)
            self._host = Host(replicas, times)
            if not self._spec.algorithm.synchronous:
                times.record()
            self._redirect_output()
            self._host.init()
            baselines = self._spec.task.baselines(self._setup.num_nodes)
        except StarlingError as error:
            return Failed(str(error), None)
        except Exception as error:  # noqa: BLE001 - whatever a user's task raises is data here
            return failure(nodes[0], 0, error)
        gc.freeze()  # what is here now stays; collections need not walk it again
        self._drain_s = self._setup.drain_s
        return self._ready(replicas, devices, gpus, warnings, baselines)

    def _ready(
        self,
        replicas: Sequence[Replica],
        devices: Sequence[torch.device],
        gpus: tuple[str, ...],
        warnings: tuple[str, ...],
        baselines: dict[str, float],
    ) -> Ready:
        nodes = [replica.id for replica in replicas]
        return Ready(
            place=self._place(),
            devices=dict(zip(nodes, map(str, devices), strict=True)),
            gpus=gpus,
            num_samples={replica.id: replica.num_samples for replica in replicas},
            layout=replicas[0].layout if replicas else Layout((), torch.float32),
            baselines=baselines,
            warnings=warnings,
            part_sizes=self._data.part_sizes,
            fingerprint=self._data.fingerprint(),
            pid=os.getpid(),
            machine=ray.get_runtime_context().get_node_id(),
            import_s=time.monotonic() - self._began,
        )

    @staticmethod
    def _place() -> str:
        return f"pid {os.getpid()} on {ray.util.get_node_ip_address()} ({platform.node()})"

    def _redirect_output(self) -> None:
        """Copy what is printed to the log of the node whose code is running."""
        sys.stdout = Tee(sys.stdout, self._host.logs)
        sys.stderr = Tee(sys.stderr, self._host.logs)

    @ray.method(concurrency_group="compute")
    def begin(self, round_: Round, nodes: Sequence[NodeId], expected: Expected | None = None) -> Reply | list[Any]:
        """Begin a round and run the programs to their first exchange."""
        self._epoch = round_.epoch
        self._forget()
        self._host.begin(
            round_.number,
            round_.view,
            round_.committed,
            nodes,
            repair=round_.repair,
            joiners=round_.joiners,
            places=round_.places,
            seen=round_.seen,
        )
        return self._with_parts(self._reply(self._host.drive([(node, None) for node in nodes])), expected)

    @ray.method(concurrency_group="compute")
    def advance(
        self,
        epoch: int,
        seq: int,
        nodes: Sequence[NodeId],
        result: Inline | DeliveredResult,
        expected: Expected | None = None,
    ) -> Reply | list[Any]:
        """Run programs on with the result of a closed exchange."""
        if epoch != self._epoch:
            return self._with_parts(Reply([(node, Stale()) for node in nodes]), expected)
        if not self._host.exchanges.is_concluded(seq):
            self._conclude(nodes[0], seq, result)
        self._host.exchanges.release(seq)
        self._results.pop(seq, None)
        self._gathered.pop(seq, None)
        # The store's memory is free again as soon as nothing here refers to it.
        self._reduced = {key: part for key, part in self._reduced.items() if key[0] != seq}
        reply = self._reply(self._host.drive([(node, self._host.exchanges.take(node, seq)) for node in nodes]))
        return self._with_parts(reply, expected)

    def _conclude(self, node: NodeId, seq: int, result: Inline | DeliveredResult) -> None:
        if isinstance(result, Inline):
            self._host.exchanges.conclude_inline(node, seq, result.contributions, result.closed)
        elif result.specs is not None:
            self._host.exchanges.conclude_reduce(node, seq, result.specs, result.weights, self._results[seq])
        else:
            kept = self._gathered[seq]
            specs = sorted(result.gathered.items())
            received = {one: self._host.unpack(node, form, kept[one]) for one, form in specs if one in kept}
            self._host.exchanges.conclude_gather(node, seq, received, result.weights)

    @ray.method(concurrency_group="compute")
    def run_on(self, epoch: int, items: Sequence[tuple[NodeId, object]]) -> Reply:
        """Run programs on with results that need no conversion: after a ``Start``, ``Send``, ``Sleep`` or ``Ping``."""
        if epoch != self._epoch:
            return Reply([(node, Stale()) for node, _ in items])
        return self._reply(self._host.drive(items))

    @ray.method(concurrency_group="compute")
    def receive(self, epoch: int, node: NodeId, letter: Letter) -> Reply | None:
        """Run a program on with a message; ``None`` if its payload is nowhere to be had."""
        if epoch != self._epoch:
            return Reply([(node, Stale())])
        data = letter.inline
        if data is None:
            fetched = self._fetch(dict(enumerate(letter.ref)))
            if not fetched:
                return None
            data = fetched[0]
        payload = self._host.unpack(node, letter.specs, data)
        message = Message(letter.sender, payload, letter.staleness, letter.round)
        return self._reply(self._host.drive([(node, message)]))

    def _with_parts(self, reply: Reply, expected: Expected | None) -> Reply | list[Any]:
        """The reply, with the contributions that it tells of as values of their own if they are the expected ones."""
        if expected is None:
            return reply
        posted = {node: ticket for node, ticket in reply.tickets if isinstance(ticket, Posted)}
        as_expected = all(
            node in posted
            and (posted[node].seq, len(posted[node].part_nbytes)) == (expected.seq, expected.num_parts)
            and posted[node].inline is None
            for node in expected.nodes
        )
        if not as_expected:
            return [reply, *([None] * expected.num_values)]
        contributions = [self._host.exchanges.parts(node, expected.seq) for node in expected.nodes]
        values = [contribution[part] for contribution in contributions for part in expected.parts]
        return [replace(reply, posted=expected.seq), *values]

    def _reply(self, tickets: list[tuple[NodeId, Ticket]]) -> Reply:
        return Reply(tickets, self._host.logs.drain(), self._host.times.drain())

    def _forget(self) -> None:
        self._reduced, self._results, self._gathered = {}, {}, {}
        self._gone = set()

    @ray.method(concurrency_group="compute")
    def settle(self, committed: Mapping[NodeId, int]) -> bool:
        """Apply the controller's commits."""
        self._host.settle(committed)
        return True

    @ray.method(concurrency_group="compute")
    def halt(self, nodes: Sequence[NodeId]) -> list[NodeId]:
        """Close programs that were cancelled; they stand still when this returns."""
        self._host.cancel(nodes)
        return list(nodes)

    # --- exchange ----------------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="exchange")
    def post(self, epoch: int, seq: int, nodes: Sequence[NodeId], parts: Sequence[int]) -> list[Any]:
        """Put ``parts`` of contributions into the store: an acknowledgement, then each part of each node as a value."""
        if epoch != self._epoch:
            return [False, *([None] * (len(parts) * len(nodes)))]
        contributions = [self._host.exchanges.parts(node, seq) for node in nodes]
        return [True, *(contribution[part] for contribution in contributions for part in parts)]

    @ray.method(concurrency_group="exchange")
    def secure(self, epoch: int, jobs: Sequence[SecureJob]) -> list[Any]:
        """Fetch and reduce: what each job got and the bytes fetched, then each reduced part as a value of its own."""
        if epoch != self._epoch:
            return [([], 0), *([None] * len(jobs))]
        secured: list[Secured] = []
        parts: list[Buffer | None] = []
        nbytes = 0
        for job in jobs:
            fetched = self._fetch(job.refs)
            nbytes += sum(part.nbytes for part in fetched.values())
            for member in job.weights.keys() - job.refs.keys():
                fetched[member] = self._host.exchanges.parts(member, job.seq)[job.part]
            if job.specs is None:
                self._gathered[job.seq] = fetched
                parts.append(None)
            else:
                contributions = {member: (part, job.weights[member]) for member, part in fetched.items()}
                reduced = self._host.exchanges.reduce(job.by, job.seq, job.part, job.specs, contributions)
                self._reduced[job.seq, job.part] = reduced
                parts.append(reduced)
            secured.append(Secured(job.seq, job.part, job.by, frozenset(fetched), job.generation))
        return [(secured, nbytes), *parts]

    @ray.method(concurrency_group="exchange")
    def deliver(
        self,
        epoch: int,
        seq: int,
        refs: Mapping[int, ObjectRef[Any]],
        makers: Sequence[NodeId],
        ahead: tuple[NodeId, DeliveredResult] | None,
    ) -> tuple[frozenset[int], int]:
        """Fetch the parts of a result that were made elsewhere; return the missing ones and the bytes fetched.

        With ``ahead``, a node of this process and what is known of the result, that is worked out here and now, while
        the programs that started the exchange train.
        """
        if epoch != self._epoch:
            return frozenset(), 0
        by_part = {part: makers[part] for part in refs}
        fetched = self._fetch(refs, sources=by_part)
        missing = frozenset(refs.keys() - fetched.keys())
        if not missing:
            self._results[seq] = [
                fetched[part] if part in fetched else self._reduced[seq, part] for part in range(len(makers))
            ]
            if ahead is not None:
                self._conclude(ahead[0], seq, ahead[1])
        return missing, sum(part.nbytes for part in fetched.values())

    # --- control and watch -------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="control")
    def post_late(self, epoch: int, seq: int, node: NodeId, part: int) -> Buffer | None:
        """Put one part into the store that was not expected to be needed outside this process.

        Not in the exchange group: two processes that fetch such parts from one another would wait for each other.
        """
        return self._host.exchanges.parts(node, seq)[part] if epoch == self._epoch else None

    @ray.method(concurrency_group="exchange")
    def outbox(self, letter: int) -> list[Any]:
        """Put a large message into the store: an acknowledgement, then the payload as a value of its own."""
        return [True, self._host.outbox.take(letter)]

    @ray.method(concurrency_group="control")
    def discard(self, letter: int) -> None:
        """Drop a large message that nobody will fetch."""
        self._host.outbox.discard(letter)

    @ray.method(concurrency_group="control")
    def hang(self) -> None:
        """Stand still, all threads of this process, as a fault would have it."""
        os.kill(os.getpid(), signal.SIGSTOP)

    @ray.method(concurrency_group="control")
    def preempt(self) -> None:
        """Give this process notice of its end, as a cloud would."""
        os.kill(os.getpid(), signal.SIGTERM)

    @ray.method(concurrency_group="control")
    def ping(self) -> str:
        """Answer with Ray's name of this machine."""
        return ray.get_runtime_context().get_node_id()

    @ray.method(concurrency_group="control")
    def usage(self) -> dict[str, float]:
        """Measure this process and its machine; see ``actors.remote.system_metrics``."""
        return self._usage.measure()

    @ray.method(concurrency_group="control")
    def cancel(self, epoch: int, nodes: Sequence[NodeId]) -> None:
        """Raise the fences of ``nodes``: their programs stop at the next step."""
        if epoch == self._epoch:
            for node in nodes:
                self._host.fences[node].set()

    @ray.method(concurrency_group="control")
    def give_up(self, epoch: int | None, node: NodeId) -> None:
        """Let fetches of what ``node`` held fail now instead of at their time limit; ``None``: of its state."""
        if epoch is None or epoch == self._epoch:
            self._gone.add(node)

    @ray.method(concurrency_group="watch")
    def watch(self) -> str:
        """Return when the process has got SIGTERM. Else never: the call's failure is the notice of death."""
        self._notice.wait()
        # Told once; the next call is parked for good.
        self._notice = threading.Event()
        return "SIGTERM"


def remote_class() -> Any:  # noqa: ANN401 - Ray's wrapper has no static type
    """Return ``NodeActor`` as a Ray actor class."""
    groups = {"compute": 1, "exchange": 1, "state": 1, "control": 1, "watch": 1}
    wrap: Any = ray.remote  # its overloads do not know the argument
    return wrap(concurrency_groups=groups)(NodeActor)


def _pin_devices(num_nodes: int) -> tuple[list[torch.device], tuple[str, ...], tuple[str, ...]]:
    """Return each node's device among the GPUs that Ray assigned to the process, their ids, and warnings."""
    gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
    cpu = [torch.device("cpu")] * num_nodes
    if not gpus:
        # Ray leaves the variable unset for actors without GPUs, and then torch would see all of them.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return cpu, (), ()
    if torch.cuda.is_available():
        visible = torch.cuda.device_count()
        return [torch.device("cuda", place * visible // num_nodes) for place in range(num_nodes)], gpus, ()
    return cpu, gpus, (f"GPU {', '.join(gpus)} is assigned, but torch sees none: it trains on the CPU",)
