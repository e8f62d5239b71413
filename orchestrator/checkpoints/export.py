"""A run's model in a file for others: the one that it ended with, or that of a checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from starling.actors.replica.digest import digest_tensors
from starling.actors.replica.mean_model import mean_model
from starling.actors.replica.node_data import DataSource
from starling.actors.replica.replica import Replica
from starling.actors.replica.state_transfer import donor_among, load_state, with_shared
from starling.actors.tasks import Task, TensorSamples
from starling.actors.training.module_init import initial_module
from starling.actors.training.weights import load_into, read_weights
from starling.algorithms.api import SERVER
from starling.algorithms.errors import ProgramError
from starling.algorithms.words import listed
from starling.orchestrator.checkpoints import saved_state
from starling.orchestrator.checkpoints.filesystems import one_line
from starling.orchestrator.checkpoints.schedule import MAIL
from starling.orchestrator.checkpoints.store import CheckpointStore
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import CheckpointReadError, ConfigError
from starling.orchestrator.given_path import given
from starling.orchestrator.records import identity
from starling.orchestrator.records.run_config import configuration, directory
from starling.orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from starling.actors.replica.state_transfer import StateExport
    from starling.algorithms.api import NodeId
    from starling.orchestrator.checkpoints.reader import Checkpoint
    from starling.orchestrator.config.schema import Config

Format: TypeAlias = Literal["safetensors", "torch", "hf"]

FOLDER = "exported"
_SUFFIX = {"safetensors": ".safetensors", "torch": ".pt", "hf": ""}


@dataclass(frozen=True)
class Exported:
    """A model that was written."""

    run_id: str
    round: int | None
    """Round of the checkpoint; None: the model with which the run ended."""
    format: Format
    path: str
    """Path of the file, or of the folder."""
    nodes: int | None
    """Number of models of which it is the mean; None for a finished run, where that is not recorded."""
    digest: str
    """SHA-256 of the exported model, equal to the digest of a run that ends after this round."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def export(
    run_dir: str | Path,
    number: int | None = None,
    form: Format = "safetensors",
    to: Path | None = None,
    *,
    trust: bool = False,
) -> Exported:
    """Write a run's model.

    Args:
        run_dir: of the run, finished or not.
        number: the round of a checkpoint; default: the model that the run ended with.
        form: ``safetensors``, as ``model.safetensors`` in the run directory; ``torch``, a ``state_dict`` of plain
            tensors; ``hf``, a folder as the task exports it.
        to: the file, or for ``hf`` the folder; default: in ``exported/`` of the run directory.
        trust: its configuration may name code although somebody else wrote it.

    Raises:
        ConfigError: there is no such model, or the task has no such form, or it cannot be written.
        DataError: what the model is made from cannot be read.
    """
    path = directory(run_dir)
    config = configuration(path, trust=trust)
    _refuse_form(config.task, form)
    run_id = identity.run_id(path)
    store = CheckpointStore(config.checkpoint.uri, path, run_id, keep=config.checkpoint.keep)
    nodes: int | None = None
    if number is None:
        _require_end(path, store)
        tensors = read_weights("run directory", str(path))
    else:
        checkpoint = saved_state.check(store.read(number=number))
        identity.require_own_checkpoint(path, checkpoint.where, has_mark=checkpoint.is_ours, trust=trust)
        identity.require_trust(path, checkpoint.controller["config"], trust=trust, what="checkpoint")
        config = parse(checkpoint.controller["config"], source=checkpoint.where)
        tensors, nodes = model_of(checkpoint, config)
    name = "model" if number is None else f"model-round-{number:06}"
    target = given(to, "--to") if to else path / FOLDER / f"{name}{_SUFFIX[form]}"
    if to is None:
        _refuse_links(Folder(path), f"{FOLDER}/{target.name}")
    if to and form != "hf" and target.is_dir():
        target /= f"{name}{_SUFFIX[form]}"
    try:
        _write(tensors, config, form, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(f"{target}: cannot be written: {reason}") from None
    return Exported(run_id, number, form, str(target), nodes, digest_tensors(tensors))


def model_of(checkpoint: Checkpoint, config: Config) -> tuple[dict[str, Tensor], int]:
    """The model that the run would have ended with, had it ended at a checkpoint; and of how many it is the mean.

    Needs no data: nothing is trained.

    Args:
        checkpoint: of the run.
        config: of the run when the checkpoint was made.

    Raises:
        ConfigError: the checkpoint is of another model.
        DataError: what the model is made from cannot be read.
    """
    states = {node: state for node, state in checkpoint.nodes.items() if node != MAIL}
    donor = donor_among(states)
    chosen = _result(checkpoint, config, states)
    spec = dataclasses.replace(
        config.replica_spec(),
        # All of what it began from is in what is loaded.
        task=config.task.model_copy(update={"init_from": None}),
        optimizer=config.optimizer.model_copy(update={"compile": False}),
    )
    replica = Replica(SERVER, spec, DataSource(TensorSamples(torch.empty(0)), torch.empty(0, dtype=torch.int64)))
    as_own = {"run": spec.fingerprint, "optimizer": None, "position": None}

    def put(node: NodeId) -> None:
        state = with_shared(states[node], donor)
        replica.id = node
        try:
            load_state(replica, dataclasses.replace(state, meta=state.meta | as_own))
        except ProgramError:
            message = f"{checkpoint.where}: the model has other tensors there than it has by the task's configuration"
            raise ConfigError(message) from None

    def models() -> Iterator[tuple[Tensor, Tensor]]:
        for node in chosen:
            put(node)
            yield replica.committed_model()

    mean = mean_model(models()) if len(chosen) > 1 else (None, None)
    put(chosen[0])
    tensors = {name: tensor.detach().clone() for name, tensor in replica.model_tensors(*mean).items()}
    return tensors, len(chosen)


def _result(checkpoint: Checkpoint, config: Config, states: dict[NodeId, StateExport]) -> list[NodeId]:
    """Return the nodes whose mean model is the run's, as the loops over rounds have it."""
    algorithm, saved = config.algorithm, checkpoint.controller
    if algorithm.has_server:
        return [SERVER]
    if algorithm.synchronous:
        last = checkpoint.number
        sound = [node for node in saved["progress"]["members"] if node in states and states[node].meta["round"] == last]
        return sound[:1] if algorithm.replicated else sound
    return [saved["loop"]["last"]] if algorithm.result == "last" else sorted(saved["loop"]["present"])


# --- files -----------------------------------------------------------------------------------------------------------


def _refuse_links(folder: Folder, place: str) -> None:
    """Refuse to write through a link that somebody put into the run's directory.

    Raises:
        ConfigError: there is one.
    """
    try:
        folder.refuse_link(place)
    except OSError as error:
        raise ConfigError(f"{folder}/{place}: {error.strerror}; name another place with --to") from None


def _refuse_form(task: Task, form: Format) -> None:
    if form == "hf" and type(task).export is Task.export:
        raise ConfigError(
            f"--format hf: the task {task.name} has no form that Hugging Face's libraries read; hf_causal_lm and "
            "hf_classifier have, and others take --format safetensors or torch"
        )


def _require_end(path: Path, store: CheckpointStore) -> None:
    if (path / "model.safetensors").is_file():
        return
    try:
        rounds = store.rounds()
    except CheckpointReadError:
        rounds = []
    what = f"--round {rounds[-1]} exports a checkpoint's; there are {listed(rounds)}" if rounds else ""
    raise ConfigError(f"{path}: the run has not ended with a model; {what or 'and there is no checkpoint of it'}")


def _write(tensors: dict[str, Tensor], config: Config, form: Format, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if form == "hf":
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{target}: is there already; name a new folder with --to")
        config.task.export(_module(tensors, config), target)
        return
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link
    try:
        if form == "torch":
            state = dict(_module(tensors, config).state_dict())
            try:
                torch.save(state, partial)
            except RuntimeError as error:  # so it calls what the disk refuses
                raise OSError(one_line(error)) from None
        else:
            save_file(tensors, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _module(tensors: dict[str, Tensor], config: Config) -> nn.Module:
    """The module with these tensors, in evaluation mode."""
    task = config.task.model_copy(update={"init_from": None})
    module = initial_module(task, config.seed, torch.device("cpu"))
    load_into(module, tensors, "run directory", "the model")
    return module.eval()
