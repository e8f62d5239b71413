"""What is said of an address at which no Ray's head answers, and what native code writes to the terminal."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ClusterError, ConfigError
from starling.orchestrator.runtimes.cluster import head, ray_internals

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """Something that takes connections; it gives an ``answer`` and hangs up, or (``None``) says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as kept:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = kept.enter_context(server.accept()[0])
                    if answer is not None:
                        connection.sendall(answer)
                        connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@contextlib.contextmanager
def grpc_server(code: grpc.StatusCode | None, *, has_service: bool = True) -> Iterator[str]:
    """A gRPC server: another than a head's, a head that refuses us with a ``code``, or one that answers."""

    class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
        def GetClusterId(self, request: object, context: Any) -> Any:  # noqa: N802 - gRPC's name
            del request
            if code is not None:
                context.abort(code, "no")
            pb2: Any = gcs_service_pb2
            return pb2.GetClusterIdReply()

    server = grpc.server(ThreadPoolExecutor(2))
    if has_service:
        gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Head(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture(autouse=True)
def on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray puts this machine's own address in the place of 127.0.0.1.
    monkeypatch.setattr(ray_internals.services, "resolve_ip_for_localhost", lambda host: host)
    monkeypatch.setattr(head, "_ANSWER_TIMEOUT_S", 0.5)


NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (listening(NOT_FOUND), "does not answer as Ray's head does; name"),
        (listening(b""), "does not answer as Ray's head does; name"),
        (listening(None), "does not answer as Ray's head does; name"),
        (grpc_server(None, has_service=False), "is not Ray's head; name the port of the cluster's head"),
        (grpc_server(grpc.StatusCode.UNAUTHENTICATED), "the cluster wants a token, and does not accept"),
    ],
    ids=["http", "hangs up", "mute", "other gRPC", "token"],
)
def test_what_is_not_a_head_is_one_line(there: Any, words: str, capfd: pytest.CaptureFixture[str]):
    with there as address, pytest.raises(ClusterError, match=words) as caught:
        head.probe(address)
    line = str(caught.value)
    assert line.startswith(f"cluster.address {address}: ")
    assert "\n" not in line
    assert len(line) < 400
    assert capfd.readouterr() == ("", "")


def test_with_tls_whom_ray_trusts_is_left_to_ray(monkeypatch: pytest.MonkeyPatch):
    assert "does not answer" in (head._problem(grpc.StatusCode.UNAVAILABLE) or "")
    monkeypatch.setenv("RAY_USE_TLS", "1")
    assert head._problem(grpc.StatusCode.UNAVAILABLE) is None
    assert "token" in (head._problem(grpc.StatusCode.UNAUTHENTICATED) or "")


def test_a_head_that_answers_is_left_to_ray():
    with grpc_server(None) as address:
        head.probe(address)


@pytest.mark.parametrize(("own", "found"), [("127.0.0.9", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")])
def test_a_head_on_loopback_alone_is_asked_there(own: str, found: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_internals.services, "resolve_ip_for_localhost", lambda host: own)
    with grpc_server(None) as address:
        port = address.rpartition(":")[2]
        with head.as_written(address):
            assert ray_internals.services.canonicalize_bootstrap_address(address) == f"{found}:{port}"
    assert ray_internals.services.resolve_ip_for_localhost("127.0.0.1") == own


def test_nothing_that_listens_is_said_at_once():
    with pytest.raises(ClusterError, match=r"^cluster.address 127.0.0.1:1: nothing answers there"):
        head.probe("127.0.0.1:1")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://127.0.0.1:10001", "ray:// is the Ray client, .* name the head itself: host:6379"),
        ("http://head:6379", "must be local, auto or host:port"),
        ("head", "must be local, auto or host:port"),
        ("", "must be local, auto or host:port"),
        ("head:port", "must be local, auto or host:port"),
    ],
)
def test_what_is_no_address_is_refused_with_the_configuration(address: str, words: str):
    with pytest.raises(ConfigError, match=f"cluster.address:? {words}"):
        parse({"algorithm": "ddp", "task": "quadratic", "cluster": {"address": address}})


@pytest.mark.parametrize("address", ["local", "auto", "head.example.org:6379", "10.0.0.1:1", "[::1]:6379"])
def test_addresses_are_taken(address: str):
    given = {"algorithm": "ddp", "task": "quadratic", "cluster": {"address": address}}
    assert parse(given).cluster.address == address


def test_native_lines_are_taken_and_all_others_written(capfd: pytest.CaptureFixture[str]):
    with head.quiet():
        os.write(2, b"[2026-11-30 18:12:58,403 W 14372 14372] gcs_client.cc:210: Failed to get cluster ID\n")
        os.write(2, b"a warning of somebody else's\n")
        os.write(2, b"[2026-11-30 18:13:04,418 W 14372 14372] rpc_client.h:153: Failed to connect\n")
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "a warning of somebody else's\nlater\n"
