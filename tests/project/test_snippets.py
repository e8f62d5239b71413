"""The Python of README and docs does what the pages say: simulated, repeated from its log, interrupted and resumed."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest

from starling import load_model, resume, simulate
from starling.orchestrator.analysis.plan import make_plan
from starling.orchestrator.api import replay
from starling.orchestrator.driver import resolve
from tests.control.test_resume import Interrupter
from tests.paths import ROOT
from tests.snippets import BASE, OWN, Own, blocks

if TYPE_CHECKING:
    from pathlib import Path

SCRIPTS = {
    "README.md": ["for steps in (5, 15, 50):", "logits = model(tokens)"],
    "cli.md": ['print(summary.metrics["accuracy"], summary.digest)'],
    "data.md": ["print(model(tokens).argmax(-1))"],
}
"""Lines of the blocks that are scripts, by page; the tests below run them."""
ELSEWHERE = {
    "mine = {": "tests/sweeps/test_tune_spaces.py",
    "from starling.orchestrator.sweeps.sweep import Options, sweep": "tests/cluster/test_sweeps.py",
    "from transformers import AutoModelForCausalLM, AutoTokenizer": "tests/tasks/test_hugging_face.py",
    "async def round(self, node: Node) -> None:": "README.md",
}
"""Blocks that are tested elsewhere, by a line of theirs; what stands in docs/index.md is a part of README's first."""


@pytest.fixture
def own(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    """A class of a page, importable."""
    one: Own = request.param
    one.write(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop(one.module, None)
    return one


each = pytest.mark.parametrize("own", OWN.values(), ids=lambda one: one.module, indirect=True)


@each
def test_a_class_of_a_page_is_simulated_repeated_and_resumed(own: Own, tmp_path: Path):
    config: dict[str, Any] = BASE | own.config
    summary = simulate(config, run_dir=tmp_path / "run")
    assert summary.status == "finished"
    assert f"{own.module}:" in (tmp_path / "run" / "config.yaml").read_text()
    assert replay(tmp_path / "run", run_dir=tmp_path / "again").digest == summary.digest
    assert simulate(tmp_path / "run" / "config.yaml", run_dir=tmp_path / "once_more").digest == summary.digest
    with contextlib.suppress(KeyboardInterrupt):
        simulate(config, run_dir=tmp_path / "cut", observers=[Interrupter(1)])
    resumed = resume(tmp_path / "cut")
    # Without a barrier a resumed run is another one: see docs/checkpoints.md.
    assert resumed.digest == summary.digest or own.module == "my_servers"
    assert resumed.rounds == summary.rounds


def test_bytes_that_an_algorithm_does_not_tell_are_not_known_and_its_steps_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    OWN["class LocalSGD(Algorithm):"].write(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_algorithms", None)
    plan = make_plan(resolve(BASE | OWN["class LocalSGD(Algorithm):"].config))
    assert (plan.payload_bytes, plan.steps_per_round) == (None, {"least": 3, "most": 3})


def test_each_block_of_a_page_is_tested():
    covered = {*OWN, *ELSEWHERE, *(line for lines in SCRIPTS.values() for line in lines)}
    missing = [(one.page, one.text) for one in blocks() if not covered & set(one.text.splitlines())]
    assert missing == []


def test_the_index_shows_a_part_of_the_first_block():
    short = next(one.text for one in blocks() if one.page == "index.md")
    first = next(one.text for one in blocks() if one.page == "README.md")
    assert "".join(f"    {line}\n" for line in short.splitlines()) in first


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), [(page, line) for page, lines in SCRIPTS.items() for line in lines])
def test_a_script_of_a_page_runs(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = next(one.text for one in blocks() if one.page == page and line in one.text.splitlines())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names: dict[str, Any] = {}
    if "load_model" in text and "simulate(" not in text:
        config = BASE | {"rounds": 1, "task": {"name": "text_lm", "model": {"width": 16, "layers": 1, "heads": 1}}}
        simulate(config, run_dir=tmp_path / "runs" / "mine")
        text = re.sub(r"runs/[\w-]+", "runs/mine", text)
        assert load_model(tmp_path / "runs" / "mine") is not None
        import torch

        names["tokens"] = torch.zeros(1, 8, dtype=torch.long)
    exec(compile(text, page, "exec"), names)
