"""``starling data``: the table is the division that a run would train on, and the picture is drawn."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from starling.actors.data.indices import concrete
from starling.actors.host.build import load_data
from starling.actors.tasks import TensorSamples
from starling.actors.tasks.digits import Digits
from starling.orchestrator.analysis.data import draw, measure, print_report
from starling.orchestrator.cli.main import app
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError

SKEWED: dict[str, Any] = {
    "name": "skewed",
    "algorithm": "fedavg",
    "task": "digits",
    "data": {"partition": {"name": "dirichlet", "alpha": 0.5, "min_samples": 5}},
    "cluster": {"nodes": {"target": 4}},
    "tracking": "none",
}


class ManyClasses(Digits):
    """Thirty classes, the first of thirty samples, the last of one."""

    def train_samples(self, num_nodes: int) -> TensorSamples:
        labels = torch.arange(30).repeat_interleave(torch.arange(30, 0, -1))
        return TensorSamples(torch.zeros(len(labels), 64), labels, labels=labels)


def printed(raw: dict[str, Any]) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    print_report(console, measure(parse(raw)), None)
    return console.export_text()


def test_the_table_is_what_a_run_trains_on():
    config = parse(SKEWED)
    report = measure(config)
    data = load_data(config.task, config.data, 4, 0)
    labels: torch.Tensor = data.train.labels  # type: ignore[attr-defined] - of digits
    assert report.labels == [str(number) for number in range(10)]
    assert report.counts == [labels[concrete(part)].bincount(minlength=10).tolist() for part in data.parts]
    assert (sum(report.sizes), report.validation) == (1437, 360)
    assert report.skew is not None
    overall = labels.bincount().double() / 1437
    distances = [(torch.tensor(row).double() / sum(row) - overall).abs().sum().item() / 2 for row in report.counts]
    assert report.skew == pytest.approx(sum(distances) / 4)


def test_it_is_printed():
    text = printed(SKEWED)
    assert "skewed: digits, pooled, dirichlet (min_samples: 5, alpha: 0.5), over 4 nodes" in text
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith("node"))
    assert header.split() == ["node", *map(str, range(10)), "samples"]
    rows = [line.split() for line in lines if line.split() and line.split()[0] in "0123"]
    assert len(rows) == 4
    assert sum(int(row[-1].replace(",", "")) for row in rows) == 1437
    assert "held out   360" in text


def test_many_labels_are_counted_together():
    raw = SKEWED | {"task": {"name": "tests.cli.test_data:ManyClasses"}, "data": {"partition": "iid"}}
    report = measure(parse(raw))
    assert report.labels == [*(str(number) for number in range(11)), "19 others"]
    assert sum(report.sizes) == sum(range(1, 31)) == 465
    assert [sum(column) for column in zip(*report.counts, strict=True)][:2] == [30, 29]


def test_samples_without_labels_are_counted():
    raw = SKEWED | {"task": {"name": "quadratic", "samples_per_node": 6}, "data": {}}
    report = measure(parse(raw))
    assert (report.counts, report.skew, report.partition) == ([[6]] * 4, None, "by owner")
    assert "6 to 6 samples" in printed(raw)


@pytest.mark.parametrize("nodes", [1, 4, 40])
def test_it_is_drawn(tmp_path: Path, nodes: int):
    raw = SKEWED | {"data": {"partition": {"name": "shards"}}, "cluster": {"nodes": {"target": nodes}}}
    report = measure(parse(raw))
    draw(report, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        colors = image.convert("RGB").getcolors(maxcolors=1 << 20)
        assert colors is not None
        assert len(colors) > 20
    draw(report, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")


def test_a_picture_that_cannot_be_written(tmp_path: Path):
    report = measure(parse(SKEWED))
    with pytest.raises(ConfigError, match="--plot .*p.jpeg: must end in .png, .svg, .pdf"):
        draw(report, tmp_path / "p.jpeg")
    with pytest.raises(ConfigError, match="--plot .*/no/p.png: cannot be written: No such file or directory"):
        draw(report, tmp_path / "no" / "p.png")


def test_the_command(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(SKEWED))
    result = CliRunner().invoke(app, ["data", str(file), "--plot", str(tmp_path / "p.png"), "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout.splitlines()[-1])
    assert (answer["status"], answer["partition"]) == ("ok", "dirichlet (min_samples: 5, alpha: 0.5)")
    assert sum(answer["samples"]) == 1437
    assert (tmp_path / "p.png").exists()
    file.write_text(json.dumps(SKEWED | {"cluster": {"nodes": {"target": 40}}}))
    result = CliRunner().invoke(app, ["data", str(file), "--set", "data.partition={name: dirichlet, alpha: 0.01}"])
    assert result.exit_code == 2
    assert "leaves node" in result.output
    assert "raise data.partition.alpha" in result.output
