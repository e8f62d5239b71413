"""Nothing that is read can run code: what docs/security.md says of files."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest
import yaml

from starling.orchestrator.config import yaml_loader
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES = sorted(path for folder in ("algorithms", "actors", "orchestrator") for path in (ROOT / folder).rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}


def faults(source: str) -> Iterator[str]:
    """What in a module may turn bytes into code."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (f"import {one.name}" for one in names if one.name.partition(".")[0] in UNPICKLERS)
            case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] in UNPICKLERS:
                yield f"from {module} import {names[0].name}"
            case ast.Call(func=ast.Attribute(value=owner, attr=attribute), keywords=keywords):
                call = f"{ast.unparse(owner)}.{attribute}"
                given = {one.arg: ast.unparse(one.value) for one in keywords}
                if call == "torch.load" and given.get("weights_only") != "True":
                    yield f"{call} without weights_only=True"
                if call in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
                    yield f"{call} with allow_pickle"
                if call.endswith(("read_pickle", "to_pickle")) or call.startswith(("yaml.unsafe", "yaml.full")):
                    yield call
                if call in ("yaml.load", "yaml.load_all") and ast.unparse(node).partition(", ")[2] != "Loader)":
                    yield call
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                yield name


def test_nothing_is_unpickled_or_evaluated():
    found = {str(path.relative_to(ROOT)): list(faults(path.read_text())) for path in MODULES}
    assert {name: what for name, what in found.items() if what} == {}
    assert issubclass(yaml_loader.Loader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch; torch.load('x')",
        "import torch; torch.load('x', weights_only=False)",
        "np.load('x', allow_pickle=True)",
        "pd.read_pickle('x')",
        "yaml.load(x)",
        "yaml.unsafe_load(x)",
        "eval(x)",
    ],
)
def test_the_search_finds_it(source: str):
    assert len(list(faults(source))) == 1


def test_a_safe_call_is_none_of_them():
    assert list(faults("torch.load('x', weights_only=True); np.load('x'); yaml.safe_load(x); model.eval()")) == []
