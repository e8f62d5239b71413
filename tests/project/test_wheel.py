"""What is installed: one import package, and nothing that a project's own folders could hide or be hidden by."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FOLDERS = ("algorithms", "actors", "orchestrator", "tune_spaces")
PROGRAM = """
import algorithms, actors, orchestrator, tune_spaces
assert {algorithms.OWN, actors.OWN, orchestrator.OWN, tune_spaces.OWN} == {"ours"}
import starling
from starling import simulate
config = {"rounds": 2, "algorithm": "diloco", "task": "digits", "tracking": "none"}
print(starling.__file__, simulate(config).rounds)
"""


def built(folder: Path, *what: str) -> list[Path]:
    """Build with hatchling, as pip would, without a fetch of anything."""
    program = f"import hatchling.build as b; [getattr(b, 'build_' + one)({str(folder)!r}) for one in {list(what)!r}]"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, timeout=100)
    return sorted(folder.iterdir())


def test_a_project_with_folders_of_our_names_runs_beside_the_wheel(tmp_path: Path):
    [wheel] = built(tmp_path / "dist", "wheel")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert {name.split("/")[0] for name in names} == {"starling", "starling-0.1.0.dist-info"}
    assert {name.split("/")[1] for name in names if name.startswith("starling/")} == {
        *FOLDERS, "__init__.py", "__main__.py", "py.typed",
    }  # fmt: skip
    assert not any("tests" in name for name in names)
    # An environment that has what Starling depends on, not the checkout: a path in a .pth file brings no other .pth.
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    project = tmp_path / "project"
    for folder in FOLDERS:
        (project / folder).mkdir(parents=True)
        (project / folder / "__init__.py").write_text('OWN = "ours"\n')
    (project / "train.py").write_text(PROGRAM)
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "train.py"], cwd=project, env=elsewhere, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    file, rounds = done.stdout.split()[-2:]
    assert Path(file).is_relative_to(site)
    assert rounds == "2"


def test_the_sdist_has_files_where_the_checkout_has_links(tmp_path: Path):
    [archive] = built(tmp_path / "dist", "sdist")
    with tarfile.open(archive) as file:
        members = {member.name.partition("/")[2]: member for member in file.getmembers()}
    assert members["src/starling/algorithms/api.py"].isfile()
    assert not any(member.issym() for member in members.values())


def test_an_editable_install_offers_one_name():
    entries = list(Path(sysconfig.get_path("purelib")).glob("*starling*.pth"))
    if not entries:
        pytest.skip("Starling is not installed in editable form here")
    [folder] = {line for path in entries for line in path.read_text().splitlines() if line}
    assert [path.name for path in Path(folder).iterdir() if path.suffix != ".egg-info"] == ["starling"]
