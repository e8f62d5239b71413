"""Lives through a history, looks into the nodes at every begin and commit, and says what is wrong.

A history is a configuration, and below ``soak`` what none says: ``spares``, the rounds in which one dies that stands
by, and ``killed``, the round behind whose commit the whole run is killed, and resumed.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import tempfile
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starling.orchestrator.config.schema import parse
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.control.replay import ReplayController, RunHistory
from starling.orchestrator.errors import ConfigError, StarlingError
from tests.control.test_membership_fuzz import check_asynchronous, check_books, check_synchronous
from tests.draws import expected
from tests.soak.processes import RUN_ID, Directory, Killed, Moment, Spared
from tests.soak.states import Asynchronous, Broken, Synchronous, Watched, same

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.control.restore import Restoration
    from starling.orchestrator.records.observers import RoundRecord

MEMORY = Path("/dev/shm")
ABOUT_SAVING = ("saving", "checkpoint", "resume")

MAX_CPU_S = 40
"""Of a history, on this machine's CPU: ten of the longest."""

LEGITIMATE = (
    "no node is left that has",
    "nodes are there, and",
    "cannot be finished",
    "has died too often to be started again",
    "cannot finish its round",
    "do not become ready; waited for",
)
"""Errors that a run may end with, as every key that would help is named, or nothing would."""

OF_SOME = {
    "random_walk": ("every node waits for a message",),  # it has one token, and loses it with its holder
    "tests.soak.programs:Drifting": ("no majority of them agrees",),
}

CLOCKED = ("a_edit", "async_diloco", *(f"tests.soak.programs:{one}" for one in ("Letters", "Chatter", "Wanderer")))
"""Look at the clock, which a simulation does not write into its log."""


class Wrong(Exception):  # noqa: N818 - not an error of this code's
    """What a history has shown: its kind, by which a smaller one is the same fault, and all that is known."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}\n{text}" if text else kind)
        self.kind = kind


def live(raw: dict[str, Any]) -> str:
    """Live through a history; return how it ended.

    Raises:
        Wrong: it should not have gone so.
    """
    script: dict[str, Any] = raw.get("soak", {})
    spares, killed = script.get("spares", ()), script.get("killed")
    try:
        config = parse({key: value for key, value in raw.items() if key != "soak"})
    except ConfigError:
        return "refused"
    # Nodes without a barrier stand still to be saved, which the run that nobody kills has to do too.
    moment = -1 if killed is None or config.algorithm.synchronous else killed
    with _bounded():
        once = _lived(config, _watched(config, spares), moment)
        again = Watched(config, spares)
        if killed is None:
            _lived(config, again, moment)
        else:
            _killed_and_resumed(config, again, killed)
        try:
            _compare(once, again)
        except Wrong as wrong:
            if killed is None:
                raise
            _compare(once, _lived(config, Watched(config, spares), moment))  # else it is not the resume's fault
            raise Wrong(f"resume: {wrong.kind}", str(wrong)) from None
        _check(once)
        if once.error is None and _is_replayed(config, once):
            _replay(once)
    return "finished" if once.error is None else "failed"


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    def over(*_: object) -> None:
        raise Wrong("hang", "".join(traceback.format_stack(limit=8)))

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _watched(config: Config, spares: Iterable[int]) -> Watched:
    return Synchronous(config, spares) if config.algorithm.synchronous else Asynchronous(config, spares)


def _lived(
    config: Config,
    ran: Watched,
    moment: int,
    directory: Directory | None = None,
    restoration: Restoration | None = None,
) -> Watched:
    """A run from its start or from a checkpoint to its end.

    Raises:
        Wrong: that is no end that a run may have.
        Killed: it was killed, having been saved in ``directory`` at that ``moment``.
    """
    runtime = ran.runtime = Spared(config)
    saves = Moment(config, runtime, moment, None if directory is None else directory.path)
    run_dir = RUN_ID if ran.directory is None else str(ran.directory.path)
    controller = ran.controller = Controller(
        config, runtime, ran, run_id=RUN_ID, run_dir=run_dir, checkpoints=saves, restoration=restoration
    )
    try:
        ran.summary = controller.run()
    except StarlingError as error:
        ran.summary, ran.error = controller.summary("failed"), error
    except Broken as error:
        raise Wrong(f"broken: {error.kind}", str(error)) from None
    except Wrong:
        raise
    except Exception as error:  # noqa: BLE001 - what a history must not lead to
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = "" if restoration is None else "resume: "
        kind = f"{what}{type(error).__name__} in {Path(where.filename).name}:{where.name}"
        raise Wrong(kind, traceback.format_exc(limit=-12)) from None
    finally:
        runtime.close()
        saves.close()
    ran.replicas = runtime.host.replicas
    return ran


def _killed_and_resumed(config: Config, ran: Watched, killed: int) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as path:
        directory = ran.directory = Directory(config, Path(path))
        try:
            _lived(config, ran, killed, directory)
        except Killed:
            try:
                restoration = directory.restoration()
            except StarlingError as error:
                raise Wrong("resume: refused", str(error)) from None
            _lived(restoration.config, ran, -1, restoration=restoration)


def _compare(once: Watched, again: Watched) -> None:
    if str(once.error) != str(again.error):
        raise Wrong("not repeated: the error", f"{once.error}\n{again.error}")
    one, other = _events(once), _events(again)
    for mine, its in zip(one, other, strict=False):
        if mine != its:
            raise Wrong("not repeated: events", f"{mine}\n{its}")
    if len(one) != len(other):
        raise Wrong("not repeated: events", f"{len(one)} and {len(other)}: {one[len(other) :] or other[len(one) :]}")
    if once.error is None and once.digest != again.digest:
        raise Wrong("not repeated: the digest", "")
    for key in ("rounds", "metrics", "bytes", "nodes", "samples", "lost", "virtual_seconds", "replicas"):
        mine, its = getattr(once.summary, key), getattr(again.summary, key)
        if key == "samples" and once.sought("lost"):
            # Draws of rounds that were given up are those that a node lived to tell of, or that a checkpoint has.
            mine, its = ({name: one[name] for name in ("committed", "lost")} for one in (mine, its))
        if mine != its:
            raise Wrong(f"not repeated: {key}", f"{mine}\n{its}")
    for node in once.controller._state.roster.nodes:
        if again.replicas[node].staged_round is not None:
            continue  # it hung before it could apply its commit; looking at it in the first run has applied it
        if not same(once.replicas[node].local.committed(), again.replicas[node].local.committed()):
            raise Wrong("not repeated: local state", f"of node {node}")
    for mine, its in zip(once.rounds, again.rounds, strict=True):
        equal: dict[str, Any] = {"evaluate_seconds": 0.0} | ({"samples": {}} if once.sought("lost") else {})
        if _rounded(replace(mine, **equal)) != _rounded(replace(its, **equal)):
            raise Wrong("not repeated: records of rounds", f"{mine}\n{its}")


def _rounded(record: RoundRecord) -> RoundRecord:
    """The record with times to a picosecond: a resumed run adds up other numbers to the time of a round."""
    names = ("seconds", "train_seconds", "exchange_seconds")
    return replace(record, **{name: round(getattr(record, name), 12) for name in names})


def _events(ran: Watched) -> list[dict[str, Any]]:
    return [event for event in ran.events if event["event"] not in ABOUT_SAVING]


def _check(ran: Watched) -> None:
    if ran.error is not None:
        text, allowed = str(ran.error), LEGITIMATE + OF_SOME.get(ran.config.algorithm.name, ())
        if "\n" in text or not any(one in text for one in allowed):
            raise Wrong(f"error: {re.sub(r'[0-9.]+', '#', text)[:80]}", text)
        check_last_words(ran, text)
    try:
        check_books(ran)
        (check_synchronous if ran.config.algorithm.synchronous else check_asynchronous)(ran)
    except AssertionError:
        raise Wrong("broken: books", traceback.format_exc(limit=-3)) from None
    assert ran.summary is not None
    if ran.error is None and ran.summary.rounds != ran.config.rounds:
        raise Wrong("broken: rounds", f"{ran.summary.rounds}")
    samples, ledger = ran.summary.samples, ran.controller._state.samples.ledger
    if samples["drawn"] != samples["committed"] + samples["redrawn"]:
        raise Wrong("broken: samples", str(samples))
    if ran.draws and ledger is not None and ran.config.data.sampler.name == "epoch":
        count = expected(ledger, ran.config)
        if ran.count != count:
            differ = {one: (ran.count[one], count[one]) for one in ran.count | count if ran.count[one] != count[one]}
            raise Wrong("broken: samples are not committed once", f"sample: (committed, booked) {differ}")


def check_last_words(ran: Watched, text: str) -> None:
    """A run that ends for want of nodes, or of the model, wants them by its own log.

    Raises:
        Wrong: the log says that they were there.
    """
    there: set[int] = set()
    trained: set[int] = set()
    """Nodes that have been there since they committed a round themselves; with a barrier, the last one, or got it."""
    for event in ran.events:
        match event["event"]:
            case "start":
                there.update(event["nodes"])
            case "up":
                there.add(event["node"])
            case "lost" | "left":
                there.discard(event["node"])
                trained.discard(event["node"])
            case "commit" if "node" in event:
                trained.add(event["node"])
            case "commit":
                trained = set(event["committed"]) & there
            case "transfer" if ran.config.algorithm.synchronous and event["donor"] != event["node"]:
                trained.add(event["node"])
            case _:
                pass
    if "nodes are there, and" in text:
        said = int(re.findall(r"(\d+) nodes are there", text)[0])
        if said != len(there) or (said >= ran.config.cluster.nodes.min and "min is" in text):
            raise Wrong("error: the nodes are there", f"{text}: {sorted(there)}")
    elif "do not become ready" in text:
        # A process that began, or was given state, since the last commit may need longer than the run waits.
        last = max((place for place, event in enumerate(ran.events) if event["event"] == "commit"), default=-1)
        since = {event["node"] for event in ran.events[last + 1 :] if event["event"] in {"up", "transfer"}}
        idle = {int(node) for node in re.findall(r"\d+", text.partition("nodes ")[2].partition(" do not")[0])} - since
        if idle:
            raise Wrong("error: nodes do not become ready, without a cause", f"{text}: {sorted(idle)}")
    elif "no node is left that has" in text and trained:
        raise Wrong("error: a node is left that has the model", f"{text}: {sorted(trained)}")


def _is_replayed(config: Config, ran: Watched) -> bool:
    """Whether it is promised, and worth the time."""
    plain = config.optimizer.rollback or (config.optimizer.name == "sgd" and not ran.has_momentum)
    went = ran.sought("lost") or ran.sought("left") or ran.sought("up")
    possible = config.algorithm.synchronous or not went
    return possible and plain and config.algorithm.name not in CLOCKED and config.seed % 2 == 0


def _replay(ran: Watched) -> None:
    history = RunHistory(Path(RUN_ID), ran.digest)
    for event in ran.events:
        history._take(json.loads(json.dumps(event)))
    again = Watched(ran.config)
    runtime = again.runtime = Spared(ran.config)
    controller = ReplayController(
        ran.config, runtime, again, history, run_id=RUN_ID, run_dir=RUN_ID, may_commit=lambda: None
    )
    try:
        digest = controller.run().digest
    except Wrong:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"replay: {type(error).__name__} in {Path(where.filename).name}:{where.name}"
        raise Wrong(kind, traceback.format_exc(limit=-8)) from None
    finally:
        runtime.close()
    if digest != ran.digest:
        raise Wrong("replay: another digest", f"{digest} instead of {ran.digest}")


def ends(counts: Counter[str]) -> str:
    """For people."""
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
