"""The command line. What it does is in ``api``, ``plan`` and ``describe``; this file reads arguments and prints."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from orchestrator.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    NodeFailedError,
    StarlingError,
    exit_code,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from algorithms.registry import Part
    from orchestrator.config import Config
    from orchestrator.display import Display
    from orchestrator.records import Summary

_EXIT_CODES = (
    f"Exit codes: 0 finished · {EXIT_USAGE} bad usage, configuration, data or cluster · "
    f"{EXIT_FAILED} the run failed · {EXIT_INTERRUPTED} interrupted."
)

app = typer.Typer(
    name="starling",
    help="Train one model on many unreliable, unequal, far-apart GPUs.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; docs/configuration.md has every key.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a key: [cyan]--set algorithm.outer.lr=0.4[/], [cyan]--set tracking=none[/]. May be repeated.",
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object as the last line of stdout, everything else to stderr."),
]
RunDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the run is written; new or empty.  [dim]default: runs/<name>-<time>[/]"),
]
Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this one in full.")]


def main() -> None:
    """Run the command line."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"starling {importlib.metadata.version('starling')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


# --- runs -----------------------------------------------------------------------------------------------------------


@app.command(epilog=_EXIT_CODES)
def run(
    config: ConfigPath, overrides: Overrides = None, run_dir: RunDir = None, as_json: AsJson = False
) -> None:
    """Train on a Ray cluster: one of its own on this machine, or the one at [cyan]cluster.address[/]."""
    _train("run", config, overrides or [], run_dir, as_json=as_json)


@app.command(epilog=_EXIT_CODES)
def simulate(
    config: ConfigPath, overrides: Overrides = None, run_dir: RunDir = None, as_json: AsJson = False
) -> None:
    """Train in one process, under a virtual clock and a model of the network; deterministic."""
    _train("simulate", config, overrides or [], run_dir, as_json=as_json)


@app.command(epilog=_EXIT_CODES)
def check(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a configuration, load its task on this machine, and print the plan."""

    def act(console: Console) -> dict[str, Any]:
        from orchestrator.display import print_plan
        from orchestrator.plan import make_plan

        plan = make_plan(_load(config, overrides or []))
        if not as_json:
            print_plan(console, plan)
        return plan.to_json()

    _answer(act, as_json=as_json)


def _train(command: str, path: Path, overrides: list[str], run_dir: Path | None, *, as_json: bool) -> None:
    """Drive a run and say how it went; see ``_answer`` for what goes where."""

    def act(console: Console) -> dict[str, Any]:
        # Before anything of what follows is imported: it takes seconds, and the configuration may be wrong.
        config = _load(path, overrides)
        from orchestrator import api
        from orchestrator.display import display, print_summary

        view = display(console)
        outcome = view.outcome
        with _logging_to(view), _terminable():
            try:
                getattr(api, command)(config, run_dir=run_dir, observers=[view])
            except (StarlingError, KeyboardInterrupt) as error:
                outcome = view.outcome
                error.summary = outcome  # type: ignore[attr-defined]
                raise
        outcome = view.outcome
        assert outcome is not None
        print_summary(console, outcome, config)
        return outcome.to_json()

    _answer(act, as_json=as_json, on_failure=_nothing)
