"""Ray's mutual TLS, with certificates made by the script in docs/security.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.cluster.conftest import Processes
from tests.cluster.test_submit import TINY
from tests.paths import PYTHONPATH, ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.smoke, pytest.mark.timeout(240)]

HEAD = """
import sys, ray
from starling.orchestrator.runtimes.cluster import session
ours = session.connect("local", num_cpus=2)
print("ready", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ours.close()
"""


def authority(folder: Path) -> dict[str, str]:
    """Certificates for this machine, and the variables that name them."""
    page = (ROOT / "docs/security.md").read_text()
    (script,) = re.findall(r"```bash\n(# tls\.sh.*?)```", page, re.DOTALL)
    folder.mkdir()
    subprocess.run(["bash", "-c", script, "tls.sh", "127.0.0.1"], cwd=folder, check=True, capture_output=True)
    assert (folder / "127.0.0.1.key").stat().st_mode & 0o77 == 0
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(folder / "ca.crt"),
        "RAY_TLS_SERVER_CERT": str(folder / "127.0.0.1.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / "127.0.0.1.key"),
    }


@pytest.fixture
def head(tmp_path: Path, processes: Processes) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray with TLS: its address, and what it takes to reach it."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    variables = authority(tmp_path / "ours")
    environment = {**os.environ, **variables, "PYTHONPATH": PYTHONPATH, "STARLING_TEST_MARK": processes.mark}
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("ready"):
        assert line
    yield line.split()[1], {**variables, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_of(process.pid)}
    process.communicate(timeout=60)


def token_of(pid: int) -> str:
    """The file with the token of a process's own Ray."""
    # Its watcher, a child too, has no environment.
    (path,) = {child.environ().get("RAY_AUTH_TOKEN_PATH") for child in psutil.Process(pid).children()} - {None}
    assert path is not None
    return path


def handshake(address: str, variables: dict[str, str], *, shows: bool = True) -> bytes:
    """What the server says first, through TLS."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=variables["RAY_TLS_CA_CERT"])
    context.set_alpn_protocols(["h2"])
    if shows:
        context.load_cert_chain(variables["RAY_TLS_SERVER_CERT"], variables["RAY_TLS_SERVER_KEY"])
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0")
        said = secure.recv(9)
    if not said:
        raise ConnectionError("closed")
    return said


def test_who_has_no_certificate_of_the_authority_is_refused(
    head: tuple[str, dict[str, str]], tmp_path: Path, processes: Processes
):
    address, variables = head
    assert handshake(address, variables)[3] == 4  # a frame of HTTP/2: its settings
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(address, variables, shows=False)
    other = authority(tmp_path / "theirs")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(address, other)  # nor would who has them talk to this cluster
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(address, {**other, "RAY_TLS_CA_CERT": variables["RAY_TLS_CA_CERT"]})

    # And a run through it, each node with its certificate.
    (tmp_path / "tiny.yaml").write_text(TINY)
    program = processes.start(
        "run",
        "tiny.yaml",
        "--json",
        "--set",
        f"cluster.address={address}",
        "--run-dir",
        "run",
        cwd=tmp_path,
        **variables,
    )
    out, err = program.communicate(timeout=100)
    assert program.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["status"] == "finished"
