"""Ray's private parts that Starling uses, in one place, and the versions of Ray that have them as they are used here.

Ray promises nothing about these from one minor version to the next. Each function says which public part is lacking.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, cast

import ray

from starling.orchestrator.errors import ClusterError

FIRST, LAST = (2, 53), (2, 60)
"""Versions of Ray, oldest and newest, with which the tests on Ray have passed."""

_KNOWN = f"{'.'.join(map(str, FIRST))} to {'.'.join(map(str, LAST))}"

try:
    from ray import _raylet
    from ray._private import (
        grpc_utils,
        internal_api,
        node,
        ray_constants,
        services,
        state,
        utils,
        worker,
    )
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.experimental import internal_kv
except ImportError as error:
    problem = f"ray {ray.__version__} lacks something that Starling uses ({error}); install Ray {_KNOWN}"
    raise ClusterError(problem) from None

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import grpc

_LOG = logging.getLogger("starling")

GCS_PORT_VARIABLE: str = ray_constants.GCS_PORT_ENVIRONMENT_VARIABLE
CLUSTERS_VARIABLE: str = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
"""``0`` in the environment: Ray's processes bind to loopback alone."""

VITAL = (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET)
"""Processes of a Ray without which no run goes on."""


def check_version(version: str = ray.__version__) -> None:
    """Warn, in one line, of a Ray that is older or newer than the versions that were tried."""
    numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    if not FIRST <= tuple(numbers) <= LAST:
        _LOG.warning("Ray %s was not tried with this Starling; if it fails, install one of %s", version, _KNOWN)


# --- sessions --------------------------------------------------------------------------------------------------------


def vital_processes() -> dict[str, int]:
    """Return the ids, by name, of the live vital processes of the Ray that this process started."""
    ours: Any = vars(worker)["_global_node"]
    return {} if ours is None else {name: process.pid for name, process in ours.live_processes() if name in VITAL}


def ended_vital_processes() -> list[str]:
    """Return the names of the vital processes that have ended, of the Ray that this process started."""
    ours: Any = vars(worker)["_global_node"]
    return [] if ours is None else [name for name, _ in ours.dead_processes() if name in VITAL]


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """Let a Ray that starts meanwhile bind to loopback; ``CLUSTERS_VARIABLE`` tells only its child processes."""
    enabled = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled


@contextlib.contextmanager
def bare() -> Iterator[None]:
    """Start of a Ray what trains, and no more: no autoscaler, no dashboard, nobody who reads what workers print.

    We use none of them. Each is a Python process that imports Ray. Ray waits for the dashboard's before it starts the
    raylet, also where the dashboard would only report its use. The raylet waits for its agent, which without a
    dashboard serves nobody. On a busy machine these imports take longer than Ray waits.
    """
    kept = {name: getattr(node.Node, name) for name in ("start_monitor", "start_log_monitor", "start_api_server")}
    dependencies = utils.get_dashboard_dependency_error
    for name in ("start_monitor", "start_log_monitor"):
        setattr(node.Node, name, lambda _: None)
    setattr(node.Node, "start_api_server", _without_dashboard)  # noqa: B010 - a type checker compares the signatures
    utils.get_dashboard_dependency_error = _not_wanted
    try:
        yield
    finally:
        utils.get_dashboard_dependency_error = dependencies
        for name, method in kept.items():
            setattr(node.Node, name, method)


def _without_dashboard(of: Any, **_: object) -> None:  # noqa: ANN401 - Ray's node
    of._webui_url = ""  # noqa: SLF001 - as Ray has it where there is none


def _not_wanted() -> ImportError:
    """Let Ray take itself for an installation without ``ray[default]``, whose agents serve no dashboard."""
    return ImportError("no dashboard is wanted")


def print_with(printer: Callable[..., None]) -> Callable[..., None]:
    """Let ``printer`` take the lines that Ray prints about machines; return the printer that it replaces.

    Whatever ``log_to_driver`` says, Ray writes them to stdout, pages of them when a machine dies, among our results.
    """
    before = worker.print_to_stdstream
    worker.print_to_stdstream = printer
    return before


def read_authentication_again() -> None:
    """Read the mode and token from the environment; Ray's core does so once, when it is imported."""
    core: Any = _raylet  # compiled, and without types
    core.Config.initialize("")
    core.AuthenticationTokenLoader.instance().reset_cache()


# --- the state of a cluster ------------------------------------------------------------------------------------------


def draining_machines() -> dict[str, int]:
    """Return the deadlines of machines that are being drained, by name: milliseconds of the wall clock, or 0."""
    return state.state.get_draining_nodes()


def free_resources() -> dict[str, dict[str, float]]:
    """Return the resources that are free on each machine, by its name."""
    return state.state.available_resources_per_node()


def spilled_bytes(timeout_s: float) -> int:
    """Return the bytes written to disks because object stores were full, since Ray began."""
    return internal_api.get_memory_info_reply(state.state, timeout_seconds=timeout_s).store_stats.spilled_bytes_total


def has_autoscaler_v2() -> bool:
    """Return whether the cluster's autoscaler is version 2, as the head says."""
    return is_autoscaler_v2(fetch_from_server=True, gcs_client=internal_kv.internal_kv_get_gcs_client())


# --- addresses -------------------------------------------------------------------------------------------------------


def own_address(host: str) -> str:
    """Return the address that Ray puts in the place of ``host`` if that is loopback, else ``host``."""
    return services.resolve_ip_for_localhost(host)


@contextlib.contextmanager
def addresses_as_written() -> Iterator[None]:
    """Let Ray leave addresses of loopback as they are."""
    resolve = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = resolve


def bootstrap_address(address: str) -> str | None:
    """Return ``host:port`` of the head that Ray takes for ``address``; None if it finds none for ``auto``."""
    return services.canonicalize_bootstrap_address(address)


def ask_cluster_id(address: str, timeout_s: float) -> None:
    """Ask the head at ``address`` for the cluster's id.

    Raises:
        grpc.RpcError: it does not answer, or refuses.
        OSError, RuntimeError, ValueError: of certificates and tokens.
    """
    services_pb2: Any = gcs_service_pb2
    with contextlib.closing(cast("grpc.Channel", grpc_utils.init_grpc_channel(address))) as channel:
        stub: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        stub.GetClusterId(services_pb2.GetClusterIdRequest(), timeout=timeout_s)
