"""Hugging Face causal LM: train or fine-tune any causal language model of transformers, whole or through LoRA.

Any model that ``AutoModelForCausalLM`` loads. The texts are those of ``text_lm``: files, a folder, a pattern, a URI, or
a column of Parquet files. Every tenth file is held out; with fewer than ten files, the last tenth. A sample is a window
of ``context`` + 1 tokens of the model's tokenizer.

Only what is trained is exchanged and saved: with ``lora``, the adapters. When the run is over, its directory has,
besides ``model.safetensors``, a folder ``export`` that ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer``
load; adapters are merged in it, and lie by themselves in ``export/adapter``.

Needs the optional extra: ``pip install '.[hf]'``. Every process loads the model; a ``model`` that is a folder must be
where the nodes are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import PositiveInt
from torch import Tensor, nn

from starling.actors.data.texts import TextSource, Windows
from starling.actors.tasks import hugging_face, supervised
from starling.actors.tasks.base import Task
from starling.actors.tasks.hugging_face import LoRA, ModelTokenizer


class HFCausalLM(Task, name="hf_causal_lm"):
    """Predict the next token."""

    model: str  # a folder, or a name on the hub
    pretrained: bool = True  # with its weights; false: freshly initialised, as its configuration says
    lora: LoRA | None = None  # train adapters alone; null: all of the model
    tokenizer: str | None = None  # a folder or a name; null: the model's own
    context: PositiveInt = 128  # tokens that the model sees
    corpus: str | None = None  # as in text_lm; null: the standard library's sources
    column: str | None = None  # of texts, if the files are Parquet
    validation: str | None = None  # held-out texts, in the same form; null: a tenth of the corpus
    max_bytes: PositiveInt = 8_000_000  # what is read of the corpus, both parts together

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
        """The model, with adapters if there are to be any."""
        hugging_face.check_context(self.model, self.context)
        return hugging_face.build("CAUSAL_LM", self.model, pretrained=self.pretrained, lora=self.lora, extra={})

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross-entropy of the next token, in nats."""
        return supervised.next_token_loss(*_predicted(module, batch))

    def metrics(self, module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Loss, and the fraction of tokens that are predicted."""
        return supervised.next_token_metrics(*_predicted(module, batch))

    def predictions(self, module: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Logits of every next token, shape (b · context, vocabulary), and the tokens."""
        logits, targets = _predicted(module, batch)
        return logits.flatten(0, 1), targets.flatten()

    def evaluation_batch_size(self, batch_size: int) -> int:
        return batch_size  # the model is large, and logits take 4 bytes for each token of the vocabulary

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Add the perplexity per token, e to the loss."""
        return supervised.with_perplexity(means)

    def export(self, module: nn.Module, folder: Path) -> bool:
        """Write model and tokenizer for ``from_pretrained``."""
        hugging_face.export(module, self.tokenizer or self.model, folder)
        return True

    @property
    def _source(self) -> TextSource:
        encoding = ModelTokenizer(self.tokenizer or self.model, self.model)
        return TextSource(self.corpus, self.column, self.validation, self.max_bytes, encoding, self.context + 1)


def _predicted(module: Any, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - transformers' own
    """Logits, shape (b, t, vocabulary), and the tokens that they are for, shape (b, t)."""
    (windows,) = batch
    return module(input_ids=windows[:, :-1], use_cache=False).logits, windows[:, 1:]
