"""What a language model answered to sets of questions, and files of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from aroma.errors import DataError, bad_value
from aroma.files import write_text

Method = Literal["likelihood", "generation"]


@dataclass(frozen=True)
class RankedAnswer:
    """What a model finds most likely.

    Args:
        answer: The right label.
        chosen: The most likely label.
        chosen_normalised: The most likely label by mean over its tokens.
        chosen_per_character: The most likely label by mean over its characters.
        log_probs: Log-probability by label.
        tokens: Number of tokens by label.
    """

    answer: str
    chosen: str
    chosen_normalised: str
    chosen_per_character: str
    log_probs: dict[str, float]
    tokens: dict[str, int]


@dataclass(frozen=True)
class WrittenAnswer:
    """What a model writes.

    Args:
        answer: The right label.
        chosen: The label that the text gives; None where it gives none in the form asked for.
        text: What was generated.
        finished: Whether it ended by itself, not at the limit.
    """

    answer: str
    chosen: str | None
    text: str
    finished: bool


@dataclass(frozen=True)
class QuestionEvaluation:
    """The result on one set.

    Args:
        method: How the answers were found.
        metrics: Shares of right answers over all questions: `accuracy`, `accuracy_normalised` and
            `accuracy_per_character` by likelihood; `generated` by generation, where an answer that cannot be read is
            a wrong one.
        unparseable: Generated answers that cannot be read.
        unfinished: Generated answers that ended at the limit of tokens.
        cut_prompts: Questions that lost tokens on the left to fit.
        loss: Mean negative log-likelihood of the right label, in nats a question; None by generation.
        predictions: One a question, in their order.
    """

    method: Method
    metrics: dict[str, float]
    unparseable: int
    unfinished: int
    cut_prompts: int
    loss: float | None
    predictions: tuple[RankedAnswer | WrittenAnswer, ...]

    @property
    def examples(self) -> int:
        """Number of questions."""
        return len(self.predictions)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the metrics should know: answers that cannot be read, and questions that were cut."""
        counts = {
            "answers not in the form asked for, counted as wrong": self.unparseable,
            "answers that ended at the limit of tokens": self.unfinished,
            "questions cut from the left to fit": self.cut_prompts,
        }
        return tuple(f"{count} of {self.examples} {what}" for what, count in counts.items() if count)


def average(evaluations: Mapping[str, QuestionEvaluation]) -> dict[str, float]:
    """Return each metric's mean over sets, every set of equal weight (Table 3)."""
    found = list(evaluations.values())
    return {name: sum(one.metrics[name] for one in found) / len(found) for name in found[0].metrics}


def write_predictions(path: str | os.PathLike[str], evaluations: Mapping[str, QuestionEvaluation]) -> None:
    """Write every prediction of every set as a JSON line with its `set`, and its number from 1 as `example`.

    Raises:
        DataError: The file exists.
    """
    refuse_existing(path)
    lines = [
        json.dumps({"set": name, "example": number, **asdict(prediction)}, ensure_ascii=False) + "\n"
        for name, evaluation in evaluations.items()
        for number, prediction in enumerate(evaluation.predictions, start=1)
    ]
    write_text(path, "".join(lines))


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Raise if there is a file already where predictions are to be written.

    Raises:
        DataError: There is.
    """
    if Path(path).exists():
        raise bad_value("predictions", str(path), "it exists, and nothing is overwritten; give another", DataError)
