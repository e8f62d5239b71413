"""The command line: what each command prints, one line for each bad input, exit codes, and JSON on stdout alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from starling.orchestrator.cli.main import app
from tests.paths import PYTHONPATH, ROOT

RUN = """
name: small
rounds: 3
algorithm: fedavg
task: digits
optimizer: {lr: 0.1}
cluster: {nodes: {target: 2}}
tracking: none
"""

KEYS = [
    *("status", "run_id", "run_dir", "algorithm", "rounds", "metrics", "bytes", "nodes"),
    *("samples", "replicas", "digest", "seconds", "virtual_seconds", "lost", "baselines", "checkpoints"),
    *("average_digest", "error"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    """The current folder, with a small run in it. The command line adds folders to the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


def starling(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="starling")


def refused(*arguments: str, code: int = 2) -> str:
    """The one line on stderr that a command fails with."""
    result = starling(*arguments)
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0].removeprefix("error: ")


def task(folder: Path, name: str, body: str) -> str:
    """Write a module with a task of the user's; its import path. The name is used once: modules stay imported."""
    text = "from starling.actors.tasks.digits import Digits\n\nclass Mine(Digits):\n" + body
    (folder / f"{name}.py").write_text(text)
    return f"{name}:Mine"


# --- help -----------------------------------------------------------------------------------------------------------


def test_help_names_the_commands_and_exit_codes():
    text = starling("--help").stdout
    for word in ("run", "simulate", "check", "algorithms", "tasks", "--version", "130"):
        assert word in text
    assert "Exit codes: 0 finished, 2 bad usage" in starling("simulate", "--help").stdout


def test_version():
    assert starling("--version").stdout.startswith("starling ")


@pytest.mark.parametrize(
    "arguments", [["fly"], ["run"], ["simulate", "run.yaml", "--rounds", "3"], ["simulate", "run.yaml", "--set"]]
)
def test_wrong_usage(arguments):
    assert starling(*arguments).exit_code == 2


# --- simulate -------------------------------------------------------------------------------------------------------


@pytest.mark.pictures
def test_a_run_for_people(folder: Path):
    result = starling("simulate", "run.yaml", "--run-dir", "here")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "starting 2 nodes in the simulator …"
    assert lines[3].startswith("1 of 3 rounds done  loss ")
    assert lines[6].split() == ["status", "finished", "after", "3", "rounds"]
    assert lines[-1].split() == ["curves", str(folder / "here" / "curves.png")]
    assert result.stderr == ""


def test_a_run_for_scripts(folder: Path):
    result = starling("simulate", "run.yaml", "--json", "--set", "rounds=2")
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    answer = json.loads(line)
    assert list(answer) == KEYS
    assert answer["status"] == "finished"
    assert answer["rounds"] == 2
    assert answer["algorithm"] == "fedavg"
    assert answer["error"] is None
    assert answer["nodes"] == {"started": 2, "joined": 0, "lost": 0, "drained": 0}
    assert answer["bytes"]["payload"] == 2 * answer["bytes"]["per_round"] > 0
    assert answer["virtual_seconds"] > 0
    assert Path(answer["run_dir"]).parent == folder / "runs"
    assert json.loads((Path(answer["run_dir"]) / "summary.json").read_text()) == {key: answer[key] for key in KEYS[:-1]}
    assert "2 of 2 rounds done" in result.stderr


def test_the_same_run_twice_has_one_digest():
    first, second = (json.loads(starling("simulate", "run.yaml", "--json").stdout) for _ in range(2))
    assert first["digest"] == second["digest"]
    assert first["run_id"] != second["run_id"]


def test_a_task_beside_the_configuration(folder: Path):
    there = folder / "there"
    there.mkdir()
    path = task(
        there, "beside_the_file", "    def build(self):\n        print('in the task')\n        return super().build()\n"
    )
    (there / "run.yaml").write_text(RUN)
    result = starling("simulate", "there/run.yaml", "--set", f"task={path}", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["status"] == "finished"
    assert "in the task" in result.stderr
    config = (folder / "runs" / json.loads(result.stdout)["run_id"] / "config.yaml").read_text()
    assert "name: beside_the_file:Mine" in config


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["roundz=3"], "--set roundz=3: roundz is not a field of the configuration (did you mean rounds?)"),
        (["rounds=many"], "--set rounds=many: rounds should be a valid integer, got 'many'"),
        (["optimizer.lr=-1"], "--set optimizer.lr=-1: optimizer.lr should be greater than 0, got -1"),
        (
            ["algorithm=fedavgg"],
            "--set algorithm=fedavgg: algorithm: no algorithm is called 'fedavgg' (did you mean fedavg?)",
        ),
        (["task=digit"], "--set task=digit: task: no task is called 'digit' (did you mean digits?)"),
        (["optimizer=sgdd"], "--set optimizer=sgdd: optimizer.name: no optimizer is called 'sgdd'"),
        (["cluster.nodes.target=2000"], "data: 1437 samples cannot be divided among 2000 nodes; ask for at most 1437"),
        (
            ["task={name: text_lm, corpus: /no/such}"],
            "task.corpus: /no/such does not exist here; name a file, a folder or a pattern",
        ),
        (
            ["faults.rate_per_hour=1"],
            "--set faults.rate_per_hour=1: faults.rate_per_hour is not built yet; leave it at 0",
        ),
        (
            ["tracking={name: mlflow, uri: nowhere}"],
            "--set tracking={name: mlflow, uri: nowhere}: tracking.uri must be",
        ),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("command", ["simulate", "check"])
def test_bad_configurations(command, overrides, line, folder: Path):
    flags = [flag for override in overrides for flag in ("--set", override)]
    assert refused(command, "run.yaml", *flags).startswith(line)
    assert not any((folder / "runs").glob("*"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("algorithm: [fedavg\n", "run.yaml, line 2, column 1: is not a configuration: expected ',' or ']'"),
        ("", "run.yaml: must be a mapping of keys (algorithm, task, …); it is empty"),
    ],
)
def test_broken_files(text, line, folder: Path):
    (folder / "run.yaml").write_text(text)
    assert refused("simulate", "run.yaml").startswith(line)


def test_a_missing_file():
    assert refused("simulate", "nothing.yaml") == "nothing.yaml: cannot be read: No such file or directory"


def test_several_mistakes_have_a_line_each():
    result = starling("simulate", "run.yaml", "--set", "rounds=0", "--set", "task=digit")
    assert result.exit_code == 2
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 2


def test_a_used_run_directory(folder: Path):
    (folder / "used").mkdir()
    (folder / "used" / "file").touch()
    line = refused("simulate", "run.yaml", "--run-dir", "used")
    assert line.startswith(f"run directory {folder}/used is in use: it is not empty; name another one")


def test_a_network_without_bandwidth_is_refused():
    line = refused("run", "run.yaml", "--set", "network.bandwidth_mbps=0")
    assert line == "--set network.bandwidth_mbps=0: network.bandwidth_mbps should be greater than 0, got 0"


def test_a_schedule_longer_than_the_run():
    line = refused("check", "run.yaml", "--set", "optimizer.schedule={name: cosine, warmup_steps: 1000}")
    assert line == "optimizer.schedule: cosine needs more steps in total (69) than warmup_steps (1000)"


def test_bad_input_for_scripts():
    result = starling("simulate", "run.yaml", "--json", "--set", "rounds=0")
    assert result.exit_code == 2
    answer = json.loads(result.stdout)
    assert list(answer) == KEYS
    assert (answer["status"], answer["run_id"], answer["rounds"]) == ("failed", None, 0)
    assert answer["error"].startswith("--set rounds=0: rounds should be greater than 0")


# --- runs that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "body", "where"),
    [
        ("bad_loss", "    def loss(self, module, batch):\n        raise RuntimeError('boom')\n", "node 0, round 0"),
        ("bad_build", "    def build(self):\n        raise RuntimeError('boom')\n", "node 0, round 0"),
        (
            "bad_data",
            "    def train_samples(self, num_nodes):\n        raise RuntimeError('boom')\n",
            "node 0, round 0",
        ),
        (
            "bad_metrics",
            "    def metrics(self, module, batch):\n        raise RuntimeError('boom')\n",
            "node 0, round 0",
        ),
    ],
)
def test_a_task_that_raises(name, body, where, folder: Path):
    path = task(folder, name, body)
    result = starling("simulate", "run.yaml", "--set", f"task={path}", "--json")
    assert result.exit_code == 3, result.output
    *trace, last = result.stderr.splitlines()
    assert last == f"error: {where}: RuntimeError: boom"
    assert any(line.startswith("Traceback") for line in trace)
    assert any(f"{name}.py" in line for line in trace)
    assert not any(f"{ROOT}/orchestrator/cli.py" in line for line in trace)
    answer = json.loads(result.stdout)
    assert list(answer) == KEYS
    assert (answer["status"], answer["error"]) == ("failed", f"{where}: RuntimeError: boom")


NAN = """
    def loss(self, module, batch):
        import torch
        loss = super().loss(module, batch)
        # Only the second node's: the samples of nodes differ, and so do these sums.
        return loss * float("nan") if int(batch[1].sum()) % 2 else loss
"""


def test_nan_ends_the_run_and_says_where(folder: Path):
    path = task(folder, "nan_stop", NAN)
    line = refused("simulate", "run.yaml", "--set", f"task={path}", code=3)
    assert line.startswith("node ")
    assert ", round 0: loss is nan after inner step " in line
    assert line.endswith("(lr 0.1); lower optimizer.lr, or set on_nan: skip to go on without this node's round")


def test_nan_costs_a_nodes_round_if_asked(folder: Path):
    body = (
        "    def loss(self, module, batch):\n"
        "        loss = super().loss(module, batch)\n"
        # 1437 samples: the first node owns 719, whose last batch of an epoch is one smaller than the second's.
        "        return loss * float('nan') if len(batch[1]) == 15 else loss\n"
    )
    path = task(folder, "nan_skip", body)
    flags = ["--set", f"task={path}", "--set", "on_nan=skip", "--set", "data.batch_size=32"]
    result = starling("simulate", "run.yaml", *flags, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["rounds"] == 3
    rounds = [json.loads(line) for line in (Path(answer["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    assert [one["contributing"] for one in rounds] == [1, 1, 1]


# --- check, algorithms, tasks ---------------------------------------------------------------------------------------


def test_check_prints_the_plan(folder: Path):
    result = starling("check", "run.yaml")
    assert result.exit_code == 0, result.output
    assert "runs         starling run or starling simulate" in result.stdout
    assert "samples      1,437, 718 to 719 per node; 360 held out" in result.stdout
    assert "rounds       3 of 23 steps per node, in batches of 32" in result.stdout
    assert list(folder.iterdir()) == [folder / "run.yaml"]


def test_check_predicts_what_is_sent():
    plan = json.loads(starling("check", "run.yaml", "--json").stdout)
    assert plan["status"] == "ok"
    assert plan["parameters"] == 64 * 128 + 128 + 128 * 10 + 10
    assert plan["steps_per_round"] == {"least": 23, "most": 23}
    run = json.loads(starling("simulate", "run.yaml", "--json").stdout)
    assert plan["payload_bytes"] == {"per_round": run["bytes"]["per_round"], "total": run["bytes"]["payload"]}


def test_check_knows_where_a_run_can_be_made():
    plan = json.loads(starling("check", "run.yaml", "--json", "--set", "network.latency_ms=50").stdout)
    assert plan["runtimes"] == ["cluster", "simulator"]


@pytest.mark.parametrize(("command", "names"), [("algorithms", {"diloco", "fedavg"}), ("tasks", {"digits", "text_lm"})])
def test_lists(command, names):
    assert names <= json.loads(starling(command, "--json").stdout)[command].keys()
    text = starling(command).stdout
    assert all(name in text for name in names)


def test_an_algorithm_in_full():
    text = starling("algorithms", "diloco").stdout
    for words in (
        "Δ = mean_m Δ_m",
        "inner_steps",
        "H, optimizer steps between",
        "nesterov   lr: 0.7, momentum: 0.9",
        "Deviations",
        "Elasticity",
        "arXiv:2311.08105",
    ):
        assert words in text
    answer = json.loads(starling("algorithms", "diloco", "--json").stdout)
    fields = {field["name"]: field for field in answer["fields"]}
    assert fields["inner_steps"]["default"] == 500
    assert fields["inner_steps"]["type"] == "int > 0"
    assert answer["sections"].keys() == {"Deviations", "Elasticity", "Cost", "Reference"}


@pytest.mark.parametrize("name", ["digits", "quadratic", "text_lm"])
def test_a_task_in_full(name):
    result = starling("tasks", name)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{name}  ")


def test_a_task_of_ones_own_in_full(folder: Path):
    path = task(folder, "described", "    size: int = 3  # in meters\n")
    answer = json.loads(starling("tasks", path, "--json").stdout)
    assert answer["name"] == path
    assert answer["fields"][-1] == {
        "name": "size", "type": "int", "default": 3, "required": False, "description": "in meters"
    }  # fmt: skip


def test_unknown_names():
    assert refused("algorithms", "dilocco") == "no algorithm is called 'dilocco' (did you mean diloco or eager_diloco?)"
    assert refused("tasks", "digit") == "no task is called 'digit' (did you mean digits?)"


# --- processes ------------------------------------------------------------------------------------------------------


def process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "starling", *arguments],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_nobody_reads_what_a_run_says(folder: Path):
    script = f"{sys.executable} -m starling simulate run.yaml --run-dir here; echo $? >code"
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        ["sh", "-c", f"({script}) | head -1"],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (folder / "code").read_text() == "0\n"
    assert (ended.stdout, ended.stderr) == ("starting 2 nodes in the simulator ...\n", "")
    assert json.loads((folder / "here" / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_nothing_but_json_reaches_stdout(folder: Path):
    noise = "    def build(self):\n        import os\n        os.system('echo noise')\n        return super().build()\n"
    path = task(folder, "noisy", noise)
    child = process("simulate", "run.yaml", "--json", "--set", f"task={path}")
    stdout, stderr = child.communicate(timeout=100)
    assert child.returncode == 0, stderr
    assert json.loads(stdout)["status"] == "finished"
    assert "noise" in stderr


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGTERM, signal.SIGHUP))],
)
def test_an_interrupted_run_ends_cleanly(folder: Path, number):
    child = process("simulate", "run.yaml", "--json", "--run-dir", "here", "--set", "rounds=1000000")
    metrics = folder / "here" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.02)
    child.send_signal(number)
    stdout, stderr = child.communicate(timeout=100)
    assert child.returncode == 130, stderr
    answer = json.loads(stdout)
    assert (answer["status"], answer["error"]) == ("interrupted", "interrupted")
    assert answer["rounds"] > 0
    assert "Traceback" not in stderr
    assert json.loads((folder / "here" / "summary.json").read_text())["status"] == "interrupted"


@pytest.mark.pictures
def test_a_run_goes_on(folder: Path):
    first = json.loads(starling("simulate", "run.yaml", "--json", "--run-dir", "one", "--set", "rounds=2").stdout)
    told = starling("resume", "one", "--json")
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout) == first
    longer = starling("resume", "one", "--json", "--set", "rounds=3")
    assert longer.exit_code == 0, longer.output
    assert "3 rounds, 2 of them done" in longer.stderr
    assert json.loads(longer.stdout)["rounds"] == 3
    assert "starling resume" not in longer.stderr
    assert (folder / "one" / "curves.png").exists()


def test_what_cannot_go_on_is_refused_in_a_line(folder: Path):
    assert refused("resume", "nowhere").startswith("nowhere: this is no run directory")
    starling("simulate", "run.yaml", "--run-dir", "one", "--set", "checkpoint.every_rounds=0")
    (folder / "one" / "summary.json").unlink()
    assert "there is no checkpoint that was written to its end" in refused("resume", "one")
    starling("simulate", "run.yaml", "--run-dir", "two")
    assert "--set seed=7: the checkpoint is of a run with seed: 0" in refused("resume", "two", "--set", "seed=7")
    (manifest,) = sorted((folder / "two" / "checkpoints").glob("*/manifest.json"))[-1:]
    manifest.write_text("{")
    assert "manifest.json" in refused("resume", "two", "--set", "rounds=5")
