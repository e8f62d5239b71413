"""The plan of a run: resources, steps and payload, worked out on this machine without training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from starling.actors.data.samplers import planned_samples
from starling.actors.host.build import load_data
from starling.actors.replica.pace import Pace
from starling.algorithms.api import Algorithm
from starling.orchestrator.analysis.estimates import CHECK_BYTES, bounded_memory, estimate, layout_of, store_warning
from starling.orchestrator.runtimes.user_code import user_code

if TYPE_CHECKING:
    from starling.algorithms.api import Layout
    from starling.orchestrator.config.schema import Config


_MOST_ROUNDS = 10_000
"""Rounds whose bytes are added up; for longer runs these stand for all."""


@dataclass(frozen=True)
class Plan:
    """The facts that ``starling check`` prints."""

    name: str
    algorithm: str
    task: str
    rounds: int
    nodes: int
    actors: int
    """Processes that host the nodes on a cluster."""
    num_cpus: float
    """CPUs that Ray must have, in all."""
    num_gpus: float
    samples: dict[str, int]
    """``training``, ``validation``, and the ``least`` and ``most`` that a node owns."""
    batch_size: int
    parameters: int
    model_bytes: int
    """Bytes of the parameters and floating-point buffers, as they are exchanged without a codec."""
    steps_per_round: dict[str, int] | None
    """``least`` and ``most`` that a node takes in a round of its own; all 0: it does not use its optimizer.

    ``None``: the algorithm does not say."""
    node_rounds: float
    """Rounds that a node does in one of the run, on average: another number than 1 where a server counts them."""
    schedule: str
    payload_bytes: dict[str, int] | None
    """``per_round`` over all nodes without losses, on average, and in ``total``; ``None`` as before."""
    evaluations: int
    baselines: dict[str, float]
    reading: dict[str, str]
    """Counts of data that are read, and that are left out, in the task's words."""
    estimate: dict[str, Any]
    """Memory and time, as ``estimates.Estimate``."""
    warnings: tuple[str, ...]
    """Properties of the plan that are likely to surprise."""
    runtimes: list[str]
    """Runtimes that can carry the plan out; the simulator models a slow network, and a cluster is throttled to it."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return asdict(self)


def make_plan(config: Config, memory: int = CHECK_BYTES) -> Plan:
    """Load the task, lay its model out, and work out the rest, with ``memory`` bytes at most.

    Raises:
        StarlingError: the run could not begin like this.
    """
    num_nodes, spec = config.num_nodes, config.replica_spec()
    hint = f"lower its sizes, or let it take more: starling check --memory-gb {4 * memory // 2**30}"
    with user_code(0, 0), bounded_memory(memory, hint):
        data = load_data(config.task, config.data, num_nodes, config.seed)
        baselines, reading = config.task.baselines(num_nodes), config.task.reading()
        layout = layout_of(spec, memory)
        counts = [len(part) for part in data.parts]
        pace = data.pace(spec) or Pace.of(spec, counts, num_nodes)
        each = pace.planned_steps or None
        all_steps = None if each is None else each * num_nodes
        cost = estimate(spec, layout, data.train, num_nodes, all_steps, memory)
    samples_per_step = config.data.batch_size * config.optimizer.accumulate
    least = config.data.min_batch
    told = [
        config.algorithm.steps_per_round(planned_samples(count, samples_per_step, least), samples_per_step)
        for count in counts
    ]
    steps = [count for count in told if count is not None]
    total = _payload(config.algorithm, layout, num_nodes, config.rounds)
    every = config.evaluation.every_rounds
    return Plan(
        name=config.name,
        algorithm=config.algorithm.name,
        task=config.task.name,
        rounds=config.rounds,
        nodes=num_nodes,
        actors=config.cluster.num_actors,
        num_cpus=config.cluster.num_cpus * num_nodes,
        num_gpus=config.cluster.num_gpus * num_nodes,
        samples={
            "training": sum(counts),
            "validation": len(data.validation),
            "least": min(counts),
            "most": max(counts),
        },
        batch_size=config.data.batch_size,
        parameters=layout.num_values,
        model_bytes=layout.nbytes + layout.buffer_nbytes,
        steps_per_round={"least": min(steps), "most": max(steps)} if steps else None,
        node_rounds=config.algorithm.node_rounds(num_nodes),
        schedule=_schedule(config, pace, is_known=bool(steps)),
        payload_bytes=None if total is None else {"per_round": round(total / config.rounds), "total": total},
        evaluations=-(-config.rounds // every) if every else 1,
        baselines=baselines,
        reading=reading,
        estimate=asdict(cost),
        warnings=cost.warnings + store_warning(config, layout),
        runtimes=["cluster", "simulator"],
    )


def _payload(algorithm: Algorithm, layout: Layout, num_nodes: int, rounds: int) -> int | None:
    """Return the payload bytes of all rounds without losses; ``None`` if the algorithm does not say."""
    buffers = rounds * algorithm.buffer_bytes(layout, num_nodes)
    if type(algorithm).round_bytes is Algorithm.round_bytes:
        each = algorithm.expected_bytes(layout, num_nodes)
        return None if each is None else rounds * each + buffers
    looked_at = min(rounds, _MOST_ROUNDS)
    sent = [algorithm.round_bytes(layout, num_nodes, number, rounds) for number in range(looked_at)]
    known = [count for count in sent if count is not None]
    return sum(known) * rounds // looked_at + buffers if len(known) == looked_at else None


def _schedule(config: Config, pace: Pace, *, is_known: bool) -> str:
    """Describe the learning rate over the run in words."""
    optimizer, schedule = config.optimizer, config.optimizer.schedule
    if is_known and not pace.steps:
        return f"none: with {config.algorithm.name} nodes take no optimizer steps; it has a step size of its own"
    total = pace.total_steps(schedule)
    schedule.factor(0, total)  # raises, if it cannot work
    text = f"{optimizer.name}, lr {optimizer.lr:g}"
    if schedule.warmup_steps:
        text += f", up over {schedule.warmup_steps} steps"
    if schedule.name == "constant":
        return f"{text}, constant"
    text += f", {schedule.name} to {schedule.final_fraction * optimizer.lr:g} at step {total:.10g}"
    if total == pace.planned_steps:
        return f"{text}, the end of the run"
    if not is_known:
        return f"{text}; how many steps the run takes is not known"
    last = optimizer.lr * schedule.factor(max(0.0, pace.planned_steps - 1), total)
    return f"{text}; the run ends at step {pace.planned_steps:.10g} with {last:.3g}"
