"""Language models as jobs for the training loop: a recipe's examples, and a grid's tasks for them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra
from aroma.errors import DataError, bad_value

from ..specs import DataSpec, ModelSpec
from ..tasks.data import Articles, Source, find_source, recipe_sources, reported_splits
from ..tasks.spec import HELD_OUT, TaskSpec
from ..training.job import Objective, Prediction, TrainerKind
from .data import Example, Question, load_examples, load_questions
from .encode import Encoded, encode_rows
from .model import LanguageTask, LoadedModel, load_causal_lm, load_lm_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class LanguageJob:
    """A recipe of a language model, or a grid's task for one; it implements `Job`.

    Args:
        max_length: Most tokens of an example, and of a packed row.
        parts: Examples by split, `train` among them.
        packing: Whether a row has several examples.
        questions: Of a task of kind `commonsense`, questions by split: the held-out ones, then each set that is
            reported. During training the loss of the held-out examples is measured; answers are ranked at the end.

    Raises:
        ConfigError: The model has no tokenizer that the examples can be written with, or TRL is not installed.
    """

    model: ModelSpec
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
            "loss",
            higher_is_better=False,
            counts_items=True,
            evaluate=lambda model, data, batch_size: token_loss(model, data, collator, batch_size),
            trainer=TrainerKind(MethodSFTTrainer, sft_arguments),
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
    def notes(self) -> tuple[str, ...]:
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


def recipe_job(data: DataSpec, model: ModelSpec, packing: bool) -> LanguageJob:
    """Return the job of a recipe; without validation examples some of training's are held out.

    Raises:
        ConfigError: See `LanguageJob`.
        DataError: Data that cannot be used as described, or too few for a validation split.
    """
    text = None if data.text == "text" else data.text
    parts = {}
    for split, source in recipe_sources(data).items():
        hub = None if data.name is None else (data.name, data.config)
        parts[split] = load_examples(f"data.{split}", source, text, hub)
    if "validation" not in parts:
        key = "data.validation_fraction"
        train, held_out = hold_out(parts.pop("train"), data.validation_fraction, data.split_seed, key)
        parts = {"train": train, "validation": held_out, **parts}
    return LanguageJob(model, data.max_length, parts, packing=packing)


def task_job(spec: TaskSpec, model: ModelSpec, packing: bool, *, reported: bool = True) -> LanguageJob:
    """Return the job of a grid's task of kind `causal_lm` or `commonsense`.

    Args:
        reported: Whether the reported sets are read; False: none of their files is opened.

    Raises:
        ConfigError: See `LanguageJob`.
        DataError: Examples that cannot be used, or reported ones that are all trained on.
    """
    source = find_source(spec, None)
    trained = _examples_of(source, "train", source.train)
    train, held_out = hold_out(trained, spec.held_out, spec.split_seed, spec.field("held_out"))
    parts = {"train": _draw(spec, "train_examples", train), HELD_OUT: _draw(spec, "held_out_examples", held_out)}
    for label, split in reported_splits(spec, source).items() if reported else ():
        parts[label] = _examples_of(source, f"reported.{label}", split)
        if all(one in trained for one in parts[label]):
            remedy = "every example of it is a training example too; report examples that are not trained on"
            raise spec.bad(f"reported.{label}", split, remedy, DataError)
    if spec.kind == "causal_lm":
        return LanguageJob(model, spec.max_length, parts, packing=packing)
    questions = {split: parts[split] for split in parts if split != "train"}
    learnt = {split: [one.example for one in parts[split]] for split in ("train", HELD_OUT)}
    return LanguageJob(model, spec.max_length, learnt, packing=packing, questions=questions)


def hold_out(examples: Sequence[Any], fraction: float, seed: int, key: str) -> tuple[list[Any], list[Any]]:
    """Split examples in two: the same two for the same seed, each in the order of its source.

    Raises:
        DataError: There are too few.
    """
    from sklearn.model_selection import train_test_split

    try:
        kept, held_out = train_test_split(range(len(examples)), test_size=fraction, random_state=seed)
    except ValueError as error:
        remedy = f"{len(examples)} training examples cannot be split so ({error}); give more"
        raise bad_value(key, fraction, remedy, DataError) from error
    return [examples[i] for i in sorted(kept)], [examples[i] for i in sorted(held_out)]


def _examples_of(source: Source, key: str, split: str) -> list[Any]:
    """Read the examples, or the questions, of a split; in a folder, of files or splits that are joined by `+`."""
    spec = source.spec
    where, text = spec.field(key), spec.text
    if isinstance(source, Articles):
        return [Example(article.text, article.name) for article in source.articles(key, split)]
    if source.folder is None:
        return load_examples(where, split, text, (source.name, source.config))
    files = "+".join(source.locate(key, one) for one in split.split("+"))
    return load_questions(where, files) if spec.kind == "commonsense" else load_examples(where, files, text)


def _draw(spec: TaskSpec, key: str, examples: list[Any]) -> list[Any]:
    wanted = getattr(spec, key)
    if wanted is None:
        return examples
    if wanted > len(examples):
        raise spec.bad(key, wanted, f"there are {len(examples)}; give at most so many, or null", DataError)
    return [examples[i] for i in sorted(random.Random(spec.split_seed).sample(range(len(examples)), wanted))]
