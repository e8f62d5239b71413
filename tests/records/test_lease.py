"""One controller decides: the lease in the run directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from starling import simulate
from starling.orchestrator.errors import LeaseError, LeaseLostError, exit_code
from starling.orchestrator.records import lease
from starling.orchestrator.records.lease import Lease
from starling.orchestrator.records.observers import Observer
from tests.paths import ROOT
from tests.toys import Toy


def rewrite(path: Path, **facts: object) -> None:
    """As another controller would, which thinks that the holder is dead."""
    known = json.loads((path / "lease.json").read_text())
    (path / "other").write_text(json.dumps(known | facts))
    (path / "other").replace(path / "lease.json")


def test_a_second_controller_is_kept_out_and_named(tmp_path: Path):
    held = Lease(tmp_path)
    with pytest.raises(
        LeaseError, match=rf"the controller with pid {os.getpid()} on .* drives this run; wait"
    ) as error:
        Lease(tmp_path)
    assert exit_code(error.value) == 2
    held.check()
    held.release()
    held.release()
    assert list(tmp_path.iterdir()) == []
    Lease(tmp_path).release()


def test_a_dead_holders_lease_is_taken_over_with_a_higher_token(tmp_path: Path):
    imports = "from pathlib import Path; from starling.orchestrator.records.lease import Lease"
    code = f"{imports}; Lease(Path({str(tmp_path)!r})); print('held')"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code}; import time; time.sleep(60)"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LeaseError, match=f"pid {holder.pid}"):
        Lease(tmp_path)
    threading.Timer(0.3, holder.send_signal, [signal.SIGKILL]).start()
    mine = Lease(tmp_path, wait_s=60)
    holder.wait()
    holder.stdout.close()
    assert mine.token == 2
    mine.check()
    mine.release()


def test_a_number_that_is_another_processs_by_now_is_no_holder(tmp_path: Path):
    held = Lease(tmp_path)
    rewrite(tmp_path, started=1.0)
    Lease(tmp_path).release()
    held.release()


@pytest.mark.parametrize(("age_s", "is_held"), [(0, True), (25, True), (31, False)])
def test_a_holder_on_another_machine_is_judged_by_its_last_renewal(tmp_path: Path, age_s: float, is_held: bool):
    Lease(tmp_path).release()
    facts = {"owner": "x", "token": 7, "host": "elsewhere", "pid": 1, "started": 1.0, "renewed": time.time() - age_s}
    (tmp_path / "lease.json").write_text(json.dumps(facts))
    if is_held:
        with pytest.raises(LeaseError, match="pid 1 on elsewhere"):
            Lease(tmp_path)
    else:
        mine = Lease(tmp_path)
        assert mine.token == 8
        mine.release()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "it is empty"),
        ("[1]", "must be an object|valid dictionary"),
        ('{"token": 1}', "host is missing"),
        ('{"token": "1", "host": "a", "pid": 1, "started": 1.0, "renewed": 1.0}', "token should be a valid integer"),
        ('{"token": 1, "host": "a", "pid": -1, "started": 1.0, "renewed": 1.0}', "pid should be greater than 0"),
        ('{"token": 1, "token": 2}', "the key 'token' is there twice"),
    ],
)
def test_a_file_that_is_no_lease_is_refused_until_it_is_old(tmp_path: Path, text: str, what: str):
    path = tmp_path / "lease.json"
    path.write_text(text)
    with pytest.raises(LeaseError, match=rf"lease.json: .*({what}).* try again in 30 s") as error:
        Lease(tmp_path)
    assert "\n" not in str(error.value)
    os.utime(path, (time.time() - 60,) * 2)
    mine = Lease(tmp_path)
    assert mine.token == 1
    mine.release()


def test_a_lease_from_far_ahead_is_nobodys(tmp_path: Path):
    facts = {"token": 4, "host": "elsewhere", "pid": 1, "started": 1.0, "renewed": time.time() + 1e7}
    (tmp_path / "lease.json").write_text(json.dumps(facts))
    Lease(tmp_path).release()


def test_a_link_in_the_place_of_a_lease_is_replaced_and_not_followed(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lease.json").symlink_to(outside)
    os.utime(tmp_path / "run/lease.json", (time.time() - 60,) * 2, follow_symlinks=False)
    mine = Lease(tmp_path / "run")
    mine.check()
    mine.release()
    assert outside.read_text() == "kept"
    assert list((tmp_path / "run").iterdir()) == []


def test_it_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(lease, "_RENEW_S", 0.01)
    held = Lease(tmp_path)
    first = json.loads((tmp_path / "lease.json").read_text())["renewed"]
    for _ in range(6000):
        if json.loads((tmp_path / "lease.json").read_text())["renewed"] > first:
            break
        time.sleep(0.01)
    else:
        pytest.fail("it was not renewed")
    held.check()
    held.release()


def test_who_has_lost_it_does_not_take_it_back(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(lease, "_RENEW_S", 0.01)
    held = Lease(tmp_path)
    with held._lock:  # else it might be in the middle of a renewal, and write after us
        rewrite(tmp_path, owner="another")
    held._thread.join(60)  # at its next renewal it sees that, and ends
    assert not held._thread.is_alive()
    with pytest.raises(LeaseLostError, match="has taken this run over"):
        held.check()
    held.release()
    assert json.loads((tmp_path / "lease.json").read_text())["owner"] == "another"


def test_a_controller_that_was_taken_for_dead_commits_nothing_more(tmp_path: Path):
    class TakesOver(Observer):
        def on_event(self, event):
            if event["event"] == "commit" and event["round"] == 1:
                rewrite(tmp_path / "run", owner="another")

    config = {"algorithm": "fedavg", "task": Toy().name, "rounds": 5, "tracking": "none"}
    with pytest.raises(LeaseLostError, match="this one commits nothing more"):
        simulate(config, run_dir=tmp_path / "run", observers=[TakesOver()])
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [one["round"] for one in events if one["event"] == "commit"] == [0, 1]
    assert json.loads((tmp_path / "run/lease.json").read_text())["owner"] == "another"


def test_a_run_holds_it_and_leaves_none(tmp_path: Path):
    seen: list[bool] = []

    class Looks(Observer):
        def on_round(self, record):
            seen.append((tmp_path / "run/lease.json").exists())

    config = {"algorithm": "fedavg", "task": Toy().name, "rounds": 2, "tracking": "none"}
    simulate(config, run_dir=tmp_path / "run", observers=[Looks()])
    assert seen == [True, True]
    assert not (tmp_path / "run/lease.json").exists()
