"""What Ray asks of rsync, where rsync is not installed: files and folders are copied to another machine over ssh."""

import shlex
import subprocess
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """``--rsh COMMAND -avz SOURCE HOST:TARGET``."""
    rsh = shlex.split(arguments[arguments.index("--rsh") + 1])
    source, (host, _, target) = arguments[-2], arguments[-1].partition(":")
    # The shell on the other side knows what ~ is.
    quoted = f"~/{shlex.quote(target[2:])}" if target.startswith("~/") else shlex.quote(target)
    if source.endswith("/"):
        command = f"mkdir -p {quoted} && tar -C {quoted} -xz"
        with subprocess.Popen(["tar", "-C", source, "-cz", "."], stdout=subprocess.PIPE) as packer:
            return subprocess.run([*rsh, host, command], stdin=packer.stdout, check=False).returncode
    mode = f"{Path(source).stat().st_mode & 0o777:o}"
    with Path(source).open("rb") as file:
        command = f"umask 077; cat > {quoted} && chmod {mode} {quoted}"
        return subprocess.run([*rsh, host, command], stdin=file, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
