"""Probes whether Ray's head answers at an address, before Ray tries to connect to it.

Ray itself tries for a quarter of an hour, and writes to the terminal meanwhile, below Python.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import tempfile
from typing import TYPE_CHECKING

import grpc

from starling.orchestrator.errors import ClusterError
from starling.orchestrator.runtimes.cluster import ray_internals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TIMEOUT_S = 3.0
"""Timeout of a connection."""
_ANSWER_TIMEOUT_S = 30.0
"""Timeout of a call: to a head on the other side of the world, or on a busy machine."""

_TOKEN = "RAY_AUTH_MODE=token with the same RAY_AUTH_TOKEN or ~/.ray/auth_token as the head"  # noqa: S105 - what to set
_OTHER = (
    "name the port of the cluster's head (6379 unless ray start was told another), not that of the Ray client (10001), "
    "the dashboard (8265) or the agents"
)

_NATIVE = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\]|[A-Z]\d{4} [\d:.]+ +\d+ \S+:\d+\]|WARNING: All log")
"""Beginnings of lines that the C++ code of Ray and gRPC writes."""


def probe(address: str) -> None:
    """Ask the head at ``address``, ``host:port`` or ``auto``, for its name.

    Raises:
        ClusterError: nothing answers there, or something else than a head, or it wants another token.
    """
    if address != "auto":
        _connect(address)
    with contextlib.suppress(ConnectionError, ValueError):  # which Ray raises again, at once
        found = ray_internals.bootstrap_address(address)
        if found is not None:
            _ask(address, found)


@contextlib.contextmanager
def as_written(address: str) -> Iterator[None]:
    """Let Ray connect to an address of loopback as it is written, where this machine's own does not answer.

    Ray puts this machine's own address in the place of 127.0.0.1. A Ray that listens on loopback alone, as one that we
    start does, was not found there: the run waited until Ray gave up.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or (own := ray_internals.own_address(host)) == host or _listens(own, port):
        yield
    else:
        with ray_internals.addresses_as_written():
            yield


def _listens(host: str, port: str) -> bool:
    try:
        with socket.create_connection((host, int(port)), timeout=_TIMEOUT_S):
            return True
    except (OSError, ValueError, OverflowError):
        return False


def _connect(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_S):
            return
    except (OSError, ValueError, OverflowError) as error:
        message = (
            f"cluster.address {address}: nothing answers there ({error}); check the address and port of the head node "
            "(ray status shows it), or use cluster.address: local"
        )
        raise ClusterError(message) from None


def _ask(address: str, found: str) -> None:
    where = f"cluster.address {address}" if address == found else f"cluster.address {address} ({found})"
    try:
        with quiet():
            ray_internals.ask_cluster_id(found, _ANSWER_TIMEOUT_S)
    except grpc.RpcError as error:
        code: Callable[[], grpc.StatusCode] | None = getattr(error, "code", None)
        problem = _problem(None if code is None else code())
        if problem is not None:
            raise ClusterError(f"{where}: {problem}") from None
    except (OSError, RuntimeError, ValueError) as error:  # certificates, a token
        raise ClusterError(f"{where}: cannot connect ({str(error).strip().partition(chr(10))[0][:200]})") from None


def _problem(code: grpc.StatusCode | None) -> str | None:
    match code:
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return f"the cluster wants a token, and does not accept this process's: {_TOKEN}"
        case grpc.StatusCode.UNIMPLEMENTED:
            return f"what answers there is not Ray's head; {_OTHER}"
        case _ if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            # Ray takes certificates of 127.0.0.1 at this machine's own address, Python's gRPC does not.
            return None
        case _:
            return (
                f"something listens there, and does not answer as Ray's head does; {_OTHER}; "
                "a head with TLS wants RAY_USE_TLS=1 and its certificates here too"
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Capture what native code writes to the terminal; what other code writes to stderr meanwhile is passed on."""
    with contextlib.ExitStack() as stack:
        try:
            taken = stack.enter_context(tempfile.TemporaryFile())
            before = os.dup(2)
        except OSError:  # there is no stderr, or no room
            yield
            return
        _flush()
        os.dup2(taken.fileno(), 2)
        try:
            yield
        finally:
            _flush()
            os.dup2(before, 2)
            os.close(before)
            taken.seek(0)
            others = [line for line in taken if not _NATIVE.match(line)]
            with contextlib.suppress(OSError):
                os.write(2, b"".join(others))


def _flush() -> None:
    with contextlib.suppress(OSError, AttributeError, ValueError):
        sys.stderr.flush()
