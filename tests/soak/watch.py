"""Lives through a history, looks into the nodes at every begin and commit, and says what is wrong."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import parse
from orchestrator.controller import Controller
from orchestrator.errors import ConfigError, StarlingError
from orchestrator.replay import History, ReplayController
from orchestrator.simulator import Simulator
from tests.draws import expected
from tests.soak.states import Asynchronous, Broken, Synchronous, Watched
from tests.test_membership_fuzz import check_asynchronous, check_books, check_synchronous

if TYPE_CHECKING:
    from collections.abc import Iterator

    from orchestrator.config import Config

MAX_CPU_S = 40
"""Of a history, on this machine's CPU: ten of the longest."""

LEGITIMATE = (
    "no node is left that has the model",
    "nodes are there, and cluster.nodes.min is",
    "cannot be finished",
    "has died too often to be started again",
    "cannot finish its round",
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
    try:
        config = parse(raw)
    except ConfigError:
        return "refused"
    with _bounded():
        try:
            once = _run(config, _watched(config))
            again = _run(config, Watched(config))
        except Broken as error:
            raise Wrong(f"broken: {error.kind}", str(error)) from None
        except Wrong:
            raise
        except Exception as error:  # noqa: BLE001 - what a history must not lead to
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} in {Path(where.filename).name}:{where.name}"
            raise Wrong(kind, traceback.format_exc(limit=-12)) from None
        _compare(once, again)
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


def _watched(config: Config) -> Watched:
    return Synchronous(config) if config.algorithm.synchronous else Asynchronous(config)


def _run(config: Config, ran: Watched) -> Watched:
    runtime = ran.runtime = Simulator(config)
    controller = ran.controller = Controller(config, runtime, ran, run_id="soak", run_dir="soak")
    try:
        ran.summary = controller.run()
    except StarlingError as error:
        ran.summary, ran.error = controller.summary("failed"), error
    finally:
        runtime.close()
    ran.replicas = runtime.host.replicas
    return ran


def _compare(once: Watched, again: Watched) -> None:
    if str(once.error) != str(again.error):
        raise Wrong("not repeated: the error", f"{once.error}\n{again.error}")
    for one, other in zip(once.events, again.events, strict=False):
        if one != other:
            raise Wrong("not repeated: events", f"{one}\n{other}")
    if len(once.events) != len(again.events):
        raise Wrong("not repeated: events", f"{len(once.events)} and {len(again.events)}")
    if once.error is None and once.digest != again.digest:
        raise Wrong("not repeated: the digest", "")


def _check(ran: Watched) -> None:
    if ran.error is not None:
        text, allowed = str(ran.error), LEGITIMATE + OF_SOME.get(ran.config.algorithm.name, ())
        if "\n" in text or not any(one in text for one in allowed):
            raise Wrong(f"error: {re.sub(r'[0-9.]+', '#', text)[:80]}", text)
    try:
        check_books(ran)
        (check_synchronous if ran.config.algorithm.synchronous else check_asynchronous)(ran)
    except AssertionError:
        raise Wrong("broken: books", traceback.format_exc(limit=-3)) from None
    assert ran.summary is not None
    if ran.error is None and ran.summary.rounds != ran.config.rounds:
        raise Wrong("broken: rounds", f"{ran.summary.rounds}")
    samples, ledger = ran.summary.samples, ran.controller._progress.samples.ledger
    if samples["drawn"] != samples["committed"] + samples["redrawn"]:
        raise Wrong("broken: samples", str(samples))
    if ran.draws and ledger is not None and ran.config.data.sampler.name == "epoch":
        count = expected(ledger, ran.config)
        if ran.count != count:
            differ = {one: (ran.count[one], count[one]) for one in ran.count | count if ran.count[one] != count[one]}
            raise Wrong("broken: samples are not committed once", f"sample: (committed, booked) {differ}")


def _is_replayed(config: Config, ran: Watched) -> bool:
    """Whether it is promised, and worth the time."""
    plain = config.optimizer.rollback or (config.optimizer.name == "sgd" and not ran.has_momentum)
    went = ran.sought("lost") or ran.sought("left") or ran.sought("up")
    possible = config.algorithm.synchronous or not went
    return possible and plain and config.algorithm.name not in CLOCKED and config.seed % 2 == 0


def _replay(ran: Watched) -> None:
    history = History(Path("soak"), ran.digest)
    for event in ran.events:
        history._take(json.loads(json.dumps(event)))
    again = Watched(ran.config)
    runtime = again.runtime = Simulator(ran.config)
    controller = ReplayController(
        ran.config, runtime, again, history, run_id="soak", run_dir="soak", may_commit=lambda: None
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
