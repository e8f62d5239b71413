"""``starling topologies``: what it prints, draws and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner, Result

from starling.orchestrator.cli.main import app


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    """The current folder. The command line adds it to the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def topologies(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["topologies", *arguments], prog_name="starling")


def shown(*arguments: str) -> tuple[str, dict[str, str]]:
    """The title, and the values by label."""
    result = topologies(*arguments)
    assert result.exit_code == 0, result.output
    title, _, *lines = result.stdout.splitlines()
    return title, {line[2:16].strip(): line[17:] for line in lines if line.startswith("  ")}


def answer(*arguments: str) -> dict:
    result = topologies(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: str) -> str:
    result = topologies(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("error: ")


def test_all_of_them():
    lines = topologies().stdout.splitlines()
    assert "ring                  Ring: each exchanges with the two beside it." in [line.rstrip() for line in lines]
    assert lines[-1] == "starling topologies NAME shows one in full, and with --nodes N what it comes to."
    assert list(answer()["topologies"]) == [
        *("alternating", "barabasi_albert", "complete", "erdos_renyi", "exponential", "file", "one_peer_exponential"),
        *("random_matching", "random_regular", "ring", "torus"),
    ]


def test_one_in_full():
    text = topologies("torus").stdout
    assert "ρ = max_{(k,l)≠0} |1 + 2 cos(2πk/a) + 2 cos(2πl/b)| / 5" in text
    assert "Elasticity" in text
    assert [field["name"] for field in answer("torus")["fields"]] == ["rows", "cols"]


def test_a_static_one_measured():
    title, values = shown("torus", "--nodes", "16")
    assert title == "torus of 16 nodes:"
    assert values == {
        "degree": "4",
        "directed edges": "64",
        "weights": "doubly stochastic, symmetric",
        "rho": "0.6",
        "spectral gap": "0.4",
        "diameter": "4",
        "bytes": "256 MB per round over all nodes, 4.00 MB per message",
    }
    assert topologies("torus", "--nodes", "16").stdout.splitlines()[-1] == "--plot topology-torus-16.png draws it."


def test_a_time_varying_one_measured():
    title, values = shown("one_peer_exponential", "--nodes", "8", "--parameters", "250")
    assert title == "one_peer_exponential of 8 nodes, round 0:"
    assert values["product"] == "rho 0 over 3 rounds"
    assert values["graphs"] == "repeat every 3 rounds"
    assert values["weights"] == "doubly stochastic, not symmetric"
    assert values["diameter"] == "7"
    assert values["bytes"] == "8.00 kB per round over all nodes (mean of 3 rounds), 1.00 kB per message"


def test_a_redrawn_one_measured():
    title, values = shown("erdos_renyi", "--nodes", "9", "--set", "redraw_every=2", "--rounds", "4")
    assert title == "erdos_renyi (redraw_every: 2, probability: 0.3) of 9 nodes, round 0:"
    assert values["graphs"] == "never repeat"
    assert values["product"].endswith("over 4 rounds")
    assert answer("erdos_renyi", "--nodes", "9", "--seed", "1") != answer("erdos_renyi", "--nodes", "9", "--seed", "2")


def test_measured_for_scripts():
    measured = answer("ring", "--nodes", "4", "--parameters", "10", "--rounds", "2")
    assert measured.pop("rho") == pytest.approx(1 / 3)
    assert measured.pop("spectral_gap") == pytest.approx(2 / 3)
    assert measured["product"].pop("rho") == pytest.approx(1 / 9)
    two = {"min": 2, "mean": 2.0, "max": 2}
    assert measured == {
        "status": "ok",
        "topology": {"name": "ring"},
        "nodes": 4,
        "seed": 0,
        "period": 1,
        "in_degree": two,
        "out_degree": two,
        "directed_edges": 8,
        "doubly_stochastic": True,
        "symmetric": True,
        "diameter": 2,
        "bytes": {"per_message": 40, "per_round": 320},
        "product": {"rounds": 2},
        "error": None,
    }


def test_a_file_measured(folder: Path):
    (folder / "graph.txt").write_text("0 1\n1 2\n2 0\n0 2\n")
    options = ("--nodes", "3", "--set", "path=graph.txt", "--set", "directed=true")
    assert "set allow_row_stochastic: true" in refused("file", *options)
    title, values = shown("file", *options, "--set", "allow_row_stochastic=true")
    assert title == "file (path: graph.txt, directed: true, allow_row_stochastic: true) of 3 nodes:"
    assert values["weights"] == "row-stochastic: the mean is not preserved, not symmetric"
    assert values["degree"] == "1 to 2, 1.333 on average"
    (folder / "star.txt").write_text("0 1\n0 2\n1 0\n2 1\n2 0\n1 3\n3 0\n")
    _, values = shown(
        "file", "--nodes", "4", "--set", "path=star.txt", *options[4:], "--set", "allow_row_stochastic=true"
    )
    assert values["degree"] == "in 1 to 3, 1.75 on average; out 1 to 2, 1.75 on average"


def test_several_in_turn():
    title, values = shown("alternating", "--nodes", "8", "--set", "topologies=[ring,one_peer_exponential]")
    assert title == "alternating (topologies: [ring, one_peer_exponential]) of 8 nodes, round 0:"
    assert values["graphs"] == "repeat every 6 rounds"


def test_one_of_the_users_own_that_falls_into_pieces(folder: Path):
    (folder / "own_pairs.py").write_text(
        "from starling.algorithms.topologies import UndirectedTopology\n\n\n"
        "class Pairs(UndirectedTopology):\n"
        "    def edges(self, num_nodes, draw):\n"
        "        return [(i, i + 1) for i in range(0, num_nodes - 1, 2)]\n"
    )
    title, values = shown("own_pairs:Pairs", "--nodes", "5", "--plot", "pairs.png")
    assert title == "own_pairs:Pairs of 5 nodes:"
    assert (values["degree"], values["rho"], values["diameter"]) == ("0 to 1, 0.8 on average", "1", "not connected")
    assert answer("own_pairs:Pairs", "--nodes", "5")["diameter"] is None
    assert "--plot topology-own-5.png draws it." in topologies("own_pairs:Pairs", "--nodes", "5").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("ring", "--nodes", "1"),
        ("ring", "--nodes", "2"),
        ("complete", "--nodes", "5"),
        ("torus", "--nodes", "12"),
        ("exponential", "--nodes", "9"),
        ("exponential", "--nodes", "100"),
        ("one_peer_exponential", "--nodes", "8"),
        ("barabasi_albert", "--nodes", "70"),
        ("random_regular", "--nodes", "10", "--set", "redraw_every=1", "--rounds", "2"),
    ],
)
def test_drawings(arguments, folder: Path):
    result = topologies(*arguments, "--plot", "graph.png")
    assert result.exit_code == 0, result.output
    assert "--plot" not in result.stdout
    picture = imread(folder / "graph.png")
    blue = (np.abs(picture[..., :3] - np.array([0, 0x72, 0xB2]) / 255) < 0.02).all(axis=-1)
    assert blue.sum() > 100
    again = topologies(*arguments, "--plot", "again.png")
    assert again.exit_code == 0
    assert (folder / "again.png").read_bytes() == (folder / "graph.png").read_bytes()


@pytest.mark.parametrize("form", ["svg", "pdf"])
def test_other_formats(form, folder: Path):
    assert topologies("ring", "--nodes", "5", "--plot", f"graph.{form}").exit_code == 0
    assert (folder / f"graph.{form}").read_bytes()[:5] == {"svg": b"<?xml", "pdf": b"%PDF-"}[form]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rin", "--nodes", "3"], "no topology is called 'rin' (did you mean ring?)"),
        (["rin"], "no topology is called 'rin' (did you mean ring?)"),
        (
            ["torus", "--nodes", "7"],
            "topology torus: 7 nodes are no grid, for 7 is prime; take 6 or 8 nodes, or topology ring",
        ),
        (["ring", "--nodes", "4", "--set", "degree=3"], "--set degree=3: degree is not a field of ring"),
        (
            ["erdos_renyi", "--nodes", "4", "--set", "probability=2"],
            "--set probability=2: probability should be less than or equal to 1, got 2",
        ),
        (["file", "--nodes", "4"], "topology file: path is missing"),
        (
            ["file", "--nodes", "4", "--set", "path=nope"],
            "topology file: nope: cannot be read: No such file or directory",
        ),
        (["ring", "--plot", "x.png"], "--plot needs --nodes N"),
        (["--nodes", "4"], "--nodes needs a NAME and --nodes N, as in starling topologies ring --nodes 8"),
        (["ring", "--nodes", "4", "--plot", "x.gif"], "--plot x.gif: must end in .png, .svg, .pdf"),
        (
            ["ring", "--nodes", "4", "--plot", "no/x.png"],
            "--plot no/x.png: cannot be written: No such file or directory",
        ),
        (
            ["alternating", "--nodes", "4", "--set", "topologies=[]"],
            "--set topologies=[]: topologies must name one topology at least",
        ),
    ],
)
def test_refused(arguments, line):
    assert refused(*arguments) == line


@pytest.mark.parametrize(
    "arguments", [["ring", "--nodes", "0"], ["ring", "--nodes", "many"], ["ring", "--parameters", "0"]]
)
def test_wrong_usage(arguments):
    assert topologies(*arguments).exit_code == 2


def test_bad_input_for_scripts():
    result = topologies("torus", "--nodes", "7", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["status"] == "failed"
    assert "7 is prime" in json.loads(result.stdout)["error"]
