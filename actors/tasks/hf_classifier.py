"""Hugging Face classifier: fine-tune any sequence classifier of transformers, whole or through LoRA.

Any model that ``AutoModelForSequenceClassification`` loads. The data are Parquet files with a column of texts and a
column of classes, whole numbers from 0 or texts. They are read, divided and held out as in the task ``parquet``. A text
is cut to ``context`` tokens of the model's tokenizer, and padded to them.

Only what is trained is exchanged and saved: with ``lora``, the adapters and the classifying head. After the run its
directory has ``model.safetensors`` and a folder ``export``. ``from_pretrained`` of
``AutoModelForSequenceClassification`` and ``AutoTokenizer`` loads the folder. Adapters are merged into the exported
model, and lie by themselves in ``export/adapter``.

Needs the optional extra: ``pip install '.[hf]'``. Every process loads the model; a ``model`` that is a folder must be
where the nodes are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from starling.actors.data import files, row_groups
from starling.actors.data.classes import Classes, ClassesField, find_classes
from starling.actors.data.columns import is_text, plain
from starling.actors.data.row_groups import RowGroup, RowGroupSamples, UnreadableError, open_row_groups
from starling.actors.tasks import hugging_face, supervised
from starling.actors.tasks.base import Task
from starling.actors.tasks.hugging_face import LoRA
from starling.algorithms.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


class HFClassifier(Task, name="hf_classifier"):
    """Classify texts."""

    model: str  # a folder, or a name on the hub
    path: str  # of the training data, Parquet: a file, folder, pattern or URI
    text: str = "text"  # the column of texts
    label: str = "label"  # the column of classes
    validation: str | None = None  # held-out data; null: a tenth of the training data
    classes: ClassesField = None  # how many, or their names; null: the largest number plus one, or the texts there are
    pretrained: bool = True  # with its weights; false: freshly initialised, as its configuration says
    lora: LoRA | None = None  # train adapters and the head alone; null: all of the model
    tokenizer: str | None = None  # a folder or a name; null: the model's own
    context: PositiveInt = 128  # tokens of a text that the model sees
    mix_row_groups: PositiveInt = 4  # how many an epoch shuffles together
    memory_mb: PositiveInt = 64  # of tokenized rows that a node keeps, in 10⁶ bytes
    on_bad_row_group: Literal["stop", "skip"] = "stop"  # if one cannot be read: end the run, or leave it out

    def train_samples(self, num_nodes: int) -> RowGroupSamples:
        """The rows that are not held out."""
        files.refuse_per_node("task.path", self.path)
        groups = open_row_groups("task.path", self.path)[1]
        groups = groups if self.validation is not None else row_groups.held_out(groups)[0]
        return self._samples("task.path", self.path, groups, whole=len(groups) >= 2 * num_nodes)

    def own_samples(self, node: int, num_nodes: int) -> RowGroupSamples | None:
        """The rows of the node's own file or folder."""
        if not files.is_per_node(self.path):
            return None
        path = files.of_node(self.path, node)
        return self._samples("task.path", path, open_row_groups("task.path", path)[1], whole=True)

    def validation_samples(self, num_nodes: int) -> RowGroupSamples:
        """The held-out rows."""
        key, path = ("task.path", self.path) if self.validation is None else ("task.validation", self.validation)
        if files.is_per_node(path):
            files.require_common("task.validation", self.validation)
        groups = open_row_groups(key, path)[1]
        groups = groups if self.validation is not None else row_groups.held_out(groups)[1]
        if not groups:
            raise DataError(f"task.path: {path} has too few rows to hold out a tenth; name task.validation")
        return self._samples(key, path, groups, whole=False)

    def build(self) -> nn.Module:
        """The model, with a head for the classes, and with adapters if there are to be any."""
        hugging_face.check_context(self.model, self.context)
        # Models that look at the last token of a text have to know which ones pad it.
        classes = self.found_classes
        extra: dict[str, Any] = {"num_labels": classes.count, "pad_token_id": self.load_tokenizer().pad_token_id}
        if classes.names is not None:
            extra |= {"id2label": dict(enumerate(classes.names))}
            extra |= {"label2id": {name: number for number, name in extra["id2label"].items()}}
        return hugging_face.build("SEQ_CLS", self.model, pretrained=self.pretrained, lora=self.lora, extra=extra)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross-entropy, in nats."""
        return supervised.classification_loss(*self.predictions(module, batch))

    def metrics(self, module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Loss and accuracy."""
        return supervised.classification_metrics(*self.predictions(module, batch))

    def predictions(self, module: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Logits, shape (b, classes), and classes."""
        tokens, mask, labels = batch
        answer: Any = module(input_ids=tokens.long(), attention_mask=mask.long())
        return answer.logits, labels

    def evaluation_batch_size(self, batch_size: int) -> int:
        return batch_size  # the model is large

    def export(self, module: nn.Module, folder: Path) -> bool:
        """Write model and tokenizer for ``from_pretrained``."""
        hugging_face.export(module, self.tokenizer or self.model, folder)
        return True

    @property
    def found_classes(self) -> Classes:
        """The classes, as they are named or found."""
        key, path = "task.path", self.path
        if files.is_per_node(path):
            key, path = "task.validation", files.require_common("task.validation", self.validation)
        return find_classes(key, path, self.label, self.classes, skip_bad=self.on_bad_row_group == "skip")

    def load_tokenizer(self) -> Any:  # noqa: ANN401 - transformers' own type
        """The tokenizer, which knows no token that the model does not."""
        name = self.tokenizer or self.model
        tokenizer = hugging_face.load_tokenizer(name)
        hugging_face.check_vocabulary(name, tokenizer, hugging_face.vocabulary(self.model))
        return tokenizer

    def _samples(self, key: str, path: str, groups: list[RowGroup], *, whole: bool) -> RowGroupSamples:
        schema = open_row_groups(key, path)[0]
        kind = row_groups.require_column("task.text", schema, self.text).type
        if not is_text(kind):
            raise DataError(f"task.text: column {self.text} is {kind}; it must hold texts (string)")
        row_groups.require_column("task.label", schema, self.label)
        if self.label == self.text:
            raise DataError(f"task.label: {self.label} is the column of texts; name the one of classes")
        decoder = _TokenDecoder(self)
        samples = RowGroupSamples(
            groups,
            decoder,
            label=decoder.labels,
            label_columns=(self.label,),
            memory_mb=self.memory_mb,
            mixed=self.mix_row_groups,
            whole=whole,
            skip_bad=self.on_bad_row_group == "skip",
        )
        samples.class_names = self.found_classes.names
        return samples


class _TokenDecoder:
    """Tokens, int32 of shape (r, context), which of them are of the text, uint8 of the same shape, and classes."""

    def __init__(self, task: HFClassifier) -> None:
        self._task = task
        self._classes = task.found_classes
        self.columns = (task.text, task.label)

    def __call__(self, table: pa.Table, place: str) -> tuple[Tensor, ...]:
        task = self._task
        column = table.column(task.text)
        if column.null_count:
            raise DataError(
                f"{place}: column {task.text} has {column.null_count} nulls; fill them, or leave those rows out"
            )
        try:
            texts: list[str] = plain(column).to_pylist()
        except UnicodeDecodeError:
            raise UnreadableError(f"{place}: column {task.text} has texts that are not UTF-8") from None
        found = task.load_tokenizer()(texts, truncation=True, max_length=task.context, padding="max_length")
        tokens = torch.from_numpy(np.array(found["input_ids"], dtype=np.int32))
        mask = torch.from_numpy(np.array(found["attention_mask"], dtype=np.uint8))
        return tokens, mask, self.labels(table, place)

    def labels(self, table: pa.Table, place: str) -> Tensor:
        """The classes."""
        return self._classes.of(table, self._task.label, place)
