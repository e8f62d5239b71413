"""Classes of a user are trained on Ray as they are simulated, whatever they are called and wherever they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from starling.algorithms.api import AllReduce, Train
from starling.algorithms.low_communication.local_sgd import LocalSGD
from starling.orchestrator import api
from tests.paths import PYTHONPATH
from tests.snippets import BASE, OWN

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from starling.algorithms.api import Node
    from starling.orchestrator.config.schema import Config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

FALSE_NAME = """
from starling.algorithms.api import Algorithm, AllReduce, Train

class LocalSGD(Algorithm, name="local_sgd"):
    inner_steps: int = 3

    async def round(self, node):
        await Train(steps=self.inner_steps)
        mean = await AllReduce(node.parameters)
        node.parameters.copy_(mean.value * 0.5)
"""
SCRIPT = """
from starling.actors.tasks.digits import Digits
from starling import resume, run, simulate
from starling.orchestrator.api import replay

SCALE = 2.0


class Mine(Digits):
    def loss(self, module, batch):
        return SCALE * super().loss(module, batch)


def compare(name, config):
    trained = run(config, run_dir=f"{name}/run")
    assert replay(f"{name}/run", run_dir=f"{name}/again").digest == trained.digest, name
    simulated = simulate(config, run_dir=f"{name}/simulated")
    # Messages to a server arrive in another order.
    assert simulated.digest == trained.digest or name == "my_servers", name
    print("as simulated:", name)
    return simulated.digest


if __name__ == "__main__":
    builtin = {"algorithm": {"name": "local_sgd", "inner_steps": 3}}
    false_name = {"algorithm": {"name": "my_false_name:LocalSGD", "inner_steps": 3}}
    assert simulate(BASE | builtin, run_dir="builtin").digest != compare("false_name", BASE | false_name)
    compare("script", BASE | {"task": Mine})
    assert resume("script/run", ["rounds=5"]).rounds == 5
"""
ALL = "".join(f"    compare({one.module!r}, BASE | {one.config!r})\n" for one in OWN.values())


def train(script: str, folder: Path) -> list[str]:
    """Run ``script`` with a Ray of its own for each run; return the names of what was trained as it was simulated."""
    config = BASE | {"cluster": {"nodes": {"target": 3}, "nodes_per_actor": 3}}
    (folder / "my_false_name.py").write_text(FALSE_NAME)
    (folder / "train.py").write_text(f"BASE = {config!r}\n{script}")
    ran = subprocess.run(
        [sys.executable, "train.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}:{PYTHONPATH}"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return [line.removeprefix("as simulated: ") for line in ran.stdout.splitlines() if line.startswith("as simulated")]


@pytest.mark.slow
@pytest.mark.smoke
def test_a_class_with_a_builtins_name_and_one_of_a_script_are_trained_themselves(tmp_path: Path):
    assert train(SCRIPT, tmp_path) == ["false_name", "script"]


@pytest.mark.slow
@pytest.mark.soak
def test_each_class_of_the_pages_is_trained_as_it_is_simulated(tmp_path: Path):
    for one in OWN.values():
        one.write(tmp_path)
    head, _, _ = SCRIPT.partition("    builtin = ")
    # One Ray for all of them; its processes look for modules where it was started.
    session = "    import ray\n\n    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)\n"
    session += "    BASE['cluster'] |= {'address': 'auto'}\n"
    assert train(head + session + ALL, tmp_path) == [one.module for one in OWN.values()]


def test_a_class_of_a_function_is_sent_to_the_nodes(config: Callable[..., Config], tmp_path: Path):
    class Halved(LocalSGD):
        async def round(self, node: Node) -> None:
            await Train(steps=self.inner_steps)
            mean = await AllReduce(node.parameters)
            node.parameters.copy_(mean.value * 0.5)

    settings = config(Halved(inner_steps=3))
    summary = api.run(settings, run_dir=tmp_path / "run")
    assert summary.digest == api.simulate(settings, run_dir=tmp_path / "simulated").digest
