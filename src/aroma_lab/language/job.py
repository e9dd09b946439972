"""Language models as jobs for the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra

from ..specs import HELD_OUT, ModelSpec, TaskSpec
from ..tasks.data import held_apart, read_splits
from ..tasks.metrics import resolve_metric
from ..training.job import Job, Objective, Prediction
from .data import Example, Question, example_of, question_of
from .encode import Encoded, encode_rows
from .model import LanguageTask, LoadedModel, load_causal_lm, load_lm_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset


def language_job(spec: TaskSpec, model: ModelSpec, packing: bool = False, *, reported: bool = True) -> LanguageJob:
    """Return the job of a task of kind `causal_lm` or `commonsense`.

    Args:
        reported: Whether the reported splits are read.

    Raises:
        ConfigError: See `LanguageJob`.
        DataError: Examples that cannot be used.
    """
    asks, rows = spec.kind == "commonsense", read_splits(spec, reported)
    made: dict[str, list[Any]] = {
        split: [question_of(*row) if asks else example_of(*row, spec.text) for row in some]
        for split, some in rows.items()
    }
    parts, metric = held_apart(spec, made), resolve_metric(spec, spec.kind or "")
    if not asks:
        return LanguageJob(model, metric, spec.max_length, parts, packing)
    learned = {split: [one.example for one in parts[split]] for split in ("train", HELD_OUT)}
    questions = {split: part for split, part in parts.items() if split != "train"}
    return LanguageJob(model, metric, spec.max_length, learned, packing, questions)


@dataclass
class LanguageJob(Job):
    """A task for a language model.

    Args:
        metric: Name of the metric that is the score.
        max_length: Most tokens of an example, and of a packed row.
        parts: Examples by split: `train`, held out, reported.
        packing: Whether a row has several examples.
        questions: Of a task of kind `commonsense`, questions by split: the held-out ones, then each set that is
            reported. During training the loss of the held-out examples is measured; answers are ranked at the end.

    Raises:
        ConfigError: The model has no tokenizer that the examples can be written with, or TRL is not installed.
    """

    model: ModelSpec
    metric: str
    max_length: int
    parts: Mapping[str, Sequence[Example]]
    packing: bool = False
    questions: Mapping[str, Sequence[Question]] = field(default_factory=dict)

    tokenizer: Any = field(init=False)

    def __post_init__(self) -> None:
        require_extra("language")
        self.tokenizer = load_lm_tokenizer(self.model, self.max_length)

    @cached_property
    def objective(self) -> Objective:
        """What the Trainer makes of the encoded examples: the mean loss of the learned tokens of a step."""
        from .sft import MethodSFTTrainer, make_collator, sft_arguments, token_loss

        collator = make_collator(self.tokenizer, self.packing)
        return Objective(
            collator,
            self.tokenizer,
            None,
            f"{HELD_OUT}_loss",
            higher_is_better=False,
            counts_items=True,
            evaluate=lambda model, data, batch_size: token_loss(model, data, collator, batch_size),
            trainer_class=MethodSFTTrainer,
            arguments_class=sft_arguments,
        )

    @cached_property
    def train(self) -> Dataset:
        """The training rows."""
        return self._rows("train")

    @cached_property
    def eval_sets(self) -> dict[str, Dataset]:
        """The rows of all other splits."""
        return {split: self._rows(split) for split in self.parts if split != "train"}

    @property
    def evaluated(self) -> tuple[str, ...]:
        """All splits but that of training."""
        return tuple(self.questions or self.eval_sets)

    @property
    def examples(self) -> dict[str, int]:
        """Numbers of examples by split, without what was left out."""
        kept = {split: encoded.kept for split, encoded in self._encoded.items()}
        return {**kept, **{split: len(part) for split, part in self.questions.items()}}

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        """What was cut or left out, by split."""
        return tuple(f"{split}: {encoded.note}" for split, encoded in self._encoded.items())

    def load_model(self) -> Any:
        """Return the pretrained model; ConfigError if it cannot be loaded."""
        return load_causal_lm(self.model)

    def predict(self, trainer: Any, split: str) -> Prediction:
        """Return loss and perplexity of the learned tokens of a split, or the accuracy of its questions."""
        batch_size = trainer.args.per_device_eval_batch_size
        if not self.questions:
            assert self.objective.evaluate is not None
            measured = self.objective.evaluate(trainer.model, self.eval_sets[split], batch_size)
            return Prediction(measured, measured["loss"])
        from .evaluate import evaluate_questions

        loaded, asked = LoadedModel(trainer.model, self.tokenizer), self.questions[split]
        ranked = evaluate_questions(loaded, asked, batch_size=batch_size, max_length=self.max_length)
        return Prediction({"accuracy": ranked.accuracy}, ranked.loss)

    def describe(self, model: Any, adapter: Path) -> None:
        """Write task and tokenizer, with the chat template of the training, into the folder of an adapter."""
        self.tokenizer.save_pretrained(adapter)
        LanguageTask(self.max_length, self.model).save(adapter)

    @cached_property
    def _encoded(self) -> dict[str, Encoded]:
        return {
            split: encode_rows(part, self.tokenizer, self.max_length, f"data.{split}")
            for split, part in self.parts.items()
        }

    def _rows(self, split: str) -> Dataset:
        from datasets import Dataset

        rows = Dataset.from_dict(self._encoded[split].rows)
        if self.packing:
            from trl import pack_dataset

            return pack_dataset(rows, self.max_length, "bfd", {"batch_size": len(rows)})
        return rows
