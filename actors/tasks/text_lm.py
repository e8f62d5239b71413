"""Text: a byte-level language model on any folder of text, by default on Python's own standard library.

The default corpus needs no download: the sources that every interpreter brings along. It differs a little between
Python versions, so digests are to be compared on one version.

* ``corpus`` is a file, or a folder whose ``.py``, ``.txt`` and ``.md`` files are read, at any depth, in the order of
  their relative paths, up to ``max_bytes``; names that begin with a dot, and ``__pycache__``, are left out.
* Every tenth file is held out. A single file, and a folder of fewer than ten, holds out its last tenth instead.
* A sample is a window of ``context`` + 1 bytes; windows do not overlap.

The model is a decoder-only transformer: learned positions, normalisation before each part, GELU, and an output that
shares its weights with the embedding. Loss is in nats per byte; divide by ln 2 for bits.
"""

from __future__ import annotations

import functools
import os
import sysconfig
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from actors.tasks.base import Task
from algorithms.errors import DataError

_VOCABULARY = 256
_SUFFIXES = frozenset({".py", ".txt", ".md"})
_SKIPS = frozenset({"__pycache__"})
_STDLIB_SKIPS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"})
_HOLD_OUT_EVERY = 10
_INIT_STD = 0.02  # GPT-2


class TransformerConfig(BaseModel):
    """The size of a decoder-only transformer: about 12 · ``layers`` · ``width``² parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: PositiveInt = 4
    width: PositiveInt = 128
    heads: PositiveInt = 4

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            text = f"width {self.width} is not a multiple of heads {self.heads}"
            raise PydanticCustomError("heads", "{text}", {"text": text})
        return self


class Windows:
    """Consecutive windows of a text, drawn from by index."""

    owners = None

    def __init__(self, text: Tensor, length: int) -> None:
        self._windows = text[: len(text) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self._windows)

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """The windows at ``indices``, one tensor of int64, shape (b, length)."""
        return (self._windows.index_select(0, indices).long(),)


class TextLM(Task, name="text_lm"):
    """Predict the next byte."""

    model: TransformerConfig = TransformerConfig()
    context: PositiveInt = 128  # bytes that the model sees
    corpus: str | None = None  # a file or folder; null: the standard library's sources
    max_bytes: PositiveInt = 8_000_000  # what is read of the corpus, both parts together

    def train_samples(self, num_nodes: int) -> Windows:
        """Windows of all files but every tenth."""
        return self._windows(self._texts()[0], "training")

    def validation_samples(self, num_nodes: int) -> Windows:
        """Windows of every tenth file."""
        return self._windows(self._texts()[1], "validation")

    def build(self) -> nn.Module:
        """A transformer with GPT-2's initialisation."""
        return Transformer(self.model, self.context)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross-entropy of the next byte, in nats."""
        (windows,) = batch
        return F.cross_entropy(module(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def metrics(self, module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Loss, and the fraction of bytes that are predicted."""
        (windows,) = batch
        logits, targets = module(windows[:, :-1]), windows[:, 1:]
        accuracy = (logits.argmax(dim=-1) == targets).double().mean()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten()), "accuracy": accuracy}

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Add the perplexity per byte, e to the loss."""
        loss = torch.tensor(means["loss"], dtype=torch.float64)
        return means | {"perplexity": float(loss.exp())}

    def baselines(self, num_nodes: int) -> dict[str, float]:
        """The loss of a model that knows only how frequent each byte is.

        Frequencies are those of the training text, each count plus one so that no byte is impossible; the loss is
        their cross-entropy on the validation text, as a model's would be, and not the entropy of either.
        """
        train, validation = (torch.bincount(text, minlength=_VOCABULARY).double() for text in self._texts())
        logarithms = ((train + 1) / (train + 1).sum()).log()
        return {"unigram_entropy": -float((validation * logarithms).sum() / validation.sum())}

    def _texts(self) -> tuple[Tensor, Tensor]:
        return _load(self.corpus, self.max_bytes)

    def _windows(self, text: Tensor, part: str) -> Windows:
        windows = Windows(text, self.context + 1)
        if len(windows) == 0:
            raise DataError(
                f"task.corpus: {_describe(self.corpus)} has {len(text)} bytes of {part} text, less than one sample "
                f"of {self.context + 1}; lower task.context, or name a larger corpus"
            )
        return windows


# --- the model ------------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Maps bytes, shape (b, t) with t at most ``context``, to logits of the next byte, shape (b, t, 256)."""

    def __init__(self, config: TransformerConfig, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, config.width)
        self.positions = nn.Parameter(torch.empty(context, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        for name, parameter in self.named_parameters():
            if name.endswith("project.weight"):
                # Each block adds two terms to the residual stream; their sum over the depth starts with unit scale.
                nn.init.normal_(parameter, std=_INIT_STD / (2 * config.layers) ** 0.5)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=_INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of what follows each position."""
        hidden = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return F.linear(self.norm(hidden), self.embedding.weight)


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each added to what comes in."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape (b, t, width) to the same."""
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.queries_keys_values = nn.Linear(config.width, 3 * config.width)
        self.project = nn.Linear(config.width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape (b, t, width) to the same."""
        # (b, t, 3·width) → three tensors of shape (b, heads, t, width / heads)
        split = self.queries_keys_values(hidden).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = split.unbind(0)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.project(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """width → 4·width → width."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.project = nn.Linear(4 * config.width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape (b, t, width) to the same."""
        return self.project(F.gelu(self.expand(hidden)))


# --- the corpus -----------------------------------------------------------------------------------------------------


@functools.cache
def _load(corpus: str | None, max_bytes: int) -> tuple[Tensor, Tensor]:
    """Training and validation text as uint8, read once per process; not to be written to."""
    texts = _read(corpus, max_bytes)
    if len(texts) < _HOLD_OUT_EVERY:
        text = b"".join(texts)
        cut = len(text) - len(text) // _HOLD_OUT_EVERY
        return _bytes(text[:cut]), _bytes(text[cut:])
    held_out = [text for index, text in enumerate(texts) if index % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1]
    others = [text for index, text in enumerate(texts) if index % _HOLD_OUT_EVERY != _HOLD_OUT_EVERY - 1]
    return _bytes(b"".join(others)), _bytes(b"".join(held_out))


def _read(corpus: str | None, max_bytes: int) -> list[bytes]:
    """The corpus' files, the last one cut where ``max_bytes`` are reached."""
    texts: list[bytes] = []
    room = max_bytes
    try:
        for path in _files(corpus):
            if room == 0:
                break
            with path.open("rb") as file:
                texts.append(file.read(room))
            room -= len(texts[-1])
    except OSError as error:
        raise DataError(f"task.corpus: {_describe(corpus)} cannot be read: {error}") from None
    return texts


def _files(corpus: str | None) -> list[Path]:
    """The files that are read, in order."""
    root = Path(corpus).expanduser() if corpus is not None else Path(sysconfig.get_paths()["stdlib"])
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"task.corpus: {_describe(corpus)} does not exist here; name a file or a folder of text")
    suffixes, skips = (_SUFFIXES, _SKIPS) if corpus is not None else (frozenset({".py"}), _SKIPS | _STDLIB_SKIPS)
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        # In place: what is skipped is not walked either; site-packages may hold a hundred thousand files.
        folders[:] = [name for name in folders if name not in skips and not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix in suffixes and path.is_file()]
    if not found:
        raise DataError(f"task.corpus: {_describe(corpus)} has no {' or '.join(sorted(suffixes))} files")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _describe(corpus: str | None) -> str:
    return corpus if corpus is not None else f"the standard library ({sysconfig.get_paths()['stdlib']})"


def _bytes(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
