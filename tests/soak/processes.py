"""A simulator whose spares may die, and a run that is killed behind a commit and resumed by another process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from starling.orchestrator.checkpoints import saved_state
from starling.orchestrator.checkpoints.schedule import Checkpointing
from starling.orchestrator.checkpoints.store import CheckpointStore
from starling.orchestrator.control.restore import Restoration
from starling.orchestrator.records import round_log
from starling.orchestrator.runtimes.events import SpareLost
from starling.orchestrator.runtimes.simulator.runtime import Simulator

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from starling.actors.replica.state_transfer import StateExport
    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.records.round_log import Entry

RUN_ID = "soak"


class Spared(Simulator):
    """Also loses processes that stand by."""

    def lose_spare(self) -> None:
        """The spare that would be there first dies, if there is any."""
        spares = self.processes.spares
        if spares:
            spares.remove(min(spares))
            self.clock.ready.append(SpareLost("its process died"))


class Killed(BaseException):
    """A controller is gone; not an error that anything between could take for one of its own."""


class Moment(Checkpointing):
    """A run is saved behind one round, where nodes without a barrier stand still, and at no other moment.

    Args:
        number: of the round; -1: none.
        where: it is written to; ``None``: nowhere, and the run goes on. Else the run is killed behind it.
    """

    def __init__(self, config: Config, runtime: Simulator, number: int, where: Path | None = None) -> None:
        super().__init__(config.checkpoint, _store(where or Path("nowhere")), runtime)
        self._number, self._is_written = number, where is not None

    def is_due(self, number: int) -> bool:
        """Whether it is the one."""
        return number == self._number

    def is_saved(self, number: int) -> bool:
        """A run's end is not saved."""
        del number
        return True

    def save(self, number: int, controller: Mapping[str, Any], nodes: Iterator[tuple[NodeId, StateExport]]) -> None:
        """Write it and be killed, or do nothing."""
        if self._is_written:
            super().save(number, controller, nodes)
            self.close()
            raise Killed


class Directory:
    """Of a run's directory what a resumed run cannot do without.

    Args:
        config: of the run.
        path: of an empty folder.
    """

    def __init__(self, config: Config, path: Path) -> None:
        self.path = path
        self._config = config
        self._log = round_log.SealedLog(RUN_ID)

    def saving(self, num_rounds: int) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {"directory": {"round": num_rounds - 1, "events": 0}, "config": self._config.dump()}

    def sealed(self, entry: Entry) -> None:
        """Keep the record of a round."""
        with (self.path / round_log.NAME).open("ab") as file:
            file.write(self._log.append(entry))

    def restoration(self) -> Restoration:
        """What the run goes on from."""
        return Restoration(saved_state.check(_store(self.path).read()), self._config, self._config)


def _store(path: Path) -> CheckpointStore:
    return CheckpointStore(None, path, RUN_ID)
