"""Who may import whom, tried: algorithms without Ray, MLflow, actors or files; the simulator without Ray and MLflow."""

from __future__ import annotations

import subprocess
import sys

import grimp
import networkx as nx

PROGRAM = """
import importlib, pkgutil, sys
for blocked in {blocked}:
    sys.modules[blocked] = None
for name in {packages}:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), name + "."):
        if module.name not in {excepted}:
            importlib.import_module(module.name)
print(*sorted(name for name in sys.modules if name.count(".") == name.startswith("starling.")))
"""


def loaded(packages: list[str], blocked: list[str], excepted: list[str]) -> set[str]:
    """Import all of some packages' modules in a fresh process; which top-level modules and parts of ours are there."""
    program = PROGRAM.format(packages=packages, blocked=blocked, excepted=excepted)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_algorithms_know_torch_and_mathematics():
    blocked = ["ray", "mlflow", "starling.actors", "starling.orchestrator", "safetensors", "yaml"]
    assert {"starling.algorithms", "torch", "pydantic"} <= loaded(["starling.algorithms"], blocked, [])


def test_the_simulator_needs_neither_ray_nor_mlflow():
    packages = [
        "starling.actors",
        "starling.orchestrator.runtimes.simulator.runtime",
        "starling.orchestrator.control.controller",
        "starling.orchestrator.config.schema",
    ]
    on_ray = ["node_actor", "node_builder", "process_calls", "store_calls"]
    excepted = [f"starling.actors.remote.{name}" for name in on_ray]
    assert "starling.orchestrator" in loaded(packages, ["ray", "mlflow"], excepted)


def test_a_run_on_digits_imports_neither_torchs_compiler_nor_scikit_learn():
    """Each takes longer to import than all the rest, in every process of a run."""
    code = """
import sys
from starling.orchestrator.config.schema import parse
from starling.orchestrator.runtimes.simulator.runtime import Simulator
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.records.observers import Observer
optimizer = {"name": "adamw", "betas": [0.9, 0.95]}
raw = {"rounds": 1, "algorithm": {"name": "fedavg", "steps": 1}, "task": "digits", "tracking": "none"}
config = parse(raw | {"optimizer": optimizer, "cluster": {"nodes": {"target": 2}}})
Controller(config, Simulator(config), Observer(), run_id="test", run_dir="test").run()
print(*{"torch._dynamo", "sklearn", "scipy", "pandas", "matplotlib"}.intersection(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_no_module_imports_itself_round_about():
    graph = grimp.build_graph("starling", cache_dir=None, exclude_type_checking_imports=True)
    # ``tracking: mlflow`` is a part like a user's own, and builds its observer: imported when a run begins.
    graph.remove_import(
        importer="starling.orchestrator.config.schema", imported="starling.orchestrator.tracking.mlflow_tracker"
    )
    arrows = {one: graph.find_modules_directly_imported_by(one) for one in graph.modules}
    circles = [sorted(found) for found in nx.strongly_connected_components(nx.DiGraph(arrows)) if len(found) > 1]
    assert len(arrows) > 200
    assert circles == []
