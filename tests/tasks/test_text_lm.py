"""Text: the corpus, its windows and its split; the model is causal and learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from starling.actors.tasks import Task
from starling.actors.tasks.text_lm import TextLM, TransformerConfig, Windows
from starling.algorithms.errors import DataError
from starling.algorithms.registry import find

SMALL = TransformerConfig(layers=2, width=32, heads=2)


def small(corpus: Path, **fields: object) -> TextLM:
    return TextLM.model_validate({"model": SMALL, "context": 8, "corpus": str(corpus)} | fields)


def text_of(samples: Windows) -> bytes:
    (windows,) = samples.batch(torch.arange(len(samples)))
    return bytes(windows.flatten().tolist())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty files of nine equal bytes each (a…t), and what is not to be read."""
    for index in range(20):
        path = tmp_path / ("deep/er" if index % 2 else ".") / f"{index:02}.{('py', 'txt', 'md')[index % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([ord("a") + index]) * 9)
    for name in (".git/config.txt", "deep/__pycache__/x.py", "picture.png", ".hidden.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not to be read")
    return tmp_path


def test_configuration():
    assert find(Task, "text_lm") is TextLM
    assert TextLM.model_validate({"model": {"layers": 2}}).model == TransformerConfig(layers=2)
    with pytest.raises(ValidationError, match="width 30 is not a multiple of heads 4"):
        TransformerConfig(width=30)


def test_folder_is_split_by_file(folder: Path):
    task = small(folder)
    # By relative path: the even ones at the top come first, then those in deep/er.
    train, validation = task.train_samples(1), task.validation_samples(1)
    order = "acegikmoqs" + "bdfhjlnprt"
    assert text_of(validation) == "".join(letter * 9 for letter in (order[9], order[19])).encode()
    assert text_of(train) == "".join(letter * 9 for letter in order[:9] + order[10:19]).encode()


def test_windows_do_not_overlap(tmp_path: Path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)))
    train = small(path).train_samples(1)
    assert len(train) == 180 // 9
    assert train.owners is None
    (windows,) = train.batch(torch.tensor([2, 0]))
    assert windows.dtype == torch.int64
    assert windows.tolist() == [list(range(18, 27)), list(range(9))]


def test_single_file_holds_out_its_last_tenth(tmp_path: Path):
    path = tmp_path / "text.anything"
    path.write_bytes(bytes(range(200)))
    task = small(path)
    assert text_of(task.train_samples(1)) == bytes(range(180))
    assert text_of(task.validation_samples(1)) == bytes(range(180, 198))


def test_few_files_hold_out_their_last_tenth(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"a" * 45)
    (tmp_path / "b.txt").write_bytes(b"b" * 45)
    task = small(tmp_path)
    assert text_of(task.train_samples(1)) == b"a" * 45 + b"b" * 36
    assert text_of(task.validation_samples(1)) == b"b" * 9


def test_max_bytes_cuts_the_last_file(folder: Path):
    task = small(folder, max_bytes=13 * 9 + 4, context=3)
    read = text_of(task.train_samples(1)) + text_of(task.validation_samples(1))
    assert len(read) == 12 * 9 + 4 + 8  # twelve files and four bytes to train on; of the tenth, two windows of four


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "task.corpus: .*/corpus does not exist here; name a file, a folder or a pattern"),
        ({}, "task.corpus: .*/corpus has no .md or .py or .txt files"),
        ({"a.txt": b"short"}, "task.corpus: .*/corpus has 5 bytes of training text, less than one sample of 9; lower"),
        ({"a.txt": b"short" * 9}, "task.corpus: .*/corpus has 4 bytes of validation text, less than one sample of 9"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, content: dict[str, bytes] | None, message: str):
    corpus = tmp_path / "corpus"
    if content is not None:
        corpus.mkdir()
        for name, text in content.items():
            (corpus / name).write_bytes(text)
    task = small(corpus)
    with pytest.raises(DataError, match=message) as caught:
        _ = task.train_samples(1), task.validation_samples(1)
    assert "\n" not in str(caught.value)


def test_unigram_baseline(tmp_path: Path):
    path = tmp_path / "text"
    path.write_bytes(b"a" * 60 + b"b" * 30 + b"ab" * 4 + b"cc")
    # Training text: 60 a, 30 b; held out: 4 a, 4 b, 2 c. One is added to each of the 256 counts.
    expected = -(4 * math.log(61 / 346) + 4 * math.log(31 / 346) + 2 * math.log(1 / 346)) / 10
    assert small(path).baselines(1) == {"unigram_entropy": pytest.approx(expected, rel=1e-12)}


def test_default_corpus():
    task = TextLM(model=SMALL)
    train, validation = task.train_samples(2), task.validation_samples(2)
    size = 129 * (len(train) + len(validation))
    assert 7_999_000 < size <= 8_000_000
    assert 0.05 < len(validation) / len(train) < 0.2
    (windows,) = validation.batch(torch.arange(3))
    assert windows.shape == (3, 129)
    assert 2.5 < task.baselines(1)["unigram_entropy"] < math.log(256)


def test_names_and_initialisation():
    torch.manual_seed(0)
    module = TextLM(model=SMALL, context=8).build()
    names = {name for name, _ in module.named_parameters()}
    assert {"embedding.weight", "positions", "norm.weight", "blocks.0.attention.project.weight"} <= names
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {"0", "1"}
    scales = {
        name: float(parameter.detach().std()) for name, parameter in module.named_parameters() if parameter.dim() > 1
    }
    assert scales["embedding.weight"] == pytest.approx(0.02, rel=0.05)
    assert scales["blocks.1.mlp.project.weight"] == pytest.approx(0.01, rel=0.05)
    assert not list(module.buffers())


def test_model_is_causal():
    torch.manual_seed(0)
    task = TextLM(model=SMALL, context=8)
    module = task.build().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(256, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 256
    one, other = module(tokens), module(changed)
    assert one.shape == (1, 8, 256)
    assert torch.equal(one[:, :5], other[:, :5])
    assert not torch.allclose(one[:, 5:], other[:, 5:])


def test_metrics_and_summary():
    torch.manual_seed(0)
    task = TextLM(model=SMALL, context=8)
    batch = (torch.randint(256, (20, 9)),)
    module = task.build()
    metrics = task.metrics(module, batch)
    assert torch.equal(metrics["loss"], task.loss(module, batch))
    assert float(metrics["loss"].detach()) == pytest.approx(math.log(256), abs=0.2)
    assert task.summary({"loss": 1.0}) == {"loss": 1.0, "perplexity": pytest.approx(math.e)}
    assert task.summary({"loss": 1e6})["perplexity"] == math.inf


def test_learns(tmp_path: Path):
    path = tmp_path / "text"
    path.write_bytes(b"the quick brown fox " * 60)
    task = small(path)
    torch.manual_seed(0)
    module = task.build()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    samples = task.train_samples(1)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(module, samples.batch(torch.randint(len(samples), (16,)))).backward()
        optimizer.step()
    held_out = task.validation_samples(1)
    metrics = task.metrics(module, held_out.batch(torch.arange(len(held_out))))
    assert float(metrics["loss"].detach()) < 0.6 * task.baselines(1)["unigram_entropy"]
