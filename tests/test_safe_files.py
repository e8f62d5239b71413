"""Files of a folder that somebody else made: nothing is reached through a link, and nothing but files is opened."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from starling.orchestrator.checkpoints.filesystems import LocalStorage
from starling.orchestrator.safe_files import MOST_LINE_BYTES, Folder

if TYPE_CHECKING:
    from collections.abc import Callable


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("kept")
    return folder


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    folder = tmp_path / "inside"
    folder.mkdir()
    return folder


def write(file: Any) -> None:
    with file:
        file.write(b"new")


WRITES: dict[str, Callable[[Folder, str], object]] = {
    "append": lambda folder, path: write(folder.append(path)),
    "create": lambda folder, path: write(folder.create(path)),
    "write": lambda folder, path: folder.write(path, b"new"),
    "remove": lambda folder, path: folder.remove(path),
    "remove_folder": lambda folder, path: folder.remove_folder(path),
    "remove_tree": lambda folder, path: folder.remove_tree(path),
    "put": lambda folder, path: LocalStorage(Path(str(folder))).put(path, [b"new"]),
}


@pytest.mark.parametrize("what", WRITES)
@pytest.mark.parametrize("target", ["precious", "new", "."])
@pytest.mark.parametrize("place", ["file", "folder/precious", "folder/new"])
def test_nothing_is_written_or_removed_through_a_link(inside: Path, outside: Path, what: str, target: str, place: str):
    if place == "file":
        (inside / "file").symlink_to(outside / target)
    else:
        (inside / "folder").symlink_to(outside)
    before = contents(outside)
    with contextlib.suppress(OSError):
        WRITES[what](Folder(inside), place)
    assert contents(outside) == before
    assert outside.is_dir()


@pytest.mark.parametrize("place", ["file", "folder/precious"])
def test_nothing_is_read_through_a_link(inside: Path, outside: Path, place: str):
    (inside / "file").symlink_to(outside / "precious")
    (inside / "folder").symlink_to(outside)
    folder = Folder(inside)
    for read in (folder.open, folder.size, lambda path: folder.read(path, 10), lambda path: list(folder.lines(path))):
        with pytest.raises(OSError, match="is a link"):
            read(place)
    assert folder.folders() == {}
    with pytest.raises(OSError, match="is a link"):
        Folder(inside, "folder").folders()


@pytest.mark.parametrize("path", ["../outside/precious", "a/../../outside/precious", "/etc/passwd", "..", "", "a//b"])
def test_no_path_leads_out(inside: Path, outside: Path, path: str):
    with pytest.raises(OSError, match="leads out"):
        Folder(inside).read(path, 1000)
    with pytest.raises(OSError, match="leads out"):
        Folder(inside).write(path, b"")
    assert contents(outside) == {"precious": b"kept"}


def test_what_is_no_file_is_refused_at_once(inside: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(inside)
    os.mkfifo("fifo")
    Path("dir").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name, kind in (("fifo", "a FIFO"), ("dir", "a folder"), ("socket", "a socket")):
            for act in (Folder(inside).open, Folder(inside).append, lambda path: Folder(inside).read(path, 10)):
                with pytest.raises(OSError, match=f"is {kind}, and no file"):
                    act(name)


def test_sizes_are_looked_at_before_anything_is_read(inside: Path):
    with (inside / "large").open("wb") as file:
        file.truncate(4 * 2**40)
    with pytest.raises(OSError, match=f"has {4 * 2**40} bytes"):
        Folder(inside).read("large", 1000)
    with pytest.raises(OSError, match=f"more than {MOST_LINE_BYTES}"):
        next(Folder(inside).lines("large"))


def test_what_has_another_name_elsewhere_is_copied_before_it_is_appended_to(inside: Path, outside: Path):
    os.link(outside / "precious", inside / "file")
    write(Folder(inside).append("file"))
    assert (inside / "file").read_bytes() == b"keptnew"
    assert (outside / "precious").read_bytes() == b"kept"


def test_lines_come_with_their_ends(inside: Path):
    (inside / "lines").write_bytes(b"a\n\n" + b"b" * 3_000_000 + b"\nend")
    assert [len(line) for line in Folder(inside).lines("lines")] == [2, 1, 3_000_001, 3]
