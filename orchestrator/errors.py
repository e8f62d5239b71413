"""Errors that speak to the person who can act, drawn as a tree.

    StarlingError                    one line: what is wrong, where, what would be right
    ├── ConfigError             2    a file, key or value that cannot be used
    │   ├── CheckpointReadError 2    no checkpoint, or one that cannot be used
    │   ├── RunDirectoryError   2    the run directory is taken
    │   └── LeaseError          2    another controller drives the run
    ├── SettingsError           2    (algorithms.errors) hyper-parameters that cannot work together
    ├── DataError               2    (algorithms.errors) the data cannot be read or divided
    ├── ClusterError            2    no cluster at that address, or too small for what is asked
    ├── CheckpointError         3    a checkpoint cannot be written; the run goes on
    ├── RunError                3    the run began, and failed
    │   ├── NodeLostError       3    a node's process or machine died
    │   ├── NodeGoneError       3    one died while it was asked for what another can give
    │   ├── LeaseLostError      3    another controller has taken the run over
    │   ├── DivergedError       3    replicas that must be identical are not
    │   ├── ProgramsDivergeError 3   two nodes await different operations at the same place
    │   └── NodeFailedError     3    a user's task or algorithm raised; carries its traceback
    ├── NonFiniteLossError      3    (actors.replica.replica) NaN or infinite loss
    └── ProgramError            3    (algorithms.errors) a program broke a rule of starling.algorithms.api
        └── UnfinishedExchange  3    (actors.host.host) a handle was not waited for, or not in its round

The numbers are exit codes of the process.
"""

from __future__ import annotations

from starling.algorithms.errors import DataError, ProgramError, SettingsError, StarlingError

__all__ = [
    "CheckpointError",
    "CheckpointReadError",
    "ClusterError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "LeaseError",
    "LeaseLostError",
    "NodeFailedError",
    "NodeGoneError",
    "NodeLostError",
    "ProgramError",
    "ProgramsDivergeError",
    "RunDirectoryError",
    "RunError",
    "SettingsError",
    "StarlingError",
    "exit_code",
]

EXIT_USAGE = 2
EXIT_FAILED = 3
EXIT_INTERRUPTED = 130


class ConfigError(StarlingError):
    """A file, key or value that cannot be used; ``str`` has one line for each."""


class RunDirectoryError(ConfigError):
    """The run directory holds a run already."""


class CheckpointReadError(ConfigError):
    """Raised for a checkpoint that is missing or unusable: damaged, of another run, or by a newer Starling."""


class CheckpointError(StarlingError):
    """A checkpoint cannot be written. Training does not end for it."""


class LeaseError(ConfigError):
    """Another controller drives the run."""


class ClusterError(StarlingError):
    """Raised when no cluster is at the address, or the cluster is too small for the run."""


class RunError(StarlingError):
    """The run began, and failed."""


class NodeLostError(RunError):
    """A node's process or machine died."""


class NodeGoneError(NodeLostError):
    """``node`` died while it was asked for something that another may be able to give."""

    def __init__(self, node: int, message: str) -> None:
        super().__init__(message)
        self.node = node


class LeaseLostError(RunError):
    """Another controller has taken the run over."""


class DivergedError(RunError):
    """Replicas that must be identical are not."""


class ProgramsDivergeError(RunError):
    """Two nodes await different operations at the same place of their programs."""


class NodeFailedError(RunError):
    """A task or an algorithm raised on a node."""

    def __init__(self, message: str, traceback: str | None = None) -> None:
        super().__init__(message)
        self.traceback = traceback
        """Traceback of the exception on the node, where it says more than the message."""


def exit_code(error: StarlingError) -> int:
    """The process's exit code for an error."""
    return EXIT_USAGE if isinstance(error, ConfigError | SettingsError | DataError | ClusterError) else EXIT_FAILED
