"""Data and models from files on the Ray runtime: the simulator's bits, and each node's own files."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from starling.actors.tasks.hugging_face import _quiet
from starling.orchestrator.api import run, simulate
from starling.orchestrator.config.schema import Config
from starling.orchestrator.errors import DataError
from tests.cluster.test_runtime import Watcher, actors_alive
from tests.tasks.test_parquet import broken, rows, write

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

Make = Callable[..., Config]


@pytest.fixture
def parquet(tmp_path: Path) -> dict[str, object]:
    """A table of which a row group cannot be read."""
    path = broken(tmp_path / "table.parquet")
    return {"name": "parquet", "path": str(path), "label": "y", "features": ["a", "b"], "on_bad_row_group": "skip"}


@pytest.fixture
def sites(tmp_path: Path) -> dict[str, object]:
    """A file for each node, and one for all."""
    for node in range(4):
        write(tmp_path / f"site-{node}.parquet", table=pa.table(rows(node * 60, node * 60 + 15 * (node + 1))))
    common = write(tmp_path / "common.parquet")
    path = str(tmp_path / "site-{node}.parquet")
    return {"name": "parquet", "path": path, "label": "y", "features": ["a", "b"], "validation": str(common)}


@pytest.fixture
def lora(tmp_path: Path) -> dict[str, object]:
    """Adapters of a tiny classifier."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    texts = ["the quick brown fox", "the lazy dog", "hello again"] * 20
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>"], show_progress=False))
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with _quiet():
        transformers.BertModel(config).save_pretrained(tmp_path / "model")
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(
            tmp_path / "model"
        )
    pq.write_table(pa.table({"text": texts, "label": [0, 1, 2] * 20}), tmp_path / "texts.parquet", row_group_size=5)
    paths = {"model": str(tmp_path / "model"), "path": str(tmp_path / "texts.parquet")}
    return {"name": "hf_classifier", "context": 8, "lora": {"rank": 2}, **paths}


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("parquet", ["data.partition={name: dirichlet, alpha: 0.5, min_samples: 8}", "data.sampler=poisson"]),
        pytest.param("sites", ["data.source=federated", "data.batch_size=4"], marks=pytest.mark.slow),
        pytest.param(
            "lora", ["optimizer.name=adamw", "optimizer.lr=0.01"], marks=[pytest.mark.slow, pytest.mark.smoke]
        ),
    ],
)
def test_the_cluster_ends_with_the_simulators_bits(
    config: Make, tmp_path: Path, request: pytest.FixtureRequest, task: str, overrides: list[str]
):
    settings = config("fedavg", *overrides, task=request.getfixturevalue(task))
    watcher = Watcher()
    real = run(settings, run_dir=tmp_path / "real", observers=[watcher])
    simulated = simulate(settings, run_dir=tmp_path / "simulated")
    assert real.digest == simulated.digest
    assert real.metrics == simulated.metrics
    assert real.bytes["payload"] == simulated.bytes["payload"]
    if task == "parquet":
        said = [line for lines in watcher.lines.values() for line in lines]
        assert any("row group 3 cannot be read" in line and line.endswith("left out") for line in said)
    if task == "lora":
        for place in ("real", "simulated"):
            transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / place / "export")


@pytest.mark.slow
@pytest.mark.smoke
def test_data_that_are_others_in_each_process_are_refused(config: Make, tmp_path: Path):
    settings = config(
        "fedavg", "cluster.nodes.target=2", "cluster.nodes_per_actor=1", task="tests.cluster.programs:Divided"
    )
    said = (
        r"the data of node \d \(pid \d+ on .*\) are not those of pid \d+ on .*: values of the training samples differ"
    )
    with pytest.raises(DataError, match=said):
        run(settings, run_dir=tmp_path / "run")
    assert actors_alive() == 0
