"""Machines in a sandbox: a network of their own, and for each its own processes, /tmp, home and ssh server.

What runs in them cannot touch anything outside: ``ray stop`` sees the processes of its machine alone, ports are free,
and the network leads nowhere. What they leave is gone when they are. Linux namespaces do it; no containers are needed.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.paths import PYTHONPATH, ROOT

_ROOTLESS = os.geteuid() != 0
_UNSHARE = ["unshare", *(["--map-root-user"] if _ROOTLESS else [])]
_NSENTER = ["nsenter", *(["--user", "--preserve-credentials"] if _ROOTLESS else [])]


def lacks() -> str | None:
    """What this computer lacks for it."""
    for program in ("unshare", "nsenter", "mount", "ssh", "ssh-keygen", "bash"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    tried = subprocess.run(
        [*_UNSHARE, "--net", "--mount", "--pid", "--fork", "--mount-proc", "true"], check=False, capture_output=True
    )
    return None if tried.returncode == 0 else f"namespaces are not allowed here: {tried.stderr.decode().strip()}"


class Machine:
    """One of them; commands run in it as its only user."""

    def __init__(self, address: str, folder: Path, process: subprocess.Popen[str]) -> None:
        self.address, self.folder, self._process = address, folder, process
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("ready"), said
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self._first = children[0]

    @property
    def home(self) -> Path:
        """As it is seen from outside; inside it is /tmp/home."""
        return self.folder / "home"

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Begin a command; its standard error goes with its output."""
        variables = {
            "HOME": "/tmp/home",
            "PATH": f"/tmp/bin:{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "PYTHONPATH": PYTHONPATH,
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            **environment,
        }
        enter = [*_NSENTER, "--target", self._first, "--pid", "--mount", "--net", "sh", "-c", 'cd; exec "$@"', "sh"]
        return subprocess.Popen(
            [*enter, *command],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def run(self, *command: str, timeout_s: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command to its end."""
        process = self.start(*command, **environment)
        try:
            out, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            process.kill()  # what it runs inside goes on, with its output, until the machine ends
            said = error.output.decode() if isinstance(error.output, bytes) else error.output
            raise AssertionError(f"{command} took longer than {timeout_s} s:\n{said}") from None
        return subprocess.CompletedProcess(command, process.returncode, out)

    def log(self, name: str, num_lines: int = 40) -> str:
        """The end of a log of Ray's, for those who look into a failure."""
        found = self.folder.glob(f"ray/session_2*/logs/{name}")
        return "\n".join(line for path in found for line in path.read_text().splitlines()[-num_lines:])

    def close(self) -> None:
        """End it, and all that runs in it."""
        self._process.kill()
        self._process.communicate()


class Sandbox:
    """A network with machines in it."""

    def __init__(self, *addresses: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="st-", dir="/tmp"))
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        # By its path, env sets what it imports from: neither an activated environment nor the caller's shell does.
        here = ["env", f"PYTHONPATH={PYTHONPATH}", sys.executable, __file__]
        self._network = subprocess.Popen(
            [*_UNSHARE, "--net", "--fork", "--kill-child", *here, "network", *addresses],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._network.stdout is not None
        assert self._network.stdout.readline() == "ready\n"
        pid = Path(f"/proc/{self._network.pid}/task/{self._network.pid}/children").read_text().split()[0]
        self.machines: list[Machine] = []
        for address in addresses:
            folder = self.folder / address
            inside = ["unshare", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
            # bash, the first process, reaps what others leave behind.
            first = ["bash", "-c", '"$@"; exit', "bash", *here, "machine", str(self.folder), address]
            process = subprocess.Popen(
                [*_NSENTER, "--target", pid, "--net", *inside, *first],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self.machines.append(Machine(address, folder, process))

    @property
    def key(self) -> str:
        """The private key that opens all of them; machines see the file where it is outside."""
        return "/tmp/key"

    def close(self) -> None:
        """End all; nothing is left."""
        for machine in self.machines:
            machine.close()
        self._network.kill()
        self._network.communicate()
        deadline = time.monotonic() + 10
        while self.folder.exists() and time.monotonic() < deadline:
            shutil.rmtree(self.folder, ignore_errors=True)


# --- inside -----------------------------------------------------------------------------------------------------------


def _network(addresses: list[str]) -> None:
    """Give the loopback device its addresses; not of 127/8, which Ray takes for "this machine only"."""
    up, flags, address = 0x1, 0x8914, 0x8916
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, flags, struct.pack("16sH14x", b"lo", up | 0x8 | 0x40))
        for number, one in enumerate(addresses):
            name = f"lo:{number}".encode()
            fcntl.ioctl(control, address, struct.pack("16sHH4s8x", name, socket.AF_INET, 0, socket.inet_aton(one)))
    print("ready", flush=True)  # noqa: T201
    sys.stdin.read()  # until the tests end, however that is


def _machine(sandbox: Path, address: str) -> None:
    folder = sandbox / address
    (folder / "home" / ".ray").mkdir(parents=True, mode=0o700)
    (folder / "bin").mkdir()
    if shutil.which("rsync") is None:
        script = (ROOT / "tests/cluster/rsync_over_ssh.py").read_text()
        (folder / "bin/rsync").write_text(f"#!{sys.executable}\n{script}")
        (folder / "bin/rsync").chmod(0o755)
    # ssh asks this file, and not HOME, where a user's home is.
    users = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
    (folder / "passwd").write_text("\n".join(["root:x:0:0:root:/tmp/home:/bin/bash", *users, ""]))
    # Ray asks for the address of its machine's name where no network leads outside.
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
    shutil.copy(sandbox / "user", folder / "key")
    names = {"PATH": f"/tmp/bin:{Path(sys.executable).parent}:$PATH", "PYTHONPATH": PYTHONPATH}
    exports = "".join(f"export {name}={value}\n" for name, value in (names | {"RAY_USAGE_STATS_ENABLED": "0"}).items())
    (folder / "home/.bashrc").write_text(exports)
    keys = (sandbox / "host").read_text(), (sandbox / "user.pub").read_text()
    for needed in {ROOT, Path(sys.prefix), Path(sys.base_prefix)}:
        if needed.is_relative_to("/tmp"):
            (folder / needed.relative_to("/tmp")).mkdir(parents=True, exist_ok=True)
            _mount(needed, folder / needed.relative_to("/tmp"))
    _mount(folder / "passwd", Path("/etc/passwd"))
    _mount(folder / "hosts", Path("/etc/hosts"))
    _mount(folder, Path("/tmp"))
    asyncio.run(_serve(address, *keys))


def _mount(source: Path, target: Path) -> None:
    subprocess.run(["mount", "--rbind", source, target], check=True)


async def _serve(address: str, host_key: str, user_key: str) -> None:
    """An ssh server that runs what it is asked to."""
    import asyncssh

    async def handle(process: asyncssh.SSHServerProcess[bytes]) -> None:
        terminal = process.get_terminal_type() is not None
        child = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            process.command or "true",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if terminal else subprocess.PIPE,
            env={"HOME": "/tmp/home", "PATH": os.environ["PATH"], "USER": "root"},
            cwd="/tmp/home",
            start_new_session=True,
        )
        feeding = asyncio.create_task(_feed(process.stdin, child.stdin))
        outputs = [(child.stdout, process.stdout), *([] if terminal else [(child.stderr, process.stderr)])]
        pumps = [asyncio.create_task(_pump(source, sink)) for source, sink in outputs]
        code = await child.wait()
        # What it started in the background may hold its output open.
        await asyncio.wait(pumps, timeout=2)
        feeding.cancel()
        process.exit(code)

    async def _feed(source, sink) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
            sink.close()

    async def _pump(source, sink) -> None:
        while data := await source.read(65536):
            sink.write(data)

    await asyncssh.listen(
        address,
        22,
        server_host_keys=[asyncssh.import_private_key(host_key)],
        authorized_client_keys=asyncssh.import_authorized_keys(user_key),
        process_factory=handle,
        encoding=None,
        line_editor=False,
    )
    print("ready", flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.read)  # until the tests end, however that is


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "network":
        _network(arguments)
    else:
        _machine(Path(arguments[0]), arguments[1])
