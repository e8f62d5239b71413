"""Paths that nobody can use: one line, before anything is done, and nothing is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from starling.orchestrator.config.schema import load, parse
from starling.orchestrator.errors import ConfigError, RunDirectoryError
from starling.orchestrator.given_path import given, shown_path
from starling.orchestrator.records import run_directory
from starling.orchestrator.records.run_config import directory
from starling.orchestrator.records.run_directory import RunDirectory
from tests.observed import configuration

ODD = {
    "x" * 300: "File name too long",
    "y/" * 3000: "File name too long",
    "file/below": "Not a directory",
    "loop": "it is a link that leads to itself",
    "~nobody-of-this-name/run": "there is no such user",
    "a\0b": "NUL",
    "": "an empty name",
    os.fsdecode(b"\xff"): "not UTF-8",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize(("path", "reason"), ODD.items(), ids=range(len(ODD)))
def test_odd_paths_are_refused_wherever_they_are_given(path, reason):
    for use, kind in (
        (lambda: RunDirectory(configuration(), path), RunDirectoryError),
        (lambda: directory(path), ConfigError),
        (lambda: load(path), ConfigError),
        (lambda: parse(configuration().dump() | {"checkpoint": {"uri": path}}), ConfigError),
    ):
        with pytest.raises(kind) as caught:
            use()
        line = str(caught.value)
        assert reason in line
        assert line.isprintable()
        assert len(line) < 500


def test_paths_are_made_absolute_and_need_not_be_there(folder: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "link").symlink_to("file")
    assert given("~/new/run", "x") == folder / "new" / "run"
    assert given("link", "x") == folder / "file"
    assert shown_path("a\nb") == "a?b"
    assert len(shown_path("x" * 5000)) == 161


def test_a_disk_that_is_full_at_the_start_leaves_nothing(folder: Path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = Path.open

    def full(path: Path, mode: str = "r", **options):
        opened(path, mode, **options).close()
        return Full()

    monkeypatch.setattr(run_directory.Path, "open", full)
    with pytest.raises(RunDirectoryError, match="cannot be made: No space left on device"):
        RunDirectory(configuration(), folder / "new")
    assert not (folder / "new").exists()
    (folder / "mine").mkdir()
    with pytest.raises(RunDirectoryError, match="cannot be made"):
        RunDirectory(configuration(), folder / "mine")
    assert list((folder / "mine").iterdir()) == []


def test_a_tracker_has_an_address_that_can_be_written_down():
    with pytest.raises(ConfigError, match="tracking.uri: .*characters that no address has"):
        parse(configuration().dump() | {"tracking": {"name": "mlflow", "uri": "sqlite:///a\0b"}})
