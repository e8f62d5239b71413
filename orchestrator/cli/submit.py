"""``starling submit``: start a job on a remote cluster, follow it, and ask what Ctrl-C means."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from starling.orchestrator.cli.common import load_config, respond
from starling.orchestrator.errors import EXIT_INTERRUPTED
from starling.orchestrator.jobs import DEFAULT_ADDRESS, Choice, Follower, connect, plan, submit
from starling.orchestrator.signals import interruptible
from starling.orchestrator.streams import say

if TYPE_CHECKING:
    from collections.abc import Callable


def asker(choice: Choice) -> Callable[[], Choice | None]:
    """Return a function that asks the user what to do with the job; without a terminal it is left running."""
    if choice is not Choice.ASK:
        return lambda: choice
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return lambda: Choice.LEAVE

    def ask() -> Choice | None:
        answers = {"s": Choice.STOP, "l": Choice.LEAVE, "f": None, "": None}
        try:
            while True:
                say("\n[s]top the job, [l]eave it running, or go on [f]ollowing it? [f] ", err=True, end="")
                answer = sys.stdin.readline()
                if not answer:
                    return Choice.LEAVE  # the terminal is gone
                if answer.strip().lower()[:1] in answers:
                    return answers[answer.strip().lower()[:1]]
        except (KeyboardInterrupt, OSError):  # OSError: a terminal that hung up
            return Choice.LEAVE

    return ask


def command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file; inside of the working directory.")],
    address: Annotated[
        str,
        typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's job server (its dashboard)."),
    ] = DEFAULT_ADDRESS,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a key; may be repeated.")
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="What the cluster gets: configuration, modules, data.")
    ] = Path(),
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the log until the job ends, and exit with its code.")
    ] = True,
    on_interrupt: Annotated[
        Choice, typer.Option(help="What Ctrl-C does to the job; without a terminal [cyan]ask[/] leaves it running.")
    ] = Choice.ASK,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust", help="Use what the run's configuration names, code too, although somebody else wrote it."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object as the last line; all else goes to stderr.")
    ] = False,
) -> None:
    """Train on a running cluster, as a Ray job: from outside, through its job server."""
    code = 0
    known: dict[str, Any] = {"job_id": None, "address": address, "run_dir": None, "exit_code": None}

    def act(_: object) -> dict[str, Any]:
        nonlocal code
        resolved = load_config(config, overrides, trust=trust)
        planned = plan(resolved, config, overrides or [], working_dir)
        client = connect(address)

        def note(text: str) -> None:
            say(text, err=True)

        job = submit(client, address, planned, note)
        known.update(job.to_json())
        said = f"job {job.name} at {address}; its run is written to {job.run_dir} on the head"
        if not wait:
            note(said)
            return {"status": "submitted"} | known
        with interruptible(deaf_s=0.0):
            follower = Follower(client, job, lambda text: say(text, end=""), asker(on_interrupt), note)
            code = follower.follow(said)
        known["exit_code"] = code
        status = {0: "finished", EXIT_INTERRUPTED: "interrupted"}.get(code, "failed")
        return {"status": status} | known

    respond(act, lambda: known, as_json=as_json)
    if code:
        raise typer.Exit(code)
