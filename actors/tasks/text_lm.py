"""Text: a language model on any text, of bytes or of tokens, by default on Python's own standard library.

The default corpus needs no download: the sources that every interpreter brings along. It differs a little between
Python versions, so digests are to be compared on one version.

* ``corpus`` is a file, a folder, a pattern (``books/**/*.txt``), or a URI of pyarrow's file systems. The ``.py``,
  ``.txt`` and ``.md`` files of a folder are read at any depth, in the order of their relative paths. Up to
  ``max_bytes`` are read. In a folder, names that begin with a dot, and ``__pycache__``, are left out. With ``column``,
  the files are Parquet, and the texts are those of that column.
* Every tenth file is held out. A single file, and a folder of fewer than ten, holds out its last tenth instead.
  ``validation`` names others. With ``data.source: federated`` the corpus has ``{node}`` in it; each node opens its own.
* A sample is a window of ``context`` + 1 bytes, or tokens of ``tokenizer``; windows do not overlap. ``data.partition``
  may be by the column ``file``: the file in which a window begins.

The model is a decoder-only transformer: learned positions, normalisation before each part, GELU, and an output that
shares its weights with the embedding. Loss is in nats per byte, or token; divide by ln 2 for bits.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from starling.actors.data.texts import Bytes, Encoding, TextSource, TokenizerFile, Windows
from starling.actors.tasks import supervised
from starling.actors.tasks.base import Task
from starling.algorithms.errors import DataError

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


class TextLM(Task, name="text_lm"):
    """Predict the next byte, or token."""

    model: TransformerConfig = TransformerConfig()
    context: PositiveInt = 128  # bytes or tokens that the model sees
    corpus: str | None = None  # a file, folder, pattern or URI; null: the standard library's sources
    column: str | None = None  # of texts, if the files are Parquet
    validation: str | None = None  # held-out texts, in the same form; null: a tenth of the corpus
    max_bytes: PositiveInt = 8_000_000  # what is read of the corpus, both parts together
    tokenizer: str | None = None  # a Hugging Face tokenizer.json, or a folder with one; null: bytes
    vocabulary: PositiveInt | None = None  # tokens that the model knows; null: as many as there are

    def train_samples(self, num_nodes: int) -> Windows:
        """Windows of all files but every tenth."""
        return self._source.train()

    def own_samples(self, node: int, num_nodes: int) -> Windows | None:
        """Windows of all files of the node."""
        return self._source.of_node(node)

    def validation_samples(self, num_nodes: int) -> Windows:
        """Windows of every tenth file."""
        return self._source.held_out()

    def build(self) -> nn.Module:
        """A transformer with GPT-2's initialisation."""
        return Transformer(self.model, self.context, self._vocabulary())

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross-entropy of the next byte or token, in nats."""
        (windows,) = batch
        return supervised.next_token_loss(module(windows[:, :-1]), windows[:, 1:])

    def metrics(self, module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Loss, and the fraction of bytes or tokens that are predicted."""
        (windows,) = batch
        return supervised.next_token_metrics(module(windows[:, :-1]), windows[:, 1:])

    def predictions(self, module: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Logits of every next token, shape (b · context, vocabulary), and the tokens."""
        (windows,) = batch
        return module(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()

    def evaluation_batch_size(self, batch_size: int) -> int:
        # Logits take 4 bytes for each token of the vocabulary, at every place.
        return super().evaluation_batch_size(batch_size) if self.tokenizer is None else batch_size

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Add the perplexity per byte or token, e to the loss."""
        return supervised.with_perplexity(means)

    def baselines(self, num_nodes: int) -> dict[str, float]:
        """The loss of a model that knows only how frequent each byte or token is.

        Frequencies are those of the training text, each count plus one so that none is impossible. The loss is their
        cross-entropy on the validation text, as a model's loss would be, and not the entropy of either text. For
        federated texts, which no process has as a whole, frequencies are those of the validation text.
        """
        size = self._vocabulary()
        train, validation = (
            torch.from_numpy(np.bincount(text.tokens, minlength=size)).double() for text in self._source.texts()
        )
        logarithms = ((train + 1) / (train + 1).sum()).log()
        return {"unigram_entropy": -float((validation * logarithms).sum() / validation.sum())}

    @property
    def _encoding(self) -> Encoding:
        return Bytes() if self.tokenizer is None else TokenizerFile(self.tokenizer)

    @property
    def _source(self) -> TextSource:
        length = self.context + 1
        return TextSource(self.corpus, self.column, self.validation, self.max_bytes, self._encoding, length)

    def _vocabulary(self) -> int:
        known = self._encoding.load()[1]
        if self.vocabulary is not None and self.vocabulary < known:
            what = f"the model knows {self.vocabulary} tokens, and {self.tokenizer or 'a byte'} has {known}"
            raise DataError(f"task.vocabulary: {what}; raise it, or leave it out")
        return self.vocabulary or known


# --- the model ------------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Maps tokens, shape (b, t) with t at most ``context``, to logits of the next, shape (b, t, ``vocabulary``)."""

    def __init__(self, config: TransformerConfig, context: int, vocabulary: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, config.width)
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
        self.mlp = FeedForward(config)

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


class FeedForward(nn.Module):
    """width → 4·width → width."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.project = nn.Linear(4 * config.width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape (b, t, width) to the same."""
        return self.project(F.gelu(self.expand(hidden)))
