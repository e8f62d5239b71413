"""Options, answers and error messages shared by all commands."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from starling.orchestrator import streams
from starling.orchestrator.cli.terminal import everything_to_stderr
from starling.orchestrator.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    ConfigError,
    NodeFailedError,
    StarlingError,
    exit_code,
)
from starling.orchestrator.given_path import given, shown_path
from starling.orchestrator.signals import interruptible

if TYPE_CHECKING:
    from collections.abc import Callable

    from starling.algorithms.registry import Part
    from starling.orchestrator.config.schema import Config


EXIT_CODES = (
    f"Exit codes: 0 finished, {EXIT_USAGE} bad usage, configuration, data or cluster, "
    f"{EXIT_FAILED} the run failed, {EXIT_INTERRUPTED} interrupted."
)


app = typer.Typer(
    name="starling",
    help="Train one model on many unreliable, unequal, far-apart GPUs.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


CONFIG_HELP = "The YAML file that says what to train, and how."


Trust = Annotated[
    bool,
    typer.Option("--trust", help="Use what the run's configuration names, code too, although somebody else wrote it."),
]


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help=CONFIG_HELP)]


Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a key, as in [cyan]--set algorithm.outer.lr=0.4[/]; may be repeated.",
    ),
]


RunDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the run is written; new, or empty. By default runs/NAME-TIME-XXXX."),
]


AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line; all else goes to stderr.")
]


Name = Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False, help="Show this one, in full.")]


def print_catalog(console: Console, family: type[Part], name: str | None, more: str = "") -> dict[str, Any]:
    """Print the names of a family of parts, or one part with its fields; return what was printed, as JSON has it."""
    from pydantic_core import PydanticCustomError

    from starling.algorithms.registry import find, table
    from starling.orchestrator.cli.tables import print_description, print_names
    from starling.orchestrator.config.reference import describe, summary_of

    if name is None:
        names = {known: summary_of(part) for known, part in table(family).items()}
        families = f"{family.family.removesuffix('y')}ies" if family.family.endswith("y") else f"{family.family}s"
        print_names(console, f"starling {families} NAME shows one in full{more}.", names)
        return {families: names}
    stand_here()
    try:
        description = describe(find(family, name))
    except PydanticCustomError as error:
        raise ConfigError(error.message()) from None
    print_description(console, family.family, description)
    return description.to_json()


def respond(
    act: Callable[[Console], dict[str, Any]], failed: Callable[[], dict[str, Any]] = dict, *, as_json: bool
) -> None:
    """Do what a command does; show what goes wrong; answer in JSON if asked; exit with the right code.

    ``failed`` is what can be said of it when ``act`` has raised.
    """
    code, problem = 0, None
    answer: dict[str, Any] = {}
    with everything_to_stderr() if as_json else contextlib.nullcontext():
        try:
            with interruptible():
                answer = act(Console(stderr=as_json))
        except StarlingError as error:
            code, problem = exit_code(error), str(error)
            _print_error(problem, error.traceback if isinstance(error, NodeFailedError) else None)
        except KeyboardInterrupt:
            code, problem = EXIT_INTERRUPTED, "interrupted"
            _print_error(problem)
        except (OSError, MemoryError) as error:  # of the machine: a file that vanished, a disk that is full
            code, problem = EXIT_FAILED, _of_the_machine(error)
            _print_error(problem)
        except Exception as error:  # noqa: BLE001 - a mistake of ours; still one JSON object and the right code
            code, problem = EXIT_FAILED, f"{type(error).__name__}: {error} (this is a bug in Starling)"
            _print_error(problem, traceback.format_exc())
    if as_json:
        if code:
            answer = {"status": "interrupted" if code == EXIT_INTERRUPTED else "failed"} | failed()
        streams.say(json.dumps(answer | {"error": problem}))
    if code:
        raise typer.Exit(code)


def _of_the_machine(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return f"this machine has not enough memory for it ({error or 'MemoryError'})"
    about = f"{shown_path(os.fsdecode(error.filename))}: " if isinstance(error.filename, str | bytes) else ""
    return f"{about}{error.strerror or error or type(error).__name__}"


def _print_error(message: str, trace: str | None = None) -> None:
    """Print an error as plain text, never folded: people search for it, and scripts read it."""
    if trace:
        streams.say(trace.rstrip(), err=True)
    label = typer.style("error:", fg="red", bold=True) if sys.stderr.isatty() else "error:"
    for line in message.splitlines():
        streams.say(f"{label} {line}", err=True)


def load_config(path: Path, overrides: list[str] | None, *, trust: bool = False) -> Config:
    """Return the configuration in a file, with modules beside the file importable."""
    from starling.orchestrator.records import identity, run_config

    folder = given(path, "configuration").parent
    if identity.is_run_directory(folder):
        stand_beside(folder, trust=trust)
    else:
        # So that `task: my_module:MyTask` is found beside the file, or where one is.
        _add_to_path(folder)
        stand_here(trust=trust)
    return run_config.given(path, overrides or [], trust=trust)


def load_run_config(folder: Path, overrides: list[str] | None = None, *, trust: bool) -> Config:
    """Load the configuration of a run; modules in its directory are not importable."""
    from starling.orchestrator.records import run_config

    path = run_config.directory(folder)
    stand_beside(path, trust=trust)
    return run_config.configuration(path, overrides or [], trust=trust)


def stand_beside(folder: Path, *, trust: bool) -> None:
    """Look for modules where one is, unless that is inside of ``folder``, a run's: what is there may be anybody's."""
    if trust or not Path.cwd().resolve().is_relative_to(folder.resolve()):
        stand_here(trust=trust)


def stand_here(*, trust: bool = False) -> None:
    """Look for modules where one is, unless that is a run's directory."""
    from starling.orchestrator.records import identity

    if trust or not identity.is_run_directory(Path.cwd()):
        _add_to_path(Path.cwd())


def _add_to_path(folder: Path) -> None:
    # At the end: a file of the user's must not hide a module of somebody else's.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
