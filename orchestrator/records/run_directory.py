"""The run directory: everything that a run leaves behind, in plain files.

    config.yaml         all keys with their resolved values; runs again as it is
    events.jsonl        the controller's record: rounds begun, committed, aborted; nodes lost
    metrics.jsonl       one object per committed round
    rounds.log          what rounds can be replayed from, where the algorithm offers it (orchestrator.records.round_log)
    snapshots/          models after some of those rounds
    logs/node-003.log   what node 3 wrote to its log
    model.safetensors   the final model
    average.safetensors the running average of the models, with evaluation.average
    export/             the same as others read it, of tasks that have such a form (Hugging Face)
    summary.json        what `--json` prints
    checkpoints/        from which `starling resume` goes on (orchestrator.checkpoints.store), unless they go elsewhere
    undone.jsonl        events of rounds that a resumed run had done after its checkpoint, and did again
    curves.png          losses over rounds and bytes
    mlflow.json         which of MLflow's runs is this one
    lease.json          who drives the run, while it goes on
    run.json            the run's id, its configuration's digest, and the mark of who wrote it (records.identity)

It is claimed before the nodes start, and a run that never began leaves none.
"""

from __future__ import annotations

import json
import logging
import secrets
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from starling.actors.tasks import Task
from starling.actors.training.module_init import initial_module
from starling.actors.training.weights import load_into, read_weights
from starling.algorithms.api import SERVER
from starling.orchestrator.config.yaml_loader import dump
from starling.orchestrator.errors import RunDirectoryError, RunError
from starling.orchestrator.given_path import given
from starling.orchestrator.records import identity, round_log, run_config, truncate
from starling.orchestrator.records.appender import Appender
from starling.orchestrator.records.observers import Observer, finite
from starling.orchestrator.records.round_log import RunEnd, SealedLog, Snapshot
from starling.orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.records.observers import RoundRecord, Started, Summary
    from starling.orchestrator.records.round_log import Entry
    from starling.orchestrator.runtimes.events import FinalModel

_LOG = logging.getLogger("starling")
_DEFAULT_ROOT = "runs"
_PICTURE = "curves.png"


class RunDirectory(Observer):
    """Writes a run's directory.

    Raises:
        RunDirectoryError: the directory is in use, or cannot be made.
    """

    def __init__(
        self,
        config: Config,
        path: str | Path | None = None,
        *,
        resumed: Mapping[str, Any] | None = None,
        picture: bool = True,
    ) -> None:
        """A new one, or, if it is ``resumed``, one that goes on: with what it had itself put into a checkpoint."""
        self._has_picture = picture
        self.path = given(_default(config.name) if path is None else path, "run directory", RunDirectoryError)
        self._config = config
        self._text = dump(config.dump()).encode()
        self._started: Started | None = None
        self._rounds: list[RoundRecord] = []
        self._files: dict[str, Appender] = {}
        self._is_full = False
        """The disk takes no records, which has been logged."""
        self._sealed: SealedLog | None = None
        self._folder = Folder(self.path)
        self._is_resumed = resumed is not None
        self._run_id = self.path.name if resumed is None else identity.run_id(self.path)
        self._made = not self.path.exists()
        if resumed is None:
            self._claim()
        else:
            self._reopen(resumed["directory"])

    def _claim(self) -> None:
        config, path = self._config, self.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            taken = any(path.iterdir())
            if not taken:
                self._create("config.yaml", self._text)
                try:
                    identity.write(path, self.run_id, config.dump(), self._text)
                except OSError:
                    (path / "config.yaml").unlink(missing_ok=True)
                    raise
        except FileExistsError:
            taken = True
        except OSError as error:
            if self._made:
                with suppress(OSError):
                    path.rmdir()
            raise RunDirectoryError(f"run directory {path} cannot be made: {error.strerror}") from None
        if taken:
            what = "is in use: it is not empty" if path.is_dir() else "is not a directory"
            hint = f"name another one, or leave it out for {_DEFAULT_ROOT}/{config.name}-<time>"
            raise RunDirectoryError(f"run directory {path} {what}; {hint}")

    def _create(self, name: str, data: bytes) -> None:
        """Create a file exclusively (of two runs that found the directory empty, one goes on); whole, or not at all."""
        file = (self.path / name).open("xb")
        try:
            with file:
                file.write(data)
        except OSError:
            (self.path / name).unlink(missing_ok=True)  # a full disk: what there is of it would look like a run
            raise

    def _reopen(self, saved: Mapping[str, Any]) -> None:
        """Go back to where the checkpoint was written; what was written since moves to ``undone.jsonl``."""
        try:
            self._rounds = truncate.metrics(self.path / "metrics.jsonl", saved["round"])
            truncate.events(self.path / "events.jsonl", saved["events"], self.path / "undone.jsonl")
            self._sealed = truncate.rounds_log(self.path / round_log.NAME, self.run_id, saved["round"])
        except OSError as error:
            raise RunDirectoryError(f"run directory {self.path} cannot be reopened: {error.strerror}") from None

    def _go_on(self) -> None:
        """The run goes on: only now is what it had come to void, and is its configuration this one."""
        self._whole("config.yaml", self._text)
        try:
            identity.write(self.path, self.run_id, self._config.dump(), self._text)
            for name in ("summary.json", "model.safetensors", "average.safetensors"):
                self._folder.remove(name)
        except OSError as error:
            raise self._failure(identity.NAME, error) from None

    @property
    def run_id(self) -> str:
        """The run's name everywhere: that which its directory had at first."""
        return self._run_id

    def on_start(self, started: Started) -> None:
        if self._is_resumed:
            self._go_on()
        self._started = started

    def on_log(self, node: int, lines: Sequence[str]) -> None:
        # Opened each time: a run may have more nodes than a process may have open files.
        path = self.path / "logs" / ("server.log" if node == SERVER else f"node-{node:03}.log")
        try:
            with self._folder.append_text(f"logs/{path.name}") as file:
                file.writelines(f"{line}\n" for line in lines)
        except OSError as error:
            self._say_full(f"logs/{path.name}", error)

    def on_event(self, event: Mapping[str, Any]) -> None:
        self._line("events.jsonl", event)

    def on_round(self, record: RoundRecord) -> None:
        self._rounds.append(record)
        self._line("metrics.jsonl", asdict(record))

    def on_sealed(self, entry: Entry) -> None:
        if self._sealed is None:
            self._sealed = SealedLog(self.run_id)
        self._append(round_log.NAME, self._sealed.append(entry))

    def on_saving(self) -> Mapping[str, Any]:
        events = self._appender("events.jsonl").size
        here = {"round": self._rounds[-1].round if self._rounds else -1, "events": events}
        config = self._config.dump()
        config["cluster"]["runtime_env"] = {}  # it may have secrets, and checkpoints go to places of others
        return {"directory": here, "config": config}

    def on_snapshot(self, number: int, model: FinalModel) -> Path | None:
        try:
            self._folder.write(round_log.snapshot_name(number), model.safetensors)
        except OSError as error:
            self._say_full(round_log.snapshot_name(number), error)
            return None  # it is replayed from the one before
        self.on_sealed(Snapshot(number, model.digest))
        self._prune(number)
        return self.path / round_log.snapshot_name(number)

    def _prune(self, last: int) -> None:
        """Remove all snapshots but the newest: a joiner needs the last one, and a replay needs none."""
        names = self._folder.folders().get(round_log.SNAPSHOTS, set())
        rounds = sorted(number for name in names if (number := round_log.snapshot_round(name)) is not None)
        # Later ones are of rounds that a resumed run does again; until it gets there they are those of no run.
        kept = [number for number in rounds if number <= last][-self._config.replay.keep :]
        for number in rounds:
            if number not in kept:
                with suppress(OSError):
                    self._folder.remove(round_log.snapshot_name(number))

    def on_model(self, model: FinalModel) -> None:
        self._whole("model.safetensors", model.safetensors)
        if type(self._config.task).export is not Task.export:
            try:
                self._folder.remove_tree("export")  # of an end before this one; or a link, which is not followed
                self._config.task.export(load_model(self.path, trust=True), self.path / "export")
            except Exception as error:  # noqa: BLE001 - the model is there, and is worth more than its other form
                _LOG.warning("the model could not be exported: %s: %s", type(error).__name__, error)
        if self._sealed is not None:
            self.on_sealed(RunEnd(model.digest))

    def on_average(self, model: FinalModel) -> None:
        self._whole("average.safetensors", model.safetensors)

    def on_end(self, summary: Summary) -> None:
        self._close()
        if self._started is None:
            if not self._is_resumed:
                self._discard()
            return
        self._whole("summary.json", (json.dumps(summary.to_json(), indent=2) + "\n").encode())
        if self._rounds and self._has_picture:
            try:
                self._folder.remove(_PICTURE)  # it may be a link
                _draw(self.path / _PICTURE, self._started, self._rounds)
            except Exception as error:  # noqa: BLE001 - a picture is not worth a run
                _LOG.warning("curves.png could not be drawn: %s: %s", type(error).__name__, error)

    # --- files -------------------------------------------------------------------------------------------------------

    def _line(self, name: str, data: Mapping[str, Any]) -> None:
        self._append(name, (json.dumps(finite(data)) + "\n").encode())

    def _appender(self, name: str) -> Appender:
        if name not in self._files:
            self._files[name] = Appender(self._folder, name)
        return self._files[name]

    def _append(self, name: str, piece: bytes) -> None:
        problem = self._appender(name).append(piece)
        if problem is not None:
            self._say_full(name, problem)
        elif self._is_full and not any(file.num_pending for file in self._files.values()):
            self._is_full = False
            _LOG.warning("%s can be written again", self.path)

    def _say_full(self, name: str, error: OSError) -> None:
        if not self._is_full:
            self._is_full = True
            _LOG.warning(
                "%s cannot be written: %s; the run goes on, and what belongs there waits, or is lost at its end",
                self.path / name,
                error.strerror,
            )

    def _close(self) -> None:
        while self._files:
            name, file = self._files.popitem()
            problem = file.close()
            if problem is not None or file.num_lost:
                reason = "too much of it waited" if problem is None else problem.strerror
                _LOG.warning("the end of %s is lost: %s", self.path / name, reason)

    def _whole(self, name: str, data: bytes | memoryview) -> None:
        """Write a file that is there whole or not at all."""
        try:
            self._folder.write(name, data)
        except OSError as error:
            raise self._failure(name, error) from None

    def _failure(self, name: str, error: OSError) -> RunError:
        return RunError(f"{self.path / name} cannot be written: {error.strerror}")

    def _discard(self) -> None:
        with suppress(OSError):
            for name in ("config.yaml", identity.NAME):
                self._folder.remove(name)
            if self._made:
                self.path.rmdir()


def load_model(run_dir: str | Path, *, trust: bool = False) -> nn.Module:
    """The model that a run ended with, as a module in evaluation mode, in float32 on the CPU.

    Args:
        run_dir: of the run.
        trust: its configuration may name code although somebody else wrote it.

    Raises:
        ConfigError: it is not a run's directory, or not to be trusted.
        DataError: the run did not end with a model.
    """
    path = run_config.directory(run_dir)
    config = run_config.configuration(path, trust=trust)
    # What the run began from need not be there any more: all of it is in what it ended with.
    task = config.task.model_copy(update={"init_from": None})
    module = initial_module(task, config.seed, torch.device("cpu"))
    load_into(module, read_weights("run directory", str(path)), "run directory", str(path))
    return module.eval()


def _draw(path: Path, started: Started, rounds: Sequence[RoundRecord]) -> None:
    """Draw a run's curves."""
    from starling.orchestrator.records.curves import draw  # matplotlib takes a second to import

    draw(path, started, rounds)


def _default(name: str) -> Path:
    time = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return Path(_DEFAULT_ROOT) / f"{name}-{time}-{secrets.token_hex(2)}"
