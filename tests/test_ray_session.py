"""What a session leaves behind, as far as that shows without a Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from orchestrator.ray_session import _owner, _remove_abandoned


def test_folders_of_processes_that_were_killed_are_removed_and_no_others(tmp_path: Path):
    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    facts = {"starling-gone": _owner(gone.pid), "starling-mine": _owner(os.getpid())}
    gone.communicate(b"\n")
    machine, pid, started = facts["starling-gone"].split()
    facts["starling-of-a-container"] = f"{machine}1 {pid} {started}"
    facts["starling-of-another"] = f"x{machine} {pid} {started}"
    facts["starling-again"] = f"{machine} {os.getpid()} 1.0"  # its number is somebody else's by now
    facts["starling-torn"] = machine
    for name, text in facts.items():
        (tmp_path / name / "r").mkdir(parents=True)
        (tmp_path / name / "owner").write_text(text)
    (tmp_path / "starling-of-a-user").mkdir()
    _remove_abandoned(tmp_path)
    left = {one.name.removeprefix("starling-") for one in tmp_path.iterdir()}
    assert left == {"mine", "of-a-container", "of-another", "torn", "of-a-user"}
