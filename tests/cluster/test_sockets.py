"""A Ray of our own: who can reach it, and with what."""

from __future__ import annotations

import os
import stat
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from starling.orchestrator.runtimes.cluster import session

pytestmark = pytest.mark.cluster


def test_it_listens_on_loopback_alone(shared_ray: str):
    assert shared_ray.startswith("127.0.0.1:")
    listening = []
    for process in psutil.Process().children(recursive=True):
        try:
            found = process.net_connections(kind="inet")
        except psutil.Error:
            continue
        listening += [(process.name(), one.laddr.ip) for one in found if one.status == psutil.CONN_LISTEN]
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}
    # Of sockets for both kinds of addresses, these are mapped.
    assert [one for one in listening if not ip_address(one[1].removeprefix("::ffff:")).is_loopback] == []


def test_its_token_is_in_a_file_that_nobody_else_may_read(shared_ray: str):
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert len(token.read_text()) == 64


def test_a_token_that_was_there_is_back_afterwards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    monkeypatch.delenv("STARLING_NONE", raising=False)
    before = session._set({"RAY_AUTH_TOKEN": None, "STARLING_NONE": "1"})
    assert "RAY_AUTH_TOKEN" not in os.environ
    session._restore(before)
    assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    assert "STARLING_NONE" not in os.environ
