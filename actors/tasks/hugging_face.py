"""Common parts of tasks on Hugging Face models: loading, LoRA, tokenizers, and the saved form.

Needs the optional extra: ``pip install '.[hf]'``. A model is a folder, or a name on the hub, which is then in the cache
of Hugging Face, or is fetched. Everything is imported when a task is used: ``starling tasks`` needs none of it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from starling.actors.data import files
from starling.actors.data.texts import vocabulary_size
from starling.actors.tasks import hf_checks
from starling.algorithms.errors import DataError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

Kind = Literal["CAUSAL_LM", "SEQ_CLS"]
_LOG = logging.getLogger("starling")


class LoRA(BaseModel):
    """Low-rank adapters: the model stays as it is, and W + (``alpha`` / ``rank``) · B·A is what is computed with.

    Only A and B are trained, exchanged and saved, and the head of a classifier. Reference: Hu et al., "LoRA: Low-Rank
    Adaptation of Large Language Models", ICLR 2022; by the package peft.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: PositiveInt = 8  # r
    alpha: PositiveFloat = 16.0  # α
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of what comes into A
    targets: tuple[str, ...] | None = None  # names of the layers that are adapted; null: what peft takes for the model


@dataclass(frozen=True)
class ModelTokenizer:
    """The tokenizer of a model's folder or name, as ``AutoTokenizer`` finds it."""

    name: str
    model: str

    def load(self) -> tuple[Callable[[str], list[int]], int]:
        """Load the tokenizer; return its encoder, which adds no special tokens, and the model's vocabulary size.

        Raises:
            DataError: there is none, or it has more tokens than the model.
        """
        tokenizer = load_tokenizer(self.name)
        size = vocabulary(self.model)
        check_vocabulary(self.name, tokenizer, size)

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        return encode, size


def check_vocabulary(name: str, tokenizer: Any, size: int) -> None:  # noqa: ANN401 - transformers' own types
    """Refuse a tokenizer with tokens that the model does not know.

    Raises:
        DataError: it has some.
    """
    count = vocabulary_size(tokenizer.get_vocab())
    if count > size:
        what = f"the tokenizer {name} has {count} tokens, and the model's vocabulary {size}"
        raise DataError(f"task.tokenizer: {what}; take the one that the model was trained with")


@functools.lru_cache(maxsize=4)
def load_tokenizer(name: str) -> Any:  # noqa: ANN401 - transformers' own types
    """The tokenizer; one without a padding token pads with its last one.

    Raises:
        DataError: it cannot be loaded.
    """
    with _loading("task.tokenizer", name) as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(_place(name), trust_remote_code=False)
    if tokenizer.pad_token is None:
        words = tokenizer.get_vocab()
        tokenizer.pad_token = tokenizer.eos_token or max(words, key=words.__getitem__)
    return tokenizer


@functools.lru_cache(maxsize=4)
def load_config(name: str) -> Any:  # noqa: ANN401 - as above
    """A model's configuration.

    Raises:
        DataError: it cannot be loaded.
    """
    with _loading("task.model", name) as transformers:
        return transformers.AutoConfig.from_pretrained(_place(name), trust_remote_code=False)


def vocabulary(model: str) -> int:
    """Tokens that a model knows."""
    return int(load_config(model).get_text_config().vocab_size)


def check_context(model: str, context: int) -> None:
    """Refuse windows that are longer than the model's positions.

    Raises:
        SettingsError: they are.
    """
    most = getattr(load_config(model).get_text_config(), "max_position_embeddings", None)
    if most is not None and context > most:
        raise SettingsError(f"task.context: {context} tokens are more than the {most} positions of {model}; lower it")


def build(kind: Kind, model: str, *, pretrained: bool, lora: LoRA | None, extra: dict[str, Any]) -> nn.Module:
    """A model in float32 in evaluation mode; with ``lora`` only the adapters are trainable.

    Args:
        kind: what it is for.
        model: a folder, or a name on the hub.
        pretrained: with its weights; else as its configuration says, freshly initialised.
        lora: adapters.
        extra: fields of the model's configuration that are set.

    Raises:
        DataError: it cannot be loaded.
        SettingsError: it has no such layers as ``lora`` names.
    """
    import torch

    def made(extra: dict[str, Any]) -> Any:  # noqa: ANN401 - transformers' own types
        with _loading("task.model", model) as transformers:
            auto = transformers.AutoModelForCausalLM
            if kind == "SEQ_CLS":
                auto = transformers.AutoModelForSequenceClassification
            if pretrained:
                return auto.from_pretrained(_place(model), dtype=torch.float32, trust_remote_code=False, **extra)
            config = transformers.AutoConfig.from_pretrained(_place(model), trust_remote_code=False, **extra)
            return auto.from_config(config, dtype=torch.float32)

    module = made(extra)
    if kind == "CAUSAL_LM":
        module = _causal(module, model, lambda: made(extra | {"is_decoder": True}))
    return module if lora is None else _adapted(module, kind, lora)


def _causal(module: Any, model: str, as_decoder: Callable[[], Any]) -> Any:  # noqa: ANN401 - as above
    """A model whose positions see no later token: an encoder that can be a decoder is made one.

    Raises:
        SettingsError: it sees the tokens that it is to predict.
    """
    size = vocabulary(model)
    try:
        if not hf_checks.looks_ahead(module, size):
            return module
        if hasattr(module.config, "is_decoder"):
            module = as_decoder()
            if not hf_checks.looks_ahead(module, size):
                files.say_once(
                    f"decoder {model}", f"task.model: {model} is an encoder; it is trained with is_decoder: true"
                )
                return module
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(f"task.model: {model} cannot be asked for the next token: {reason}") from None
    what = f"task.model: {model} is no causal language model: its positions see the tokens that they are to predict"
    raise SettingsError(f"{what}; take a decoder")


def _adapted(module: Any, kind: Kind, lora: LoRA) -> nn.Module:  # noqa: ANN401 - as above
    try:
        import peft
        from transformers.pytorch_utils import Conv1D
    except ImportError:
        raise SettingsError("task.lora needs the package peft: pip install '.[hf]'") from None
    transposed = any(isinstance(layer, Conv1D) for layer in module.modules())  # GPT-2's layers keep Wᵀ
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - it divides, and takes floats
        lora_dropout=lora.dropout,
        target_modules=None if lora.targets is None else list(lora.targets),
        fan_in_fan_out=transposed,
        task_type=kind,
    )
    try:
        with _quiet():
            return peft.get_peft_model(module, config)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(f"task.lora.targets: {reason}") from None


def export(module: Any, tokenizer: str, folder: Path) -> None:  # noqa: ANN401 - as above
    """Write a folder that ``from_pretrained`` loads, of model and tokenizer; the adapters alone go into ``adapter``.

    The exported model is loaded again and asked for a few tokens; if its answer differs from the model's, there is a
    warning.
    """
    size = int(module.config.get_text_config().vocab_size)
    expected = hf_checks.outputs(module, size)
    with _quiet():
        if hasattr(module, "merge_and_unload"):
            module.save_pretrained(folder / "adapter")
            module = hf_checks.untied(module).merge_and_unload()
        module.save_pretrained(folder)
        load_tokenizer(tokenizer).save_pretrained(folder)
        again = type(module).from_pretrained(folder, dtype=next(module.parameters()).dtype)
    off = hf_checks.difference(expected, hf_checks.outputs(again, size))
    if off is not None:
        _LOG.warning(
            "%s is another model than the one that was trained: its logits differ by up to %.3g, of %.3g; take "
            "model.safetensors and load_model",
            folder,
            off,
            float(expected.abs().max()),
        )


def _place(name: str) -> str:
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


@contextlib.contextmanager
def _loading(key: str, name: str) -> Iterator[Any]:
    """Transformers, quiet; what goes wrong in loading becomes one line."""
    try:
        import transformers
    except ImportError:
        raise DataError("this task needs the package transformers: pip install '.[hf]'") from None
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise DataError(f"{key}: the folder {name} does not exist here")
    try:
        with _quiet():
            yield transformers
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:240]
        raise DataError(f"{key}: {name} cannot be loaded: {reason}") from None


_ADVICE = re.compile(
    "deprecat|fan_in_fan_out|use_cache|HF_TOKEN|unauthenticated|legacy|fast tokenizer|remove_columns|Setting `|"
    "generation flags|copying from a non-meta parameter",
    re.IGNORECASE,
)
"""Advice of transformers and peft that changes no result."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and advice: a run has a view of its own. What else they warn of is a warning of ours."""
    from transformers.utils import logging as theirs

    bars = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    said = _Collected()
    loggers = [logging.getLogger(name) for name in ("transformers", "peft")]
    kept = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [said], False
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, kept, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        if bars:
            theirs.enable_progress_bar()
    silent = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning)
    said.texts += [str(one.message) for one in caught if not issubclass(one.category, silent)]
    for text in dict.fromkeys(" ".join(text.split()) for text in said.texts):
        if not _ADVICE.search(text):
            files.say_once(text, files.printable(text[:400]))


class _Collected(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
