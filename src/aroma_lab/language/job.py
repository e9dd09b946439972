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

from ..specs import DataSpec, LanguageSpec, ModelSpec
from ..tasks.data import Articles, Source, find_source, recipe_sources, reported_splits
from ..tasks.metrics import language_metric
from ..tasks.spec import HELD_OUT, TaskSpec
from ..training.job import Objective, Prediction, TrainerKind
from .data import (
    EncodeReport,
    Example,
    Question,
    encode,
    load_examples,
    load_hub_examples,
    load_joined,
    load_questions,
)
from .model import LanguageTask, LoadedModel, fingerprint_of, load_causal_lm, load_lm_tokenizer
from .template import Template, Turn

if TYPE_CHECKING:
    from datasets import Dataset

    from .evaluate import QuestionEvaluation, Scoring


@dataclass
class LanguageJob:
    """A recipe of a language model, or a grid's task of kind `causal_lm`; it implements `Job`.

    Args:
        max_length: Most tokens of an example, and of a packed row.
        parts: Examples by split, `train` among them.
        template: Makes the tokens.
    """

    model: ModelSpec
    max_length: int
    parts: Mapping[str, Sequence[Example]]
    template: Template
    _fingerprint: str | None = field(default=None, init=False)

    @classmethod
    def make(
        cls, model: ModelSpec, language: LanguageSpec, max_length: int, parts: Mapping[str, Sequence[Example]]
    ) -> LanguageJob:
        """Return the job, with the model's tokenizer.

        Raises:
            ConfigError: There is no such tokenizer, it lacks what the examples need, or TRL is not installed.
        """
        require_extra("language")
        return cls(model, max_length, parts, Template(load_lm_tokenizer(model, max_length), language))

    @classmethod
    def of_texts(cls, spec: TaskSpec, model: ModelSpec, *, reported: bool = True) -> LanguageJob:
        """Read the examples of a task of kind `causal_lm`.

        Args:
            reported: Whether the reported sets are read; False: none of their files is opened.

        Raises:
            ConfigError: A tokenizer that cannot be loaded, or a package that is missing.
            DataError: Examples that cannot be used, or reported ones that are all trained on.
        """
        require_extra("language")
        language = LanguageSpec(
            format="auto" if spec.text is None else "text", text=spec.text or "text", template=spec.template
        )
        source = find_source(spec, None)
        trained = _examples_of(source, "train", source.train, language)
        train, held_out = hold_out(trained, spec.held_out, spec.split_seed, spec.field("held_out"))
        parts = {
            "train": _draw(spec, "train_examples", train),
            HELD_OUT: _draw(spec, "held_out_examples", held_out),
        }
        for label, split in reported_splits(spec, source).items() if reported else ():
            parts[label] = _examples_of(source, f"reported.{label}", split, language)
            _refuse_trained(spec, label, split, parts[label], trained)
        return cls.make(model, language, spec.max_length, parts)

    @cached_property
    def objective(self) -> Objective:
        """What the Trainer makes of the encoded examples: the mean loss of the learned tokens of a step."""
        from .sft import MethodSFTTrainer, make_collator, sft_arguments, token_loss

        collator = make_collator(self.template.tokenizer, self.template.spec.packing)
        return Objective(
            collator,
            self.template.tokenizer,
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
        return tuple(split for split in self.parts if split != "train")

    @property
    def examples(self) -> dict[str, int]:
        """Numbers of examples by split, without what was left out."""
        return {split: report.kept for split, (_, report) in self._encoded.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What was cut or left out, by split."""
        return tuple(f"{split}: {report}" for split, (_, report) in self._encoded.items())

    def load_model(self) -> Any:
        """Return the pretrained model.

        Raises:
            ConfigError: It cannot be loaded, or it cannot keep packed examples apart.
        """
        model = load_causal_lm(self.model)
        if self.template.spec.packing:
            from .sft import require_packing_works

            require_packing_works(model)
        self._fingerprint = fingerprint_of(model)  # now: ReLoRA adds to the weights, and its adapter is for these
        return model

    def predict(self, trainer: Any, split: str) -> Prediction:
        """Return loss and perplexity of the learned tokens of a split."""
        assert self.objective.evaluate is not None
        measured = self.objective.evaluate(
            trainer.model, self.eval_sets[split], trainer.args.per_device_eval_batch_size
        )
        return Prediction(measured, measured["loss"])

    def describe(self, model: Any, adapter: Path) -> None:
        """Write task and tokenizer, with the chat template of the training, into the folder of an adapter."""
        self.template.tokenizer.save_pretrained(adapter)
        LanguageTask(self.template.spec, self.max_length, self.model, self._fingerprint).save(adapter)

    @cached_property
    def _encoded(self) -> dict[str, tuple[Dataset, EncodeReport]]:
        return {
            split: encode(part, self.template, self.max_length, f"data.{split}") for split, part in self.parts.items()
        }

    def _rows(self, split: str) -> Dataset:
        rows, _ = self._encoded[split]
        if not self.template.spec.packing:
            return rows
        from .sft import pack

        return pack(rows, self.max_length)


def read_parts(data: DataSpec, language: LanguageSpec) -> dict[str, list[Example]]:
    """Return the examples of a recipe by split; without validation examples some of training's are held out.

    Raises:
        DataError: Data that cannot be used as described, or too few for a validation split.
    """
    parts = {}
    for split, source in recipe_sources(data).items():
        if data.name is not None:
            parts[split] = load_hub_examples(f"data.{split}", source, data.name, data.config, language)
        else:
            parts[split] = load_joined(load_examples, f"data.{split}", source, language)
    if "validation" not in parts:
        train, held_out = hold_out(
            parts["train"], data.validation_fraction, data.split_seed, "data.validation_fraction"
        )
        parts = {"train": train, "validation": held_out, **{split: parts[split] for split in parts if split == "test"}}
    return parts


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


# A grid's tasks ------------------------------------------------------------------------------------------------------


def _examples_of(source: Source, key: str, split: str, language: LanguageSpec) -> list[Example]:
    """Read a split of a task's source; in a folder, files or splits that are joined by `+`."""
    where = source.spec.field(key)
    if isinstance(source, Articles):
        return [Example((), article.text, article.name) for article in source.articles(key, split)]
    if source.folder is None:
        return load_hub_examples(where, split, source.name, source.config, language)
    return load_joined(load_examples, where, "+".join(source.locate(key, one) for one in split.split("+")), language)


def _refuse_trained(spec: TaskSpec, label: str, given: str, reported: Sequence[Any], trained: Sequence[Any]) -> None:
    if set(reported) <= set(trained):
        remedy = "every example of it is a training example too; report examples that are not trained on"
        raise spec.bad(f"reported.{label}", given, remedy, DataError)


def _draw(spec: TaskSpec, key: str, examples: list[Any]) -> list[Any]:
    wanted = getattr(spec, key)
    if wanted is None:
        return examples
    if wanted > len(examples):
        raise spec.bad(key, wanted, f"there are {len(examples)}; give at most so many, or null", DataError)
    return [examples[i] for i in sorted(random.Random(spec.split_seed).sample(range(len(examples)), wanted))]


# A commonsense task --------------------------------------------------------------------------------------------------


@dataclass
class QuestionsJob(LanguageJob):
    """A grid's task of kind `commonsense`: answers are learned, and scored on whole sets of questions.

    During training the loss of the held-out examples is measured; answers are ranked at the end.

    Args:
        questions: Questions by split: the held-out ones, then each set that is reported.
        metric: Name of the metric that is the score.
        batch_size: Sequences of one forward pass in evaluation.
    """

    questions: Mapping[str, Sequence[Question]]
    metric: str
    batch_size: int

    @classmethod
    def of_task(cls, spec: TaskSpec, model: ModelSpec, batch_size: int, *, reported: bool = True) -> QuestionsJob:
        """Read the examples of a task of kind `commonsense`.

        Args:
            batch_size: Sequences of one forward pass in evaluation.
            reported: Whether the reported sets are read; False: none of their files is opened.

        Raises:
            ConfigError: An unknown metric, a tokenizer that cannot be loaded, or a package that is missing.
            DataError: Examples that cannot be used, or reported questions that are trained on.
        """
        require_extra("language")
        metric = language_metric(spec)
        language = LanguageSpec(template=spec.template)

        def read(key: str, files: str) -> list[Question]:
            paths = "+".join(str(Path(spec.source or "") / file) for file in files.split("+"))
            return load_joined(load_questions, spec.field(key), paths, language)

        trained = read("train", spec.train or "train.jsonl")
        train, held_out = hold_out(trained, spec.held_out, spec.split_seed, spec.field("held_out"))
        train, held_out = _draw(spec, "train_examples", train), _draw(spec, "held_out_examples", held_out)
        questions = {HELD_OUT: held_out}
        for label, file in (spec.reported or {}).items() if reported else ():
            questions[label] = read(f"reported.{label}", file)
            _refuse_trained(spec, label, file, questions[label], trained)
        parts = {
            split: [Example((*one.turns, Turn("assistant", one.output))) for one in some]
            for split, some in (("train", train), (HELD_OUT, held_out))
        }
        template = Template(load_lm_tokenizer(model, spec.max_length), language)
        return cls(model, spec.max_length, parts, template, questions, metric, batch_size)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The held-out questions, and every set that is reported."""
        return tuple(self.questions)

    @property
    def examples(self) -> dict[str, int]:
        """Numbers of examples by split."""
        return {**super().examples, **{split: len(part) for split, part in self.questions.items()}}

    def predict(self, trainer: Any, split: str) -> Prediction:
        """Return the share of questions of a split that are answered rightly, and the loss of the right answers.

        Answers are generated only where they are the score: that takes many times as long as ranking them.
        """
        ranked = self._evaluate(trainer, split, "likelihood")
        assert ranked.loss is not None, "likelihood has one"
        if self.metric != "generated":
            return Prediction(ranked.metrics, ranked.loss)
        written = self._evaluate(trainer, split, "generation")
        unparseable = written.unparseable / written.examples
        return Prediction({**ranked.metrics, **written.metrics, "unparseable": unparseable}, ranked.loss)

    def _evaluate(self, trainer: Any, split: str, scoring: Scoring) -> QuestionEvaluation:
        from .evaluate import evaluate_questions

        loaded, questions = LoadedModel(trainer.model, self.template), self.questions[split]
        return evaluate_questions(loaded, questions, scoring, batch_size=self.batch_size, max_length=self.max_length)
