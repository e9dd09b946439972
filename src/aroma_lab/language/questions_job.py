"""A commonsense task of an experiment: a language model that learns answers, scored on whole sets of questions."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aroma.errors import DataError

from ..specs import ModelSpec
from ..tasks.metrics import METRICS
from ..tasks.spec import HELD_OUT, TaskSpec
from ..training.job import Objective, Prediction
from .commonsense import Question, load_questions
from .evaluate import QuestionEvaluation, evaluate_questions
from .examples import Conversation, load_conversations
from .job import LanguageJob, hold_out, load_joined
from .spec import LanguageSpec

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class QuestionsJob:
    """See `Job`, whose methods it has.

    Args:
        learning: What is trained on, and the held-out examples as conversations.
        questions: Questions by split: the held-out ones, then each set that is reported.
        metric: Name of the metric that is the score.
    """

    learning: LanguageJob
    questions: Mapping[str, Sequence[Question]]
    metric: str

    @classmethod
    def of_task(cls, spec: TaskSpec, model: ModelSpec, batch_size: int, *, reported: bool = True) -> QuestionsJob:
        """Read the examples of a task of kind `commonsense`.

        Args:
            spec: The task.
            model: The pretrained model.
            batch_size: Examples of one forward pass in evaluation.
            reported: Whether the reported sets are read; False: not one of their files is opened.

        Raises:
            ConfigError: A metric that does not exist, or a tokenizer that cannot be loaded.
            DataError: Examples that cannot be used, or reported questions that are trained on.
        """
        metric = _metric(spec)
        language = LanguageSpec(template=spec.template)
        files = _in_source(spec, spec.train or "train.jsonl")
        conversations = load_joined(load_conversations, spec.field("train"), files, language)
        asked = load_joined(load_questions, spec.field("train"), files, language)
        train, held_out = hold_out(
            list(zip(conversations, asked, strict=True)), spec.held_out, spec.split_seed, spec.field("held_out")
        )
        train, held_out = _draw(spec, "train_examples", train), _draw(spec, "held_out_examples", held_out)
        questions: dict[str, Sequence[Question]] = {HELD_OUT: [question for _, question in held_out]}
        for label, file in (spec.reported or {}).items() if reported else ():
            key = f"reported.{label}"
            questions[label] = load_joined(load_questions, spec.field(key), _in_source(spec, file), language)
            _refuse_trained_on(spec, key, file, questions[label], asked)
        parts: dict[str, Sequence[Conversation]] = {
            "train": [conversation for conversation, _ in train],
            HELD_OUT: [conversation for conversation, _ in held_out],
        }
        return cls(LanguageJob.make(model, language, spec.max_length, batch_size, parts), questions, metric)

    @property
    def objective(self) -> Objective:
        """What the Trainer makes of the encoded examples; a checkpoint is chosen by the held-out loss."""
        return replace(self.learning.objective, choice=f"{HELD_OUT}_loss")

    @property
    def train(self) -> Dataset:
        """The training rows."""
        return self.learning.train

    @property
    def eval_sets(self) -> dict[str, Dataset]:
        """The held-out rows: of the way the loss is known, answers are ranked at the end."""
        return self.learning.eval_sets

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The held-out questions, and every set that is reported."""
        return tuple(self.questions)

    @property
    def examples(self) -> dict[str, int]:
        """Numbers of examples by split."""
        return {**self.learning.examples, **{split: len(part) for split, part in self.questions.items()}}

    @property
    def notes(self) -> tuple[str, ...]:
        """What was cut or left out of the training rows."""
        return self.learning.notes

    def load_model(self) -> Any:
        """Return the pretrained model."""
        return self.learning.load_model()

    def predict(self, trainer: Any, split: str) -> Prediction:
        """Return how many questions of a split are answered rightly, and the loss of the right answers.

        Answers are written only where they are the score: it takes many times as long as to rank them.
        """
        ranked = self._evaluate(trainer, split, "likelihood")
        assert ranked.loss is not None, "likelihood has one"
        if self.metric != "generated":
            return Prediction(ranked.metrics, ranked.loss)
        written = self._evaluate(trainer, split, "generation")
        unparseable = written.unparseable / written.examples
        return Prediction({**ranked.metrics, **written.metrics, "unparseable": unparseable}, ranked.loss)

    def describe(self, model: Any, adapter: Path) -> None:
        """Write tokenizer and task into the folder of an adapter."""
        self.learning.describe(model, adapter)

    def _evaluate(self, trainer: Any, split: str, method: Literal["likelihood", "generation"]) -> QuestionEvaluation:
        return evaluate_questions(
            trainer.model,
            self.learning.builder,
            self.learning.tokenizer,
            self.questions[split],
            method,
            batch_size=self.learning.batch_size,
            max_length=self.learning.max_length,
        )


def _in_source(spec: TaskSpec, files: str) -> str:
    """Return the paths of files in the task's folder; `+` joins several."""
    return "+".join(str(Path(spec.source or "") / file) for file in files.split("+"))


def _metric(spec: TaskSpec) -> str:
    metric = spec.metric or METRICS["commonsense"][0]
    if metric not in METRICS["commonsense"]:
        raise spec.bad("metric", metric, f"no metric of commonsense; give {', '.join(METRICS['commonsense'])}")
    return metric


def _draw(spec: TaskSpec, key: str, examples: list[Any]) -> list[Any]:
    """Return as many of the examples as the task's `key` says, in their order."""
    wanted = getattr(spec, key)
    if wanted is None:
        return examples
    if wanted > len(examples):
        raise spec.bad(key, wanted, f"there are {len(examples)}; give at most so many, or null", DataError)
    return [examples[i] for i in sorted(random.Random(spec.split_seed).sample(range(len(examples)), wanted))]


def _refuse_trained_on(
    spec: TaskSpec, key: str, file: str, reported: Sequence[Question], trained: Sequence[Question]
) -> None:
    """Refuse a reported set that is a part of the training examples under another name."""
    if set(reported) <= set(trained):
        remedy = "every question of it is a training example too; report questions that are not trained on"
        raise spec.bad(key, file, remedy, DataError)
