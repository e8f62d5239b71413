"""The commands: each reads its arguments, calls another room, and prints the answer.

Little is imported before it is needed: ``--help`` and a misspelt key must not wait for torch, or even Ray.
"""

from __future__ import annotations

import importlib.metadata
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from starling.orchestrator import streams
from starling.orchestrator.cli import submit
from starling.orchestrator.cli.common import (
    CONFIG_HELP,
    EXIT_CODES,
    AsJson,
    ConfigPath,
    Name,
    Overrides,
    RunDir,
    Trust,
    app,
    load_config,
    load_run_config,
    print_catalog,
    respond,
    stand_beside,
    stand_here,
)
from starling.orchestrator.cli.terminal import warnings_shown_by
from starling.orchestrator.signals import ENDING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starling.orchestrator.cli.run_display import Display
    from starling.orchestrator.config.schema import Config


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


@app.command(epilog=EXIT_CODES)
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Train on Ray: one of our own on this machine, or the cluster at [cyan]cluster.address[/]."""
    _train("run", config, overrides, run_dir, as_json=as_json, trust=trust)


@app.command(epilog=EXIT_CODES)
def simulate(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help=CONFIG_HELP, show_default=False)] = None,
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


@app.command(epilog=EXIT_CODES)
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


@app.command(epilog=EXIT_CODES)
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
        resolved = load_config(config, overrides, trust=trust)
        from starling.orchestrator.analysis.plan import make_plan
        from starling.orchestrator.cli.tables import print_plan

        plan = make_plan(resolved, int(memory_gb * 2**30))
        print_plan(console, plan)
        return {"status": "ok"} | plan.to_json()

    respond(act, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def data(
    config: ConfigPath,
    overrides: Overrides = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the table into a png, svg or pdf.")] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Load a task's data here, divide them as a run would, and print how many samples of each label a node has."""

    def act(console: Console) -> dict[str, Any]:
        resolved = load_config(config, overrides, trust=trust)
        from starling.orchestrator.analysis import data as page

        report = page.measure(resolved)
        page.print_report(console, report, plot)
        return {"status": "ok"} | report.to_json()

    respond(act, as_json=as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of configurations, with which editors complete and check a YAML file."""
    from starling.orchestrator.config.json_schema import schema_of
    from starling.orchestrator.config.schema import Config

    streams.say(json.dumps(schema_of(Config), indent=1, ensure_ascii=False))


@app.command(epilog=EXIT_CODES)
def algorithms(name: Name = None, as_json: AsJson = False) -> None:
    """List the algorithms, or show one: update, fields, elasticity, cost, reference."""

    def act(console: Console) -> dict[str, Any]:
        from starling.algorithms.api import Algorithm

        return print_catalog(console, Algorithm, name)

    respond(act, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def tasks(name: Name = None, as_json: AsJson = False) -> None:
    """List the tasks, or show one: what is trained on what, and its fields."""

    def act(console: Console) -> dict[str, Any]:
        from starling.actors.tasks import Task

        return print_catalog(console, Task, name)

    respond(act, as_json=as_json)


@app.command(epilog=EXIT_CODES)
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
        from starling.algorithms.topologies import Topology
        from starling.orchestrator.analysis import topology as page

        stand_here()
        if name is None or nodes is None:
            page.refuse_without_nodes(name, {"--nodes": nodes, "--set": overrides, "--rounds": rounds, "--plot": plot})
            return print_catalog(console, Topology, name, ", and with --nodes N what it comes to")
        report = page.measure(page.make(name, overrides or []), nodes, 4 * parameters, seed=seed, rounds=rounds)
        page.print_report(console, report, plot)
        return {"status": "ok"} | report.to_json()

    respond(act, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def bandwidth(
    config: ConfigPath,
    overrides: Overrides = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds to count: as many as traffic takes to repeat itself; by default 8 at most."),
    ] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Count a run's traffic in the simulator, and print the bandwidth for 50 to 99 % compute utilization."""

    def act(console: Console) -> dict[str, Any]:
        from starling.orchestrator.cli.bandwidth import print_workload

        return print_workload(console, load_config(config, overrides, trust=trust), rounds)

    respond(act, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def rebuild(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run of an algorithm that logs its rounds.")],
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
        stand_beside(run_dir, trust=trust)
        from starling.orchestrator.cli.tables import print_rebuilt
        from starling.orchestrator.records.rebuild import rebuild as rebuilt_from_log

        rebuilt = rebuilt_from_log(run_dir, to, since=since, save=save, trust=trust)
        print_rebuilt(console, rebuilt)
        return {"status": "ok"} | rebuilt.to_json()

    respond(act, as_json=as_json)


@app.command(epilog=EXIT_CODES)
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
        stand_beside(run_dir, trust=trust)
        from starling.orchestrator.checkpoints.export import export as write
        from starling.orchestrator.cli.tables import print_exported

        exported = write(run_dir, number, form, to, trust=trust)
        print_exported(console, exported)
        return {"status": "ok"} | exported.to_json()

    respond(act, as_json=as_json)


app.command("submit", epilog=EXIT_CODES)(submit.command)


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
        from starling.orchestrator import api
        from starling.orchestrator.cli.run_display import display, print_summary
        from starling.orchestrator.records import run_config

        folder = run_config.directory(path) if command == "resume" else path
        if command in ("replay", "resume"):
            config = load_run_config(folder, overrides, trust=trust)
        else:
            config = load_config(path, overrides, trust=trust)
        done = None if command != "resume" or overrides else run_config.finished(folder)
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

    respond(act, failed, as_json=as_json)


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
    "average_digest": None,
}
"""Answer of ``--json`` for a run that could not begin."""


from starling.orchestrator.cli import sweep as sweep_cli  # noqa: E402, F401 - it enters its commands, and uses what is above
