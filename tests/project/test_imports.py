"""Who may import whom, tried: algorithms without Ray, MLflow, actors or files; the simulator without Ray and MLflow."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys
for blocked in {blocked}:
    sys.modules[blocked] = None
for name in {packages}:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), name + "."):
        if module.name not in {excepted}:
            importlib.import_module(module.name)
print(*sorted(name for name in sys.modules if "." not in name))
"""


def loaded(packages: list[str], blocked: list[str], excepted: list[str]) -> set[str]:
    """Import all of some packages' modules in a fresh process; which top-level modules are there then."""
    program = PROGRAM.format(packages=packages, blocked=blocked, excepted=excepted)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_algorithms_know_torch_and_mathematics():
    there = loaded(["algorithms"], ["ray", "mlflow", "actors", "orchestrator", "safetensors", "yaml"], [])
    assert {"algorithms", "torch", "pydantic"} <= there


def test_the_simulator_needs_neither_ray_nor_mlflow():
    packages = [
        "actors",
        "starling.orchestrator.runtimes.simulator.runtime",
        "starling.orchestrator.control.controller",
        "starling.orchestrator.config.schema",
    ]
    assert "orchestrator" in loaded(
        packages, ["ray", "mlflow"], ["starling.actors.remote.node_actor", "starling.actors.remote.state_calls"]
    )
