"""``starling sweep``: reads its arguments and prints; what it does is in ``sweep``."""

from __future__ import annotations

import contextlib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from starling.orchestrator.cli import common as cli
from starling.orchestrator.cli.terminal import warnings_shown_by

if TYPE_CHECKING:
    from rich.console import Console

    from starling.orchestrator.cli.sweep_display import SweepDisplay
    from starling.orchestrator.sweeps.result import SweepResult


class SchedulerName(StrEnum):
    """Schedulers, which stop trials early."""

    ASHA = "asha"
    PBT = "pbt"
    HYPERBAND = "hyperband"
    NONE = "none"


class SearchName(StrEnum):
    """Search algorithms, which draw samples."""

    RANDOM = "random"
    OPTUNA = "optuna"


@cli.app.command(epilog=cli.EXIT_CODES)
def sweep(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help=cli.CONFIG_HELP, show_default=False)] = None,
    space: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What is varied: a name of tune_spaces, FILE.py:NAME or MODULE:NAME."),
    ] = None,
    samples: Annotated[int | None, typer.Option(metavar="N", help="How many samples of the space.")] = None,
    seeds: Annotated[int, typer.Option(metavar="K", help="Runs of each sample, with K seeds; means are compared.")] = 1,
    scheduler: Annotated[
        SchedulerName,
        typer.Option(help="Stops trials that are behind others after as many rounds, or (pbt) lets them copy others."),
    ] = SchedulerName.NONE,
    search: Annotated[SearchName, typer.Option(help="Where samples come from.")] = SearchName.RANDOM,
    max_concurrent: Annotated[
        int | None, typer.Option(metavar="K", help="Trials at a time; by default all for which there is room.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:min|max]",
            help="What is to be small, or large: a metric of the task, train_loss, bytes or seconds. By default loss. "
            "May be repeated: the result then has the Pareto front, and schedulers follow the first.",
        ),
    ] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Run the trials in the simulator.")] = False,
    confirm: Annotated[
        int, typer.Option(metavar="K", help="With --simulate: run the best K again on the cluster.")
    ] = 0,
    overrides: cli.Overrides = None,
    sweep_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where it is written; new, or empty. By default runs/NAME-sweep-TIME-XXXX."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Instead of CONFIG: go on with the sweep of that directory."),
    ] = None,
    trust: cli.Trust = False,
    as_json: cli.AsJson = False,
) -> None:
    """Run a configuration many times with values from a search space (Ray Tune), and compare."""
    if (config is None) == (resume is None):
        raise typer.BadParameter("takes a CONFIG, or --resume DIR instead")
    if config is not None and (space is None or samples is None):
        raise typer.BadParameter("needs --space NAME and --samples N")
    if resume is not None and (space or samples or overrides or sweep_dir or metric):
        raise typer.BadParameter("--resume goes on with what was asked for; it takes no other options than --json")
    displays: list[SweepDisplay] = []
    results: list[SweepResult] = []

    def act(console: Console) -> dict[str, Any]:
        loaded = None
        if config is not None:
            loaded = cli.load_config(config, overrides, trust=trust)
        elif resume is not None:
            cli.stand_beside(resume, trust=trust)
        from starling.orchestrator.cli.sweep_display import SweepDisplay, print_result
        from starling.orchestrator.sweeps import sweep as sweeps

        def watch(board: Any, options: Any, folder: Path) -> SweepDisplay:  # noqa: ANN401 - Board and Options
            displays.append(SweepDisplay(console, board, options, folder))
            stack.enter_context(warnings_shown_by(displays[-1]))
            return displays[-1]

        stack = contextlib.ExitStack()
        try:
            if resume is not None:
                result = sweeps.resume_sweep(resume, trust=trust, watcher=watch, on_result=results.append)
            else:
                assert loaded is not None
                assert space is not None
                assert samples is not None
                options = sweeps.Options(
                    space=space,
                    samples=samples,
                    seeds=seeds,
                    scheduler=scheduler.value,
                    search=search.value,
                    max_concurrent=max_concurrent,
                    metrics=tuple(metric or ["loss"]),
                    simulate=simulate,
                    confirm=confirm,
                )
                result = sweeps.sweep(loaded, options, sweep_dir=sweep_dir, watcher=watch, on_result=results.append)
        finally:
            for display in displays:
                display.stop()
            stack.close()
            if results:
                print_result(console, results[-1])
        return result.to_json()

    def failed() -> dict[str, Any]:
        return results[-1].to_json() if results else {"sweep_dir": None, "trials": [], "best": None}

    cli.respond(act, failed, as_json=as_json)


@cli.app.command(epilog=cli.EXIT_CODES)
def track(
    run_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Of a run or a sweep.")],
    timeout_s: Annotated[float, typer.Option(min=1, help="How long to try.")] = 120.0,
    trust: cli.Trust = False,
    as_json: cli.AsJson = False,
) -> None:
    """Send what a tracker that was away has missed of a run, or of a sweep and its trials."""

    def act(console: Console) -> dict[str, Any]:
        from starling.orchestrator.records.run_config import directory

        folder = directory(run_dir)
        config = cli.load_run_config(folder, trust=trust)
        from starling.orchestrator.errors import RunError
        from starling.orchestrator.tracking.mlflow_tracker import send_left

        num_runs, done = send_left(folder, config, timeout_s)
        if not done:
            raise RunError(f"{folder}: not all could be sent within {timeout_s:g} s; what is left waits there")
        runs = f"{num_runs} run{'s' if num_runs != 1 else ''}"
        said = f"what was left of {runs} is sent" if num_runs else "nothing was left to be sent"
        console.print(said, highlight=False, soft_wrap=True)
        return {"status": "ok", "runs": num_runs}

    cli.respond(act, as_json=as_json)
