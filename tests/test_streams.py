"""What is shown ends nothing: standard streams that are full, broken off, closed, or have few characters."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from starling.orchestrator.api import simulate
from starling.orchestrator.cli.run_display import PlainDisplay
from starling.orchestrator.cli.terminal import warnings_shown_by
from starling.orchestrator.signals import interruptible
from tests.observed import configuration
from tests.paths import PYTHONPATH

SHOW = "import sys; from starling.orchestrator import streams; streams.secure(); {}; sys.exit(7)"


def shell(body: str, redirection: str = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run a body of Python whose standard streams are secure, and which ends with 7."""
    command = f'"$0" -c "$1" {redirection}'
    return subprocess.run(
        ["sh", "-c", command, sys.executable, SHOW.format(body)],
        check=False,
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": PYTHONPATH} | env,
    )


LINES = "[print('x' * 99) for _ in range(9000)]"


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full 2>&1"])
def test_a_stream_that_takes_nothing_ends_nothing(redirection):
    both = f"{LINES}; print('e' * 99999, file=sys.stderr); print('end', flush=True)"
    ended = shell(both, redirection)
    assert ended.returncode == 7, ended.stderr
    assert b"Traceback" not in ended.stderr


def test_a_full_device_is_told_of_once_and_a_reader_that_goes_is_not():
    full = shell(LINES, ">/dev/full").stderr.decode()
    assert full.splitlines() == [
        "warning: standard output cannot be written (No space left on device); what would be shown there is lost"
    ]
    head = shell(f"{LINES}; sys.stdout.flush(); print('on', file=sys.stderr)", "| head -1 >/dev/null")
    assert head.stderr == b"on\n"


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "2 x 3 ... ? ->"), ("latin-1", "2 × 3 ... é ->")])
def test_characters_that_a_stream_lacks_become_plainer(encoding, shown):
    ended = shell("print('2 \\u00d7 3 \\u2026 \\u00e9 \\u2192', '\\udcff')", PYTHONIOENCODING=encoding)
    assert ended.stdout.decode(encoding) == f"{shown} ?\n"
    assert ended.returncode == 7


def test_undecodable_file_names_can_be_shown():
    assert shell("import os; print(os.fsdecode(bytes([255])))").stdout == b"?\n"


def test_files_do_not_get_the_numbers_of_closed_streams():
    ended = shell("f = open('/dev/null'); print(f.fileno() > 2, file=sys.stderr)", ">&- <&-")
    assert ended.stderr == b"True\n"


def test_a_view_that_fails_is_left_and_the_run_goes_on(tmp_path: Path, capsys):
    class Broken(Console):
        def print(self, *_: object, **__: object) -> None:
            raise RuntimeError("no such terminal")

    view = PlainDisplay(Broken())
    with warnings_shown_by(view):
        ended = simulate(configuration(rounds=1), run_dir=tmp_path / "run", observers=[view])
        logging.getLogger("starling").warning("said elsewhere")
    assert ended.status == "finished"
    assert view.summary == ended
    assert capsys.readouterr().err.splitlines() == [
        "warning: nothing more is shown (RuntimeError: no such terminal); all else goes on",
        "warning: said elsewhere",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_run_does_so_but_where_it_is_ignored(number):
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), number)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with interruptible():  # nohup; the background job of a script
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
