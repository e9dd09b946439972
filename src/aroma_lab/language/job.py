"""Language models as jobs for the training loop."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra
from aroma.errors import bad_value

from ..specs import HELD_OUT, ModelSpec, TaskSpec
from ..tasks.data import held_apart, read_splits
from ..tasks.metrics import resolve_metric
from ..tasks.task import Task, save_task
from ..training.job import Job, Prediction
from .data import Example, Question, examples_of, questions_of
from .encode import NOT_LEARNED, encode_rows
from .model import LoadedModel, load_causal_lm, load_lm_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset


class LanguageJob(Job):
    """A task of kind `causal_lm` or `commonsense`.

    Of `commonsense`, the loss of the held-out examples is measured during training; at the end, the labels of the
    held-out questions and of each set that is reported are ranked.

    Args:
        packing: Whether a row has several examples.
        reported: Whether the reported splits are read.

    Raises:
        ConfigError: The model has no tokenizer that the examples can be written with, or TRL is not installed.
        DataError: Examples that cannot be used.
    """

    chosen_by = "loss"
    counts_items = True

    def __init__(self, spec: TaskSpec, model: ModelSpec, packing: bool = False, *, reported: bool = True) -> None:
        require_extra("language")
        from trl import SFTConfig

        from .sft import MethodSFTTrainer, make_collator

        asks = spec.kind == "commonsense"
        read: Any = questions_of if asks else partial(examples_of, text=spec.text)
        made: dict[str, list[Any]] = read_splits(spec, read, reported)
        self.parts = held_apart(spec, made)
        self.questions: dict[str, list[Question]] = self.parts if asks else {}
        self.model, self.max_length = model, spec.max_length
        self.metric, self.evaluated = resolve_metric(spec, spec.kind or ""), tuple(self.parts)[1:]
        self.tokenizer = load_lm_tokenizer(model, spec.max_length)
        prepared: dict[str, Any] = {"packing": False, "max_length": None}
        prepared["dataset_kwargs"] = {"skip_prepare_dataset": True}
        self.trainer_class, self.arguments_class = MethodSFTTrainer, partial(SFTConfig, **prepared)
        self.collator = make_collator(self.tokenizer, packing)
        learned: dict[str, list[Example]] = self.parts
        if asks:
            learned = {split: [one.example for one in self.parts[split]] for split in ("train", HELD_OUT)}
        if self.metric == "chrf" and any(isinstance(one.content, str) for part in learned.values() for one in part):
            remedy = "it compares responses, and these are plain texts; give chats, or leave the metric out"
            raise bad_value("data.metric", self.metric, remedy)
        encoded = {
            split: encode_rows(part, self.tokenizer, spec.max_length, f"data.{split}")
            for split, part in learned.items()
        }
        self.rows = {split: _as_data(one.rows, spec.max_length if packing else None) for split, one in encoded.items()}
        self.notes = tuple(f"{split}: {one.note}" for split, one in encoded.items())
        self.examples = {split: len(part) for split, part in self.parts.items()}
        self.examples |= {split: one.kept for split, one in encoded.items() if split == "train" or not asks}

    def load_model(self) -> Any:
        """Return the pretrained model; ConfigError if it cannot be loaded."""
        return load_causal_lm(self.model)

    def measure(self, model: Any, rows: Dataset, batch_size: int) -> Prediction:
        """Return loss and perplexity of the learned tokens of rows."""
        from .sft import token_loss

        measured = token_loss(model, rows, self.collator, batch_size)
        return Prediction(measured, measured["loss"])

    def predict(self, model: Any, split: str, batch_size: int) -> Prediction:
        """Return loss and perplexity of the learned tokens of a split, or the accuracy of its questions.

        Of plain texts also `bits_per_byte`, which tokenizers have in common: -log2 p of all learned tokens over the
        bytes of the texts in UTF-8. Where the score is chrF, responses are generated.
        """
        from .evaluate import chrf_of, evaluate_questions

        loaded = LoadedModel(model, self.tokenizer)
        if not self.questions:
            metrics, loss = super().predict(model, split, batch_size)
            texts = [one.content for one in self.parts[split] if isinstance(one.content, str)]
            if len(texts) == len(self.parts[split]):
                learned = sum(label != NOT_LEARNED for row in self.rows[split]["labels"] for label in row)
                metrics["bits_per_byte"] = loss * learned / math.log(2) / len("".join(texts).encode())
            if self.metric == "chrf":
                sizes = {"batch_size": batch_size, "max_length": self.max_length}
                metrics["chrf"] = chrf_of(loaded, [one.content for one in self.parts[split]], **sizes)
            return Prediction(metrics, loss)
        questions = self.questions[split]
        ranked = evaluate_questions(loaded, questions, batch_size=batch_size, max_length=self.max_length)
        return Prediction({"accuracy": ranked.accuracy}, ranked.loss)

    def describe(self, adapter: Path) -> None:
        """Write task and tokenizer, with the chat template of the training, into the folder of an adapter."""
        self.tokenizer.save_pretrained(adapter)
        save_task(Task("causal_lm", max_length=self.max_length, model=self.model), adapter)


def _as_data(rows: dict[str, list[list[int]]], most: int | None) -> Dataset:
    """Return rows for the Trainer, several in one of at most `most` tokens where that is given."""
    from datasets import Dataset

    data = Dataset.from_dict(rows)
    if most is None:
        return data
    from trl import pack_dataset

    return pack_dataset(data, most, "bfd", {"batch_size": len(data)})
