"""Hugging Face models: tiny random ones, made here; trained whole and through LoRA, loaded by ``from_pretrained``."""

from __future__ import annotations

import builtins
import json
import logging
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from starling import load_model, simulate
from starling.actors.data import DataConfig, files
from starling.actors.data.indices import concrete
from starling.actors.host.build import load_data
from starling.actors.tasks import hf_checks, hugging_face
from starling.actors.tasks.hf_causal_lm import HFCausalLM
from starling.actors.tasks.hf_classifier import HFClassifier
from starling.actors.training.workbench import Workbench
from starling.algorithms.errors import DataError, SettingsError, StarlingError
from starling.orchestrator.checkpoints.export import export
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records.rebuild import rebuild

SENTENCES = ["the quick brown fox", "jumps over the lazy dog", "hello world again"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and tokenizers as they would lie on a disk, a corpus, and a table of sentences."""
    root = tmp_path_factory.mktemp("hf")
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<end>"], show_progress=False)
    made.train_from_iterator(SENTENCES * 20, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>")
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    llama = transformers.LlamaConfig(
        **SIZES, **ends, intermediate_size=32, num_key_value_heads=2, max_position_embeddings=64
    )
    gpt2 = transformers.GPT2Config(**ends, n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=320)
    bert = transformers.BertConfig(**SIZES, intermediate_size=32, max_position_embeddings=64, pad_token_id=1)
    with torch.random.fork_rng(), hugging_face._quiet():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(llama).save_pretrained(root / "llama")
        transformers.GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
        transformers.BertModel(bert).save_pretrained(root / "bert")
        for name in ("llama", "gpt2", "bert"):
            tokenizer.save_pretrained(root / name)
    (root / "corpus.txt").write_text("".join(f"{SENTENCES[number % 3]}\n" for number in range(200)))
    table = pa.table({"text": SENTENCES * 40, "label": [0, 1, 2] * 40})
    pq.write_table(table, root / "table.parquet", row_group_size=10)
    return root


def causal(folder: Path, model: str = "llama", **fields: Any) -> HFCausalLM:
    raw = {"model": str(folder / model), "corpus": str(folder / "corpus.txt"), "context": 15}
    return HFCausalLM.model_validate(raw | fields)


def classifier(folder: Path, model: str = "bert", **fields: Any) -> HFClassifier:
    raw = {"model": str(folder / model), "path": str(folder / "table.parquet"), "context": 12}
    return HFClassifier.model_validate(raw | fields)


def train(task: HFCausalLM | HFClassifier, run_dir: Path, lr: float, rounds: int = 2) -> Any:
    raw = {
        "rounds": rounds,
        "algorithm": {"name": "diloco", "inner_steps": 8},
        "task": task.model_dump(),
        "data": {"batch_size": 8},
        "optimizer": {"name": "adamw", "lr": lr},
        "evaluation": {"every_rounds": 0, "max_batches": 4},
        "cluster": {"nodes": {"target": 2}},
        "tracking": "none",
    }
    return simulate(raw, run_dir=run_dir)


@pytest.mark.parametrize(
    ("model", "lora"), [("llama", None), ("gpt2", {"rank": 4, "dropout": 0.1}), ("llama", {"rank": 2})]
)
def test_a_causal_model_is_trained_and_exported(folder: Path, tmp_path: Path, model: str, lora: dict[str, Any] | None):
    task = causal(folder, model, lora=lora)
    before = Workbench(task, parse({"algorithm": "fedavg", "task": "digits"}).optimizer, 0, torch.device("cpu"))
    summary = train(task, tmp_path / "run", lr=0.02)
    # A model that knows nothing is at log 320; adapters of a random one cannot do much.
    assert summary.metrics["loss"] < math.log(320) - (0.05 if lora else 1.5)
    export = tmp_path / "run" / "export"
    again = transformers.AutoModelForCausalLM.from_pretrained(export)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    tokens = torch.tensor([tokenizer("the quick brown fox jumps", add_special_tokens=False)["input_ids"]])
    ours: Any = load_model(tmp_path / "run")
    with torch.no_grad():
        assert torch.allclose(again(input_ids=tokens).logits, ours(input_ids=tokens).logits, atol=1e-5)
        untrained: Any = before.shared.module
        assert not torch.allclose(again(input_ids=tokens).logits, untrained(input_ids=tokens).logits, atol=1e-3)
    names = [entry.name for entry in before.shared.layout.entries]
    if lora is None:
        assert len(names) == len(list(again.parameters()))
        return
    # What is trained and sent is A and B of each adapted layer, and nothing else.
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert summary.bytes["payload"] < 2 * 2 * 8 * 2 * before.shared.layout.num_values
    with hugging_face._quiet():
        adapted = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(folder / model), export / "adapter"
        )
    with torch.no_grad():
        assert torch.allclose(adapted(input_ids=tokens).logits, ours(input_ids=tokens).logits, atol=1e-5)


@pytest.mark.parametrize(("model", "lora"), [("bert", None), ("gpt2", {"rank": 4}), ("bert", {"rank": 4})])
def test_a_classifier_is_trained_and_exported(folder: Path, tmp_path: Path, model: str, lora: dict[str, Any] | None):
    task = classifier(folder, model, lora=lora)
    assert train(task, tmp_path / "run", lr=0.02, rounds=3).metrics["accuracy"] == 1.0
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    assert again(**batch).logits.argmax(1).tolist() == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_a_model_is_tuned_with_forward_passes_alone(folder: Path, tmp_path: Path, lora: dict[str, Any] | None):
    """MeZO on one node, then the model again from its log."""
    task = causal(folder, lora=lora)
    raw = {
        "rounds": 12,
        "algorithm": {"name": "mezo", "lr": 0.02, "samples": 4, "distribution": "rademacher"},
        "task": {"name": task.name, **task.model_dump(exclude={"name"})},
        "data": {"batch_size": 8},
        "evaluation": {"every_rounds": 1},
        "cluster": {"nodes": {"target": 1}},
        "tracking": "none",
    }
    ran = simulate(raw, run_dir=tmp_path / "run")
    losses = [json.loads(line)["metrics"]["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert rebuild(tmp_path / "run").digest == ran.digest
    assert ran.bytes["payload"] == 0
    # Without a copy of the parameters: transformers' layers, the tied embedding and peft's adapters have the same bits.
    raw["algorithm"] |= {"perturb": "on_use"}
    assert simulate(raw, run_dir=tmp_path / "on_use").digest == ran.digest


def test_dropout_that_is_on_is_named_where_losses_are_compared(folder: Path, tmp_path: Path):
    task = causal(folder, "gpt2")
    raw = {"rounds": 1, "algorithm": "mezo", "task": {"name": task.name, **task.model_dump(exclude={"name"})}}
    words = r"losses of this model cannot be compared: layer transformer\.drop has dropout 0\.1; set it to 0$"
    with pytest.raises(StarlingError, match=words):
        simulate(raw | {"cluster": {"nodes": {"target": 1}}, "tracking": "none"}, run_dir=tmp_path / "run")


def test_what_is_read(folder: Path):
    task = causal(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "llama")
    expected = tokenizer((folder / "corpus.txt").read_text(), add_special_tokens=False)["input_ids"]
    windows = task.train_samples(1).batch(torch.arange(3))[0]
    assert windows.shape == (3, 16)
    assert windows.flatten().tolist() == expected[:48]
    samples = classifier(folder).train_samples(1)
    tokens, mask, labels = samples.batch(torch.arange(2))
    for row, sentence in enumerate(SENTENCES[:2]):
        ids = tokenizer(sentence)["input_ids"][:12]
        assert tokens[row, : len(ids)].tolist() == ids
        assert mask[row].tolist() == [1] * len(ids) + [0] * (12 - len(ids))
    assert labels.tolist() == [0, 1]
    assert len(samples) == 110


def test_padding_does_not_matter(folder: Path):
    task = classifier(folder, "gpt2", context=20)
    module = task.build().eval()
    short = classifier(folder, "gpt2", context=8)
    with torch.no_grad():
        outputs = [task.predictions(module, one.train_samples(1).batch(torch.arange(3)))[0] for one in (task, short)]
    assert torch.allclose(*outputs, atol=1e-6)


def test_weights_are_the_model_s_own_or_fresh(folder: Path):
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder / "gpt2").state_dict()
    loaded = causal(folder, "gpt2").build().state_dict()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    fresh = causal(folder, "gpt2", pretrained=False).build().state_dict()
    assert not torch.equal(saved["transformer.wte.weight"], fresh["transformer.wte.weight"])


def test_every_node_begins_alike(folder: Path):
    config = parse({"algorithm": "fedavg", "task": classifier(folder, lora={"rank": 2}).model_dump()})
    first, other = (Workbench(config.task, config.optimizer, 3, torch.device("cpu")).shared.module for _ in range(2))
    for (name, one), two in zip(first.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_rotary_frequencies_are_not_averaged(folder: Path):
    bench = Workbench(
        causal(folder), parse({"algorithm": "fedavg", "task": "digits"}).optimizer, 0, torch.device("cpu")
    )
    assert bench.shared.layout.num_buffer_values == 0


def test_pooled_rows_are_divided_by_label(folder: Path):
    task = classifier(folder).model_dump()
    config = parse({"algorithm": "fedavg", "task": task, "data": {"partition": {"name": "shards", "per_node": 1}}})
    data = load_data(config.task, config.data, 3, 0)
    found = [data.train.batch(concrete(part))[2].unique().tolist() for part in data.parts]
    assert all(len(labels) <= 2 for labels in found)


def test_each_node_opens_its_own_rows(folder: Path, tmp_path: Path):
    for node in range(2):
        table = pa.table({"text": SENTENCES[node : node + 1] * 4, "label": [node] * 4})
        pq.write_table(table, tmp_path / f"site-{node}.parquet")
    task = classifier(folder, path=str(tmp_path / "site-{node}.parquet"), validation=str(folder / "table.parquet"))
    data = load_data(task, DataConfig(source="federated"), 2, 0)
    assert [data.train.batch(concrete(data.parts[node]))[2].tolist() for node in range(2)] == [[0] * 4, [1] * 4]
    assert (task.found_classes.count, len(data.validation)) == (3, 120)
    corpus = causal(folder, corpus=str(tmp_path / "{node}.txt"), validation=str(folder / "corpus.txt"))
    (tmp_path / "1.txt").write_text("the lazy dog\n" * 40)
    texts = load_data(corpus, DataConfig(source="federated"), 2, 0)
    assert len(texts.train.batch(concrete(texts.parts[1]))[0]) == len(texts.parts[1]) > 1


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("causal", {"model": "/no/such/model"}, DataError, "task.model: the folder /no/such/model does not exist here"),
    ("causal", {"model": "{root}"}, DataError, "task.model: .* cannot be loaded: "),
    (
        "causal",
        {"tokenizer": "{large}"},
        DataError,
        "task.tokenizer: the tokenizer .*/large has 326 tokens, and the model's",
    ),
    ("classifier", {"tokenizer": "{large}"}, DataError, "vocabulary 320; take the one that the model was trained with"),
    (
        "causal",
        {"context": 65},
        SettingsError,
        "task.context: 65 tokens are more than the 64 positions of .*; lower it",
    ),
    (
        "causal",
        {"context": 64, "corpus": "{short}"},
        DataError,
        "has . tokens of training text, less than one sample of 65",
    ),
    (
        "causal",
        {"lora": {"targets": ["nothing"]}},
        SettingsError,
        "task.lora.targets: Target modules .*nothing.* not found",
    ),
    ("classifier", {"text": "txt"}, DataError, r"task.text: there is no column 'txt' \(did you mean text\?\)"),
    ("classifier", {"text": "label"}, DataError, r"task.text: column label is int64; it must hold texts \(string\)"),
    (
        "classifier",
        {"label": "text"},
        DataError,
        "task.label: text is the column of texts; name the one of classes",
    ),
    (
        "classifier",
        {"classes": 2},
        DataError,
        "row group .: column label has the class 2, and classes are 0 to 1; raise",
    ),
]


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]], ids=str)
def test_layers_that_share_weights_are_merged_apart(folder: Path, tmp_path: Path, targets: list[str]):
    tied = transformers.LlamaConfig(
        **SIZES,
        intermediate_size=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=1,
    )
    with torch.random.fork_rng(), hugging_face._quiet():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(tied).save_pretrained(tmp_path / "tied")
        transformers.AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(tmp_path / "tied")
    module: Any = causal(folder, model=str(tmp_path / "tied"), lora={"rank": 2, "targets": targets}).build()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    expected = hf_checks.outputs(module, 320)
    hugging_face.export(module, str(tmp_path / "tied"), tmp_path / "export")
    assert torch.equal(hf_checks.outputs(module, 320), expected)  # it is as it was
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.allclose(hf_checks.outputs(again, 320), expected, atol=1e-4)


def test_what_is_written_is_read_back(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    logging.getLogger("starling").propagate = True
    module: Any = causal(folder).build()
    hugging_face.export(module, str(folder / "llama"), tmp_path / "export")
    assert not caplog.records
    save = module.save_pretrained

    def lossy(path: Path) -> None:  # as a library's fault would
        with torch.no_grad():
            module.lm_head.weight.mul_(1.01)
        save(path)

    module.save_pretrained = lossy
    hugging_face.export(module, str(folder / "llama"), tmp_path / "export")
    assert "export is another model than the one that was trained: its logits differ by up to" in caplog.text


def test_an_encoder_is_made_a_decoder_or_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert not hf_checks.looks_ahead(causal(folder).build(), 320)
    for pretrained in (True, False):
        module: Any = causal(folder, "bert", pretrained=pretrained).build()
        assert module.config.is_decoder
        assert not hf_checks.looks_ahead(module, 320)
    encoder = transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, intermediate_size=32, pad_token_id=1))
    assert hf_checks.looks_ahead(encoder, 320)
    monkeypatch.setattr(hf_checks, "looks_ahead", lambda module, size: True)
    with pytest.raises(
        SettingsError, match="is no causal language model: its positions see the tokens that they are to"
    ):
        causal(folder).build()


def test_what_libraries_warn_of_is_passed_on_but_for_advice(caplog: pytest.LogCaptureFixture):
    logging.getLogger("starling").propagate = True
    theirs = transformers.utils.logging.get_logger("transformers.models")
    files.forget()
    with hugging_face._quiet():
        theirs.warning("weights of x were not initialized")
        warnings.warn("y is tied", stacklevel=1)
        warnings.warn("z is deprecated", FutureWarning, stacklevel=1)
        theirs.warning("`use_cache=True` is incompatible with gradient checkpointing")
        theirs.info("nothing")
    assert [record.message for record in caplog.records] == ["weights of x were not initialized", "y is tied"]


@pytest.mark.parametrize(("kind", "fields", "error", "message"), WRONG, ids=[one[3][:40] for one in WRONG])
def test_what_is_wrong_is_said_in_a_line(
    folder: Path, tmp_path: Path, kind: str, fields: dict[str, Any], error: type[Exception], message: str
):
    (tmp_path / "short.txt").write_text("the quick")
    large = transformers.AutoTokenizer.from_pretrained(folder / "llama")
    large.add_tokens([f"<{number}>" for number in range(326 - len(large))])
    large.save_pretrained(tmp_path / "large")
    places = {"root": str(tmp_path), "large": str(tmp_path / "large"), "short": str(tmp_path / "short.txt")}
    fields = {key: value.format(**places) if isinstance(value, str) else value for key, value in fields.items()}
    task = (causal if kind == "causal" else classifier)(folder, **({"model": folder / "llama"} | fields))
    with pytest.raises(error, match=message) as caught:
        task.build()
        samples = task.train_samples(2)
        samples.batch(torch.arange(min(40, len(samples))))
    assert "\n" not in str(caught.value)


def test_without_the_extra_one_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    load = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] in ("transformers", "peft"):
            raise ImportError(name)
        return load(name, *rest)

    hugging_face.load_config.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"this task needs the package transformers: pip install '.\[hf\]'"):
        causal(folder).build()


def test_listing_the_tasks_needs_none_of_it():
    # In a process of its own: here transformers is imported.
    code = "from starling.actors.tasks import hf_causal_lm, hf_classifier; import sys"
    code += "; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert json.loads(done.stdout.strip().lower()) is False


@pytest.mark.parametrize("lora", [pytest.param(None, marks=pytest.mark.slow), {"rank": 2}])
def test_a_checkpoint_is_exported(folder: Path, tmp_path: Path, lora: dict[str, Any] | None):
    raw = {
        "rounds": 1,
        "algorithm": {"name": "diloco", "inner_steps": 2},
        "task": causal(folder, lora=lora).model_dump(),
        "data": {"batch_size": 8},
        "evaluation": {"every_rounds": 0, "max_batches": 1},
        "checkpoint": {"every_rounds": 1},
        "cluster": {"nodes": {"target": 2}},
        "tracking": "none",
    }
    simulate(raw, run_dir=tmp_path / "run")
    export(tmp_path / "run", 0, "hf", tmp_path / "hf")
    ours, final = (
        transformers.AutoModelForCausalLM.from_pretrained(one) for one in (tmp_path / "hf", tmp_path / "run/export")
    )
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), final.parameters(), strict=True))
    assert (tmp_path / "hf/adapter").exists() == (lora is not None)
    with pytest.raises(ConfigError, match="is there already; name a new folder with --to"):
        export(tmp_path / "run", 0, "hf", tmp_path / "hf")
    state = torch.load(export(tmp_path / "run", 0, "torch").path, weights_only=True)
    load_model(tmp_path / "run").load_state_dict(state)
