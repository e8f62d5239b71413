"""Where texts come from: patterns, URIs, columns of Parquet files; and tokenizers, that must fit the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from starling import simulate
from starling.actors.data import DataConfig, texts
from starling.actors.data.indices import concrete
from starling.actors.data.texts import Bytes, Text, Windows, load_corpus
from starling.actors.host.build import load_data
from starling.actors.tasks.text_lm import TextLM, TransformerConfig
from starling.algorithms.errors import DataError

SMALL = TransformerConfig(layers=1, width=16, heads=2)


def small(corpus: Path | str, **fields: Any) -> TextLM:
    return TextLM.model_validate({"model": SMALL, "context": 7, "corpus": str(corpus)} | fields)


def text_of(samples: Windows) -> bytes:
    return bytes(samples.batch(torch.arange(len(samples)))[0].flatten().tolist())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level one of 280 tokens, which loses nothing."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def test_patterns_and_uris(tmp_path: Path):
    for number in range(4):
        (tmp_path / "books" / f"b{number % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / f"b{number % 2}" / f"{number}.text").write_bytes(bytes([ord("a") + number]) * 20)
    for corpus in (tmp_path / "books" / "*" / "*.text", f"file://{tmp_path}/books/**/*.text"):
        assert text_of(small(corpus).train_samples(1)) == b"a" * 20 + b"c" * 20 + b"b" * 20 + b"d" * 12
    one = small(tmp_path / "books" / "b?" / "[13].text", context=3)
    assert text_of(one.train_samples(1)) == b"b" * 20 + b"d" * 16


def test_a_column_of_parquet_files(tmp_path: Path):
    for number in range(2):
        table = pa.table({"text": [f"{number}{row}" * 4 for row in range(10)] + [None], "n": range(11)})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=4)
    lines = [f"{number}{row}" * 4 for number in range(2) for row in range(10)]
    expected = "".join(f"{line}\n" for line in [*lines[:10], "", *lines[10:], ""]).encode()
    one = small(tmp_path, column="text", context=3)
    train, held_out = text_of(one.train_samples(1)), text_of(one.validation_samples(1))
    cut = len(expected) - len(expected) // 10
    assert expected[:cut].startswith(train)
    assert expected[cut:].startswith(held_out)
    assert len(train) > cut - 4
    assert text_of(small(tmp_path, column="text", context=3, max_bytes=40).train_samples(1)) == expected[:36]
    with pytest.raises(DataError, match="task.column: there is no column 'txt' .did you mean text.."):
        small(tmp_path, column="txt").train_samples(1)
    with pytest.raises(DataError, match="task.column: column n is int64; it must hold texts .string."):
        small(tmp_path, column="n").train_samples(1)
    with pytest.raises(DataError, match="task.corpus: name the Parquet files whose column task.column is"):
        TextLM(column="text").train_samples(1)


def test_partition_by_file(tmp_path: Path):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_bytes(bytes([ord("a") + number]) * 80)
    config = DataConfig.model_validate({"partition": {"name": "column", "column": "file"}})
    data = load_data(small(tmp_path), config, 5, 0)
    for node, part in enumerate(data.parts):
        (windows,) = data.train.batch(concrete(part))
        assert set(windows[:, 0].tolist()) == {ord("a") + node}


def test_tokens(tmp_path: Path, tokenizer: Path):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    one = small(tmp_path / "a.txt", tokenizer=str(tokenizer))
    known = Tokenizer.from_file(str(tokenizer))
    expected = known.encode("the quick brown fox jumps over the lazy dog\n" * 40).ids
    train = one.train_samples(1).batch(torch.arange(len(one.train_samples(1))))[0].flatten().tolist()
    assert train == expected[: len(train)]
    assert len(train) > 0.9 * len(expected) - 9
    assert one.build()(torch.tensor([[279, 0]])).shape == (1, 2, 280)
    assert set(one.baselines(1)) == {"unigram_entropy"}
    assert one.evaluation_batch_size(4) == 4
    folder = small(tmp_path / "a.txt", tokenizer=str(tokenizer.parent))
    assert torch.equal(
        folder.train_samples(1).batch(torch.arange(3))[0], one.train_samples(1).batch(torch.arange(3))[0]
    )


def test_a_long_text_is_tokenized_in_pieces(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch):
    line = "the quick brown fox jumps over the lazy dog é\n"
    (tmp_path / "a.txt").write_text(line * 50)
    whole = small(tmp_path / "a.txt", tokenizer=str(tokenizer)).train_samples(1)
    monkeypatch.setattr(texts, "_AT_ONCE", 100)
    texts._load.cache_clear()
    pieces = small(tmp_path / "a.txt", tokenizer=str(tokenizer)).train_samples(1)
    assert torch.equal(whole.batch(torch.arange(len(whole)))[0], pieces.batch(torch.arange(len(pieces)))[0])


def test_a_large_text_lies_in_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 40)
    monkeypatch.setattr(texts, "_IN_MEMORY_BYTES", 1000)
    texts._load.cache_clear()
    train, held_out, size = load_corpus(str(tmp_path / "a.txt"), None, 10_000, Bytes())
    assert isinstance(train.tokens, np.memmap)
    assert bytes(train.tokens) + bytes(held_out.tokens) == (bytes(range(256)) * 40)[:10_000]
    assert size == 256
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]
    texts._load.cache_clear()


def test_a_vocabulary_may_be_larger_and_not_smaller(tmp_path: Path, tokenizer: Path):
    (tmp_path / "a.txt").write_text("the quick brown fox\n" * 40)
    assert small(tmp_path, tokenizer=str(tokenizer), vocabulary=320).build()(torch.tensor([[0]])).shape == (1, 1, 320)
    with pytest.raises(
        DataError, match=r"task.vocabulary: the model knows 100 tokens, and .*tokenizer.json has 280; raise"
    ):
        small(tmp_path, tokenizer=str(tokenizer), vocabulary=100).build()


def test_what_a_tokenizer_does_to_sentences_is_not_done_to_a_corpus(tmp_path: Path, tokenizer: Path):
    (tmp_path / "a.txt").write_text("the quick brown fox. " * 200)
    expected = load_corpus(str(tmp_path), None, 10**6, texts.TokenizerFile(str(tokenizer)))[0].tokens
    made = Tokenizer.from_file(str(tokenizer))
    made.enable_padding(length=5000)
    made.enable_truncation(3)
    made.save(str(tmp_path / "tokenizer.json"))
    found = load_corpus(str(tmp_path), None, 10**6, texts.TokenizerFile(str(tmp_path)))[0].tokens
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("highest", [300, 70_000])
def test_a_vocabulary_goes_to_its_highest_number(tmp_path: Path, highest: int):
    words = {"[UNK]": 0, "a": 1, "b": highest}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("a b " * 50)
    train, _, vocabulary = load_corpus(str(tmp_path), None, 10**6, texts.TokenizerFile(str(tmp_path)))
    assert vocabulary == highest + 1
    assert set(train.tokens.tolist()) == {1, highest}


def test_texts_are_utf_8(tmp_path: Path, tokenizer: Path):
    encoding = texts.TokenizerFile(str(tokenizer))
    text = "größer\r\n" * 40

    def tokens(data: bytes, most: int = 10**6) -> list[int]:
        (tmp_path / "a.txt").write_bytes(data)
        return np.concatenate([part.tokens for part in load_corpus(str(tmp_path), None, most, encoding)[:2]]).tolist()

    assert tokens(b"\xef\xbb\xbf" + text.encode()) == tokens(text.encode())
    assert len(tokens(text.encode(), most=3)) > 0  # ö is cut in two
    for wrong, place in ((text.encode("latin-1"), 2), (b"\xef\xbb\xbfx\xff", 4), (text.encode("utf-16"), 0)):
        with pytest.raises(DataError, match=rf"task.corpus: .*a.txt is not UTF-8 at byte {place}; convert it"):
            tokens(wrong)
    (tmp_path / "a.txt").write_bytes(text.encode("latin-1"))
    train = load_corpus(str(tmp_path), None, 10**6, Bytes())[0]
    assert train.tokens.tobytes() == text.encode("latin-1")[: len(train.tokens)]  # bytes are bytes


def test_a_tokenizer_that_does_not_know_a_word_is_told_of(tmp_path: Path):
    made = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("a b")
    with pytest.raises(DataError, match=r"task.tokenizer: .*tokenizer.json cannot encode the corpus: .*UNK"):
        load_corpus(str(tmp_path), None, 10**6, texts.TokenizerFile(str(tmp_path)))


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int8(), pa.string()), pa.large_string(), pa.string_view()])
def test_a_column_of_texts_may_be_encoded(tmp_path: Path, kind: Any):
    words = pa.array(["one", "two", None, "one"] * 20)
    pq.write_table(pa.table({"words": words.cast(kind)}), tmp_path / "a.parquet", row_group_size=30)
    parts = load_corpus(str(tmp_path), "words", 10**6, Bytes())[:2]
    assert b"".join(part.tokens.tobytes() for part in parts) == b"one\ntwo\n\none\n" * 20


def test_tokenizers_that_are_none(tmp_path: Path):
    (tmp_path / "a.txt").write_text("the quick brown fox\n" * 40)
    with pytest.raises(DataError, match=r"task.tokenizer: .*/no.json does not exist here; name a tokenizer.json, or a"):
        small(tmp_path, tokenizer=str(tmp_path / "no.json")).train_samples(1)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"task.tokenizer: .*/bad.json is not a tokenizer: ") as caught:
        small(tmp_path, tokenizer=str(tmp_path / "bad.json")).train_samples(1)
    assert "\n" not in str(caught.value)


def test_a_model_of_tokens_trains(tmp_path: Path, tokenizer: Path):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    raw = {
        "rounds": 4,
        "algorithm": {"name": "diloco", "inner_steps": 10},
        "task": small(tmp_path / "a.txt", tokenizer=str(tokenizer)).model_dump(),
        "data": {"batch_size": 8},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "evaluation": {"every_rounds": 0},
        "cluster": {"nodes": {"target": 2}},
        "tracking": "none",
    }
    summary = simulate(raw, run_dir=tmp_path / "run")
    assert summary.metrics["loss"] < 0.5 * summary.baselines["unigram_entropy"]
    assert summary.metrics["perplexity"] == pytest.approx(np.exp(summary.metrics["loss"]))


def test_each_node_opens_its_own_texts(tmp_path: Path):
    for node in range(3):
        (tmp_path / f"site-{node}.txt").write_bytes(bytes([ord("a") + node]) * (80 + 8 * node))
    (tmp_path / "common.txt").write_bytes(b"abc" * 40)
    one = small(tmp_path / "site-{node}.txt", validation=str(tmp_path / "common.txt"))
    (tmp_path / "site-0.txt").unlink()
    data = load_data(one, DataConfig(source="federated"), 3, 0)
    assert [len(data.parts[node]) for node in (1, 2)] == [11, 12]
    assert set(data.train.batch(concrete(data.parts[2]))[0].flatten().tolist()) == {ord("c")}
    assert text_of(one.validation_samples(3)) == b"abc" * 40
    assert set(one.baselines(3)) == {"unigram_entropy"}
    with pytest.raises(DataError, match="task.corpus: .*/site-0.txt does not exist here"):
        data.parts[0]
    with pytest.raises(
        DataError, match=r"site-\{node\}.txt has \{node\} in it: each node has data of its own; set data.so"
    ):
        load_data(one, DataConfig(), 3, 0)
    with pytest.raises(DataError, match="task.validation: name data that all nodes can read"):
        load_data(small(tmp_path / "site-{node}.txt"), DataConfig(source="federated"), 3, 0)


def test_texts_of_their_own_are_held_out(tmp_path: Path):
    (tmp_path / "train.txt").write_bytes(b"a" * 80)
    (tmp_path / "other.txt").write_bytes(b"b" * 40)
    one = small(tmp_path / "train.txt", validation=str(tmp_path / "other.txt"))
    assert text_of(one.train_samples(1)) == b"a" * 80
    assert text_of(one.validation_samples(1)) == b"b" * 40
    with pytest.raises(DataError, match="task.validation: .*/nowhere.txt does not exist here"):
        small(tmp_path / "train.txt", validation=str(tmp_path / "nowhere.txt")).validation_samples(1)


def test_a_text_that_is_written_anew_is_read_anew(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 80)
    assert text_of(small(path).train_samples(1)) == b"a" * 72
    path.write_bytes(b"b" * 96)
    assert text_of(small(path).train_samples(1)) == b"b" * 80


def test_files_of_windows():
    windows = Windows(Text(np.arange(20, dtype=np.uint8), np.array([8, 9, 20])), 4)
    assert windows.column("file").tolist() == [0, 0, 1, 2, 2]
    assert windows.column("label") is None


def test_ends_of_files_are_counted_from_the_begin_of_each_part(tmp_path: Path):
    """Files of 45 and 50 bytes: 86 are trained on, and what is held out begins in the second."""
    (tmp_path / "a.txt").write_bytes(b"a" * 45)
    (tmp_path / "b.txt").write_bytes(b"b" * 50)
    train, held_out = load_corpus(str(tmp_path), None, 10**6, Bytes())[:2]
    assert [part.ends.tolist() for part in (train, held_out)] == [[45, 86], [0, 9]]
    assert Windows(train, 20).column("file").tolist() == [0, 0, 0, 1]
    assert Windows(held_out, 3).column("file").tolist() == [1, 1, 1]


def test_the_standard_library_is_in_the_order_of_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not of sizes or of the file system: the same text on every machine."""
    for name, size in {"b.py": 1, "a.py": 3, "pack/c.py": 2, "pack/a.py": 4, "a/z.py": 0, "tests/t.py": 9}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"#" * size)
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    found = [path.relative_to(tmp_path).as_posix() for path in texts._standard_library()]
    assert found == ["a.py", "a/z.py", "b.py", "pack/a.py", "pack/c.py"]
