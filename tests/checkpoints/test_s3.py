"""Checkpoints by the S3 protocol: pyarrow's client against moto's server on loopback."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow.fs import FileSelector, FileSystem

from starling.orchestrator.checkpoints import filesystems
from starling.orchestrator.checkpoints.store import CheckpointStore
from starling.orchestrator.checkpoints.writer import CheckpointWriter
from starling.orchestrator.errors import CheckpointError, CheckpointReadError
from tests.checkpoint_states import export_of, is_of, states
from tests.paths import PYTHONPATH

LONG_S = 60


class Server:
    """moto's, with a door: requests are counted, and from one on refused."""

    def __init__(self) -> None:
        # Here, as it takes a second, which every process that looks for tests would spend.
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        self.requests = 0
        self.closed_from: int | None = None

    def __call__(self, environ: Any, start_response: Any) -> Any:
        self.requests += 1
        if self.closed_from is not None and self.requests > self.closed_from:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>not now</Message></Error>"]
        return self._app(environ, start_response)

    def uri(self, bucket: str) -> str:
        where = f"scheme=http&endpoint_override=127.0.0.1:{self._server.server_port}&region=us-east-1"
        return f"s3://me:s3cr3t@{bucket}/runs/?{where}"

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join(LONG_S)
        self._server.server_close()
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Any:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def uri(server: Server, request: pytest.FixtureRequest) -> Any:
    """Of a bucket of its own."""
    bucket = request.node.name.split("[")[0].replace("_", "-")[5:60]
    uri = server.uri(bucket)
    filesystem, _ = FileSystem.from_uri(f"{uri}&allow_bucket_creation=true")
    filesystem.create_dir(bucket)
    yield uri
    server.closed_from = None


def store_at(uri: str, *seeds: int, run_id: str = "r1", **keys: Any) -> CheckpointStore:
    store = CheckpointStore(uri, Path("nowhere"), run_id, **keys)
    for seed in seeds:
        store.write(seed, {"seed": seed}, states(seed))
    return store


def objects(uri: str) -> dict[str, int]:
    filesystem, root = FileSystem.from_uri(uri)
    infos = filesystem.get_file_info(FileSelector(root.rstrip("/"), recursive=True))
    return {info.path.removeprefix(root).lstrip("/"): info.size for info in infos if info.is_file}


def test_checkpoints_on_s3(uri: str):
    store = store_at(uri, 1, 2, 3, keep=2)
    assert store.untidy is None
    assert store.rounds() == [2, 3]
    assert is_of(store.read(), 3)
    assert is_of(store.read(from_previous=True), 2)
    assert store.read().where.endswith("/runs/r1/round-000003")
    files = ("manifest.json", "state.json", "tensors-000.safetensors")
    assert sorted(objects(uri)) == [f"r1/round-{number:06}/{file}" for number in (2, 3) for file in files]
    # Another run beside it is another run.
    other = store_at(uri, 9, run_id="r2")
    assert (other.rounds(), store.rounds()) == ([9], [2, 3])
    # The same round again.
    store.write(2, {"seed": 2}, states(2))
    assert store.rounds() == [2]
    assert is_of(store.read(), 2)
    filesystem, root = FileSystem.from_uri(uri)
    with filesystem.open_output_stream(f"{root}/r1/round-000002/state.json") as stream:
        stream.write(b"{}")
    with pytest.raises(CheckpointReadError, match=r"round-000002/state.1.json|round-000002/state.json"):
        filesystem.delete_file(f"{root}/r1/round-000002/state.1.json")
        store.read()


def test_a_file_in_parts(uri: str):
    tensor = torch.arange(6_000_000.0)
    store_at(uri).write(5, {}, [(0, export_of(tensor)), (1, export_of(tensor, torch.ones(3)))])
    (size,) = (size for name, size in objects(uri).items() if name.endswith("000.safetensors"))
    assert size > 2 * 10 * 1024 * 1024  # more than two of the client's parts
    nodes = store_at(uri).read().nodes
    assert nodes[0].arrays[0].tobytes() == tensor.numpy().tobytes()
    assert nodes[1].arrays[0] is nodes[0].arrays[0]


def test_nothing_secret_is_said(server: Server):
    with pytest.raises(CheckpointError) as caught:
        store_at(server.uri("absent"), 1)
    message = str(caught.value)
    assert message.startswith("checkpoint s3://me:***@absent/runs/r1/round-000001 cannot be written: ")
    assert "NO_SUCH_BUCKET" in message
    assert "s3cr3t" not in message
    assert message.isprintable()
    with pytest.raises(CheckpointReadError, match="there is no checkpoint") as read:
        store_at(server.uri("absent")).read()
    assert "s3cr3t" not in str(read.value)


def test_a_server_that_refuses(uri: str, server: Server):
    """From any request on: the checkpoint before is there, and the next attempt is all that it takes."""
    store_at(uri, 1, keep=2)
    before = server.requests
    store_at(uri, 2, keep=2)
    needed = server.requests - before
    assert needed > 10
    said: list[str] = []
    for k in range(needed):
        number = 3 + k
        last = store_at(uri).rounds()[-1]
        server.closed_from = server.requests + k
        try:
            store_at(uri, number, keep=2)
        except CheckpointError as error:
            said.append(str(error))
        else:
            last = number
        server.closed_from = None
        assert is_of(store_at(uri).read(), last)
    assert len(said) > 5
    assert all("ACCESS_DENIED" in one and one.isprintable() and "s3cr3t" not in one for one in said)
    store_at(uri, 100, keep=2)
    assert {name.split("/")[1] for name in objects(uri)} == {f"round-{one:06}" for one in (last, 100)}


def test_the_writer_tries_again(uri: str, server: Server):
    store = store_at(uri, 1)
    server.closed_from = server.requests + 5

    def say(what: str, facts: Any) -> None:
        server.closed_from = None

    writer = CheckpointWriter(store, say, pauses_s=(0.001,))
    writer.submit(2, {"seed": 2}, states(2))
    assert writer.join(LONG_S)
    assert writer.close(LONG_S)
    assert (writer.num_written, writer.num_retries) == (1, 1)
    assert is_of(store_at(uri).read(), 2)


# --- servers that do not answer -------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Any:
    """A server that takes connections and says nothing."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=50)
    kept: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                kept.append(listener.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(LONG_S)
    for one in kept:
        one.close()


@pytest.mark.slow
def test_a_server_that_is_silent_is_given_up(silent: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(filesystems, "REQUEST_TIMEOUT_S", 1.0)
    uri = f"s3://me:s3cr3t@bucket/?scheme=http&endpoint_override=127.0.0.1:{silent}&region=us-east-1"
    with pytest.raises(CheckpointError, match="NETWORK_CONNECTION"):
        store_at(uri, 1)


AT_EXIT = """
import sys, time
from pathlib import Path
from starling.orchestrator.checkpoints import writer
from starling.orchestrator.checkpoints.store import CheckpointStore
from tests.checkpoint_states import states

writer._AT_EXIT_S = 0.5
ours = writer.CheckpointWriter(CheckpointStore(sys.argv[1], Path("x"), "r1"), lambda what, facts: None)
ours.submit(1, {}, states(1))
time.sleep(0.5)
print("ends")
"""


@pytest.mark.slow
def test_a_process_can_end_while_a_server_is_silent(silent: int, tmp_path: Path):
    script = tmp_path / "at_exit.py"
    script.write_text(AT_EXIT)
    uri = f"s3://me:s3cr3t@bucket/?scheme=http&endpoint_override=127.0.0.1:{silent}&region=us-east-1"
    done = subprocess.run(
        [sys.executable, script, uri],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={"PYTHONPATH": PYTHONPATH},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")
