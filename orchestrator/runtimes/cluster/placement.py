"""The Ray that a run uses, and where on it the run's actors are placed."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from starling.orchestrator.runtimes.cluster import session

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.errors import RunError


class Placement:
    """Connects to Ray, counts the actors that fit, and says where they go: spread over all machines.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._session: session.Session | None = None
        self._avoided: set[str] = set()

    def connect(self, num_cpus: float) -> None:
        """Connect to the configured Ray, or start one of our own with ``num_cpus``.

        Raises:
            ClusterError: neither succeeds.
        """
        self._session = self._connect(num_cpus)

    def _connect(self, num_cpus: float) -> session.Session:
        cluster = self._config.cluster
        return session.connect(
            cluster.address,
            num_cpus=num_cpus,
            object_store_bytes=cluster.object_store_bytes,
            runtime_env=cluster.runtime_env or None,
        )

    def demand(self, num_nodes: int) -> tuple[float, float]:
        """CPUs and GPUs of an actor that hosts ``num_nodes``."""
        return self._config.cluster.num_cpus * num_nodes, self._config.cluster.num_gpus * num_nodes

    def count(self, num_nodes: int) -> int:
        """Count the actors of ``num_nodes`` nodes each that fit on an empty Ray."""
        return session.places(*self.demand(num_nodes), free=False)

    def count_free(self, num_nodes: int, num_alive: int) -> int:
        """Count the actors of ``num_nodes`` nodes each that fit besides the run's ``num_alive`` actors."""
        del num_alive  # Ray itself knows what is taken
        return session.places(*self.demand(num_nodes), free=True)

    def avoid(self, machine: str) -> None:
        """Place no further actors on a machine, if there is room elsewhere."""
        self._avoided.add(machine)

    def strategy(self) -> Any:  # noqa: ANN401 - a name, or an object of Ray's
        """Return Ray's scheduling strategy for the next actor."""
        return session.elsewhere(self._avoided) if self._avoided else "SPREAD"

    def sys_path(self) -> tuple[str, ...]:
        """Return the folders in which actors look for modules; empty if they run on other machines."""
        return tuple(folder for folder in sys.path if folder) if self.is_local else ()

    @property
    def is_local(self) -> bool:
        """Whether Ray is one of our own."""
        return self._session is not None and self._session.is_local

    @property
    def is_shared(self) -> bool:
        """Whether Ray outlives the run."""
        return self._session is not None and not self._session.is_local

    @property
    def vital(self) -> Mapping[str, int]:
        """Process ids of a Ray of our own, by name."""
        return {} if self._session is None else self._session.vital

    def output_of(self, pid: int) -> list[str]:
        """Return the last lines that a worker process wrote."""
        return [] if self._session is None else self._session.worker_output(pid)

    def check(self) -> None:
        """Raise the cause of a failure, if it is Ray's own end."""
        if self._session is not None:
            self._session.check()

    def ended(self, name: str) -> RunError:
        """Return the error that says that one of Ray's own processes has ended."""
        assert self._session is not None
        return self._session.ended(name)

    def close(self) -> None:
        """Disconnect, and end a Ray of our own. Never raises."""
        if self._session is not None:
            with contextlib.suppress(Exception):
                self._session.close()
            self._session = None
