"""The command line. What it does is in ``api``, ``plan`` and ``describe``; this file reads arguments and prints.

Little is imported before it is needed: ``--help`` and a misspelt key must not wait for torch, or even Ray.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from orchestrator import streams, submit
from orchestrator.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    ConfigError,
    NodeFailedError,
    StarlingError,
    exit_code,
)
from orchestrator.given_path import given, shown_path
from orchestrator.terminal import ENDING, everything_to_stderr, interruptible, warnings_shown_by

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from algorithms.registry import Part
    from orchestrator.config import Config
    from orchestrator.display import Display

_EXIT_CODES = (
    f"Exit codes: 0 finished, {EXIT_USAGE} bad usage, configuration, data or cluster, "
    f"{EXIT_FAILED} the run failed, {EXIT_INTERRUPTED} interrupted."
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

_CONFIG_HELP = "The YAML file that says what to train, and how."
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Use what the run's configuration names, code too, although somebody else wrote it."),
]
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help=_CONFIG_HELP)]
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


def main() -> None:
    """Run the command line."""
    streams.secure()
    try:
        app(prog_name="starling")
    finally:
        # All is said and closed; what is left is the interpreter's own end, and the exit code.
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            version = importlib.metadata.version("starling")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        streams.say(f"starling {version}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train one model on many unreliable, unequal, far-apart GPUs."""
    del version


# --- commands -------------------------------------------------------------------------------------------------------


@app.command(epilog=_EXIT_CODES)
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Train on Ray: one of our own on this machine, or the cluster at [cyan]cluster.address[/]."""
    _train("run", config, overrides, run_dir, as_json=as_json, trust=trust)


@app.command(epilog=_EXIT_CODES)
def simulate(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help=_CONFIG_HELP, show_default=False)] = None,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="RUN_DIR", help="Instead of CONFIG: repeat that run as its log says, to the same digest."),
    ] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Train in one process, with virtual time and a model of the network."""
    if (config is None) == (replay is None):
        raise typer.BadParameter("takes a CONFIG, or --replay RUN_DIR instead")
    if replay is not None:
        _train("replay", replay, overrides, run_dir, as_json=as_json, trust=trust)
    elif config is not None:
        _train("simulate", config, overrides, run_dir, as_json=as_json, trust=trust)


@app.command(epilog=_EXIT_CODES)
def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Of a run that was interrupted, or failed.")],
    overrides: Overrides = None,
    from_previous: Annotated[
        bool, typer.Option("--from-previous", help="Go on from the checkpoint before the last.")
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Its config.yaml was edited, and that is meant.")
    ] = False,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run from its last checkpoint, where it ran; of a finished one, print what it came to."""
    more = {"from_previous": from_previous, "accept_changes": accept_changes}
    _train("resume", run_dir, overrides, None, as_json=as_json, trust=trust, resumed=more)


@app.command(epilog=_EXIT_CODES)
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    memory_gb: Annotated[
        float, typer.Option(min=0.1, max=1e6, metavar="GB", help="What the check itself may take of memory.")
    ] = 1.0,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Check a configuration, load its task on this machine, and print the plan."""

    def act(console: Console) -> dict[str, Any]:
        resolved = _load(config, overrides, trust=trust)
        from orchestrator.pages import print_plan
        from orchestrator.plan import make_plan

        plan = make_plan(resolved, int(memory_gb * 2**30))
        print_plan(console, plan)
        return {"status": "ok"} | plan.to_json()

    _answer(act, as_json=as_json)


@app.command(epilog=_EXIT_CODES)
def data(
    config: ConfigPath,
    overrides: Overrides = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the table into a png, svg or pdf.")] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Load a task's data here, divide them as a run would, and print how many samples of each label a node has."""

    def act(console: Console) -> dict[str, Any]:
        resolved = _load(config, overrides, trust=trust)
        from orchestrator import data_page as page

        report = page.measure(resolved)
        page.print_report(console, report, plot)
        return {"status": "ok"} | report.to_json()

    _answer(act, as_json=as_json)


@app.command(epilog=_EXIT_CODES)
def algorithms(name: Name = None, as_json: AsJson = False) -> None:
    """List the algorithms, or show one: update, fields, elasticity, cost, reference."""

    def act(console: Console) -> dict[str, Any]:
        from algorithms.api import Algorithm

        return _catalog(console, Algorithm, name)

    _answer(act, as_json=as_json)


@app.command(epilog=_EXIT_CODES)
def tasks(name: Name = None, as_json: AsJson = False) -> None:
    """List the tasks, or show one: what is trained on what, and its fields."""

    def act(console: Console) -> dict[str, Any]:
        from actors.tasks import Task

        return _catalog(console, Task, name)

    _answer(act, as_json=as_json)


@app.command(epilog=_EXIT_CODES)
def topologies(
    name: Name = None,
    nodes: Annotated[int | None, typer.Option(min=1, max=2000, help="Measure it for so many nodes.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set a field; may be repeated.")
    ] = None,
    parameters: Annotated[int, typer.Option(min=1, help="Of the model that is sent, 4 bytes each.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Of a run; for random graphs.")] = 0,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Measure the product of so many rounds; by default of a period."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the graph into a png, svg or pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the topologies, or show one; with --nodes: its degrees, spectral gap, bytes per round, and a drawing."""

    def act(console: Console) -> dict[str, Any]:
        from algorithms.topologies import Topology
        from orchestrator import topologies_page as page

        _stand_here()
        if name is None or nodes is None:
            page.refuse_without_nodes(name, {"--nodes": nodes, "--set": overrides, "--rounds": rounds, "--plot": plot})
            return page.print_topologies(console) if name is None else _catalog(console, Topology, name)
        report = page.measure(page.make(name, overrides or []), nodes, 4 * parameters, seed=seed, rounds=rounds)
        page.print_report(console, report, plot)
        return {"status": "ok"} | report.to_json()

    _answer(act, as_json=as_json)


@app.command(epilog=_EXIT_CODES)
def bandwidth(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help=_CONFIG_HELP, show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="1b|10b|100b", help="Instead of CONFIG: a model of the published table; by default 1b."),
    ] = None,
    overrides: Overrides = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Print the bandwidth that methods need for 50, 80, 90, 95 and 99 % compute utilization."""
    if config is not None and model is not None:
        raise typer.BadParameter("takes a CONFIG, or --model instead")
    if config is None and overrides:
        raise typer.BadParameter("--set needs a CONFIG")

    def act(console: Console) -> dict[str, Any]:
        from orchestrator import bandwidth_page as page

        if config is None:
            return page.print_preset(console, (model or "1b").lower())
        return page.print_workload(console, _load(config, overrides, trust=trust))

    _answer(act, as_json=as_json)


@app.command(epilog=_EXIT_CODES)
def replay(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Of a run whose rounds can be replayed.")],
    to: Annotated[
        int | None,
        typer.Option(metavar="ROUND", min=0, help="The model after this round, counted from 0; or the last."),
    ] = None,
    since: Annotated[
        int | None,
        typer.Option(metavar="ROUND", min=0, help="Begin with the last snapshot up to it, not with the first model."),
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the model, as safetensors.")] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Rebuild a run's model from the log of its rounds, without data or forward passes, and check its digests."""

    def act(console: Console) -> dict[str, Any]:
        _stand_beside(run_dir, trust=trust)
        from orchestrator.pages import print_rebuilt
        from orchestrator.rebuild import rebuild

        rebuilt = rebuild(run_dir, to, since=since, save=save, trust=trust)
        print_rebuilt(console, rebuilt)
        return {"status": "ok"} | rebuilt.to_json()

    _answer(act, as_json=as_json)


@app.command(epilog=_EXIT_CODES)
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Of a run, finished or not.")],
    number: Annotated[
        int | None,
        typer.Option(
            "--round", metavar="ROUND", min=0, help="Of a checkpoint, counted from 0; by default the final model."
        ),
    ] = None,
    form: Annotated[
        Literal["safetensors", "torch", "hf"],
        typer.Option("--format", help="torch: a state_dict; hf: a folder for Hugging Face's libraries."),
    ] = "safetensors",
    to: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The file, or the folder; by default in RUN_DIR/exported.")
    ] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's model, or that of one of its checkpoints, into a file for others."""

    def act(console: Console) -> dict[str, Any]:
        _stand_beside(run_dir, trust=trust)
        from orchestrator.export import export as write
        from orchestrator.pages import print_exported

        exported = write(run_dir, number, form, to, trust=trust)
        print_exported(console, exported)
        return {"status": "ok"} | exported.to_json()

    _answer(act, as_json=as_json)


app.command("submit", epilog=_EXIT_CODES)(submit.command)


def _train(
    command: str,
    path: Path,
    overrides: list[str] | None,
    run_dir: Path | None,
    *,
    as_json: bool,
    trust: bool,
    resumed: Mapping[str, bool] | None = None,
) -> None:
    views: list[Display] = []

    def act(console: Console) -> dict[str, Any]:
        from orchestrator import api, resumption
        from orchestrator.display import display, print_summary

        folder = resumption.directory(path) if command == "resume" else path
        if command in ("replay", "resume"):
            config = _load_run(folder, overrides, trust=trust)
        else:
            config = _load(path, overrides, trust=trust)
        done = None if command != "resume" or overrides else resumption.finished(folder)
        if done is not None:
            print_summary(console, done, config)
            return done.to_json()
        view = display(console)
        views.append(view)
        with warnings_shown_by(view):
            try:
                view.open(config, _place(command, config))
                if command == "replay":
                    summary = api.replay(path, config, run_dir=run_dir, trust=trust, observers=[view])
                elif command == "resume":
                    summary = api.resume(path, overrides or (), trust=trust, observers=[view], **(resumed or {}))
                else:
                    train = api.run if command == "run" else api.simulate
                    summary = train(config, run_dir=run_dir, observers=[view])
            finally:
                view.stop()
                if view.summary and view.summary.rounds:
                    print_summary(console, view.summary, config)
        return summary.to_json()

    def failed() -> dict[str, Any]:
        summary = views[-1].summary if views else None
        return summary.to_json() if summary and Path(summary.run_dir).exists() else _NO_RUN

    _answer(act, failed, as_json=as_json)


def _place(command: str, config: Config) -> str:
    if command == "resume":
        return "that go on with the run"
    if command != "run":
        return "in the simulator" if command == "simulate" else "in the simulator, as that run's log says"
    address = config.cluster.address
    return "on a Ray of their own" if address == "local" else f"on the Ray cluster at {address}"


_NO_RUN: dict[str, Any] = {
    "run_id": None,
    "run_dir": None,
    "algorithm": None,
    "rounds": 0,
    "metrics": {},
    "bytes": {"payload": 0, "recovery": 0, "per_round": 0, "transport": None},
    "nodes": {"started": 0, "joined": 0, "lost": 0, "drained": 0},
    "samples": {"drawn": 0, "committed": 0, "redrawn": 0, "lost": 0},
    "replicas": None,
    "digest": None,
    "seconds": 0.0,
    "virtual_seconds": None,
    "lost": {"residuals": 0, "residual_norm": 0.0},
    "baselines": {},
    "checkpoints": None,
}
"""What ``--json`` says of a run that could not begin."""


def _catalog(console: Console, family: type[Part], name: str | None) -> dict[str, Any]:
    from pydantic_core import PydanticCustomError

    from algorithms.registry import find, table
    from orchestrator.describe import describe, summary_of
    from orchestrator.pages import print_description, print_names

    if name is None:
        names = {known: summary_of(part) for known, part in table(family).items()}
        print_names(console, family.family, names)
        return {f"{family.family}s": names}
    _stand_here()
    try:
        description = describe(find(family, name))
    except PydanticCustomError as error:
        raise ConfigError(error.message()) from None
    print_description(console, family.family, description)
    return description.to_json()


from orchestrator import sweep_cli  # noqa: E402, F401 - it enters its commands, and uses what is above

# --- what all commands do alike -------------------------------------------------------------------------------------


def _answer(
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
    """Plain text, never folded: people search for it, and scripts read it."""
    if trace:
        streams.say(trace.rstrip(), err=True)
    label = typer.style("error:", fg="red", bold=True) if sys.stderr.isatty() else "error:"
    for line in message.splitlines():
        streams.say(f"{label} {line}", err=True)


def _load(path: Path, overrides: list[str] | None, *, trust: bool = False) -> Config:
    from orchestrator import identity, resumption

    folder = given(path, "configuration").parent
    if identity.is_run_directory(folder):
        _stand_beside(folder, trust=trust)
    else:
        # So that `task: my_module:MyTask` is found beside the file, or where one is.
        _add_to_path(folder)
        _stand_here(trust=trust)
    return resumption.given(path, overrides or [], trust=trust)


def _load_run(folder: Path, overrides: list[str] | None = None, *, trust: bool) -> Config:
    """The configuration of a run, in whose directory no modules are looked for."""
    from orchestrator import resumption

    path = resumption.directory(folder)
    _stand_beside(path, trust=trust)
    return resumption.configuration(path, overrides or [], trust=trust)


def _stand_beside(folder: Path, *, trust: bool) -> None:
    """Look for modules where one is, unless that is inside of ``folder``, a run's: what is there may be anybody's."""
    if trust or not Path.cwd().resolve().is_relative_to(folder.resolve()):
        _stand_here(trust=trust)


def _stand_here(*, trust: bool = False) -> None:
    """Look for modules where one is, unless that is a run's directory."""
    from orchestrator import identity

    if trust or not identity.is_run_directory(Path.cwd()):
        _add_to_path(Path.cwd())


def _add_to_path(folder: Path) -> None:
    # At the end: a file of the user's must not hide a module of somebody else's.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
