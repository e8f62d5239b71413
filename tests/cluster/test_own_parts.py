"""Classes of a user are trained on Ray as they are simulated, whatever they are called and wherever they stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from algorithms.api import AllReduce, Train
from algorithms.low_communication.local_sgd import LocalSGD
from orchestrator import api
from orchestrator.config import Config
from tests.snippets import BASE, OWN, ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from algorithms.api import Node

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

FALSE_NAME = """
from algorithms.api import Algorithm, AllReduce, Train

class LocalSGD(Algorithm, name="local_sgd"):
    inner_steps: int = 3

    async def round(self, node):
        await Train(steps=self.inner_steps)
        mean = await AllReduce(node.parameters)
        node.parameters.copy_(mean.value * 0.5)
"""


def on_ray(config: dict[str, Any], address: str, folder: Path) -> Config:
    """The configuration for the shared Ray, whose processes are to find modules in ``folder``."""
    environment = {"env_vars": {"PYTHONPATH": f"{folder}:{ROOT}"}}
    cluster = {"address": address, "nodes": {"target": 3}, "nodes_per_actor": 3, "runtime_env": environment}
    return api.resolve(config | {"cluster": cluster})


def test_a_class_with_a_builtins_name_is_trained_itself(shared_ray: str, tmp_path: Path, monkeypatch: Any):
    (tmp_path / "my_false_name.py").write_text(FALSE_NAME)
    monkeypatch.syspath_prepend(tmp_path)
    config = BASE | {"algorithm": {"name": "my_false_name:LocalSGD", "inner_steps": 3}}
    expected = api.simulate(config, run_dir=tmp_path / "simulated")
    builtin = api.simulate(BASE | {"algorithm": {"name": "local_sgd", "inner_steps": 3}}, run_dir=tmp_path / "builtin")
    assert expected.digest != builtin.digest
    summary = api.run(on_ray(config, "auto", tmp_path), run_dir=tmp_path / "run")
    assert summary.digest == expected.digest
    assert api.replay(tmp_path / "run", run_dir=tmp_path / "again").digest == expected.digest


def test_a_class_of_a_function_is_sent_to_the_nodes(config: Callable[..., Config], tmp_path: Path):
    class Halved(LocalSGD):
        async def round(self, node: Node) -> None:
            await Train(steps=self.inner_steps)
            mean = await AllReduce(node.parameters)
            node.parameters.copy_(mean.value * 0.5)

    settings = config(Halved, "algorithm.inner_steps=3")
    summary = api.run(settings, run_dir=tmp_path / "run")
    assert summary.digest == api.simulate(settings, run_dir=tmp_path / "simulated").digest


SCRIPT = """
import sys
from torch import nn
from actors.tasks.digits import Digits
from orchestrator import resume, run, simulate

SCALE = 2.0


class Mine(Digits):
    def loss(self, module, batch):
        return SCALE * super().loss(module, batch)


if __name__ == "__main__":
    config = {config!r} | {{"task": Mine()}}
    print(simulate(config, run_dir="simulated").digest)
    print(run(config, run_dir="run").digest)
    print(resume("run", ["rounds=5"]).rounds)
"""


def test_a_class_of_a_script_is_sent_to_the_nodes(tmp_path: Path):
    config = BASE | {"cluster": {"nodes": {"target": 2}, "nodes_per_actor": 2}}
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT.format(config=config)))
    ran = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    simulated, trained, rounds = ran.stdout.split()[-3:]
    assert (trained, rounds) == (simulated, "5")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("own", OWN.values(), ids=lambda one: one.module)
def test_a_class_of_a_page_is_trained_as_it_is_simulated(own: Any, shared_ray: str, tmp_path: Path, monkeypatch: Any):
    own.write(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop(own.module, None)
    config = BASE | own.config
    summary = api.run(on_ray(config, "auto", tmp_path), run_dir=tmp_path / "run")
    assert summary.status == "finished"
    assert api.replay(tmp_path / "run", run_dir=tmp_path / "again").digest == summary.digest
    if own.module != "my_servers":  # whose messages arrive in another order
        assert api.simulate(config, run_dir=tmp_path / "simulated").digest == summary.digest
