"""Language models against whole sets of commonsense questions, each asked once: by likelihood or by generation."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aroma.errors import NonFiniteError, bad_value

from .data import Question
from .generate import generate_batch
from .model import LoadedModel, positions_of

Scoring = Literal["likelihood", "generation"]

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model it is given is a model


@dataclass(frozen=True)
class QuestionEvaluation:
    """The result on one set."""

    metrics: dict[str, float]
    """Shares of all questions: `accuracy` by likelihood; `generated` by generation, and `unparseable`, the answers
    that cannot be read, which are wrong."""
    predictions: list[dict[str, Any]]
    """Of every question the right `answer`, what was `chosen`, and `log_probs` by label or the text."""
    loss: float | None = None
    """Mean negative log-likelihood of the right label, in nats a question; None by generation."""


def evaluate_questions(
    loaded: LoadedModel,
    questions: Sequence[Question],
    scoring: Scoring = "likelihood",
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    max_new_tokens: int = 32,
    progress: bool = False,
) -> QuestionEvaluation:
    """Ask a model every question once, with the prompts of training.

    Args:
        loaded: A causal language model; it runs where it is, in evaluation mode, and is left in its own.
        scoring: `"likelihood"` ranks the labels by lm-evaluation-harness; `"generation"` reads a greedily generated
            text, see `read_answer`.
        batch_size: Sequences of one forward pass.
        max_length: Most tokens of prompt and label, the left of longer ones is cut; None: what the model takes.
        max_new_tokens: Most tokens of a generated answer.
        progress: Whether lm-evaluation-harness shows its bars.

    Raises:
        ConfigError: A batch size below 1.
        DataError: A question that cannot be asked.
        NonFiniteError: A log-probability that is not a number.
    """
    if batch_size < 1:
        raise bad_value("batch_size", batch_size, "give 1 or more")
    if scoring == "generation":
        return _by_generation(loaded, questions, batch_size, max_new_tokens)
    training = loaded.model.training
    try:
        scores = _log_probs(loaded, questions, batch_size, max_length, progress)
    finally:
        loaded.model.train(training)
    rows: list[dict[str, Any]] = []
    for question, log_probs in zip(questions, scores, strict=True):
        if any(map(math.isnan, log_probs.values())):
            raise bad_value("log_probs", math.nan, "the model's logits are NaN; try another dtype", NonFiniteError)
        chosen = max(log_probs, key=lambda label: log_probs[label])
        rows.append({"answer": question.answer, "chosen": chosen, "log_probs": log_probs})
    loss = -sum(row["log_probs"][row["answer"]] for row in rows) / len(rows)
    return QuestionEvaluation({"accuracy": _accuracy(rows)}, rows, loss)


def _log_probs(
    loaded: LoadedModel, questions: Sequence[Question], batch_size: int, max_length: int | None, progress: bool
) -> list[dict[str, float]]:
    """Return ln p of each label of each question, given the prompt and what every response begins with."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    scorer = HFLM(
        pretrained=loaded.model,
        backend="causal",
        tokenizer=loaded.tokenizer,
        batch_size=batch_size,
        max_length=max_length or positions_of(loaded.model.config) or 2**31,
        softmax_dtype="float32",
        add_bos_token=False,  # a chat template writes it
    )
    requests = []
    for question in questions:
        lead = question.lead.rstrip()
        begun = [{"role": "assistant", "content": lead}] if lead else []
        context = scorer.apply_chat_template([*question.asked, *begun], add_generation_prompt=not lead)
        texts = [f"{question.lead[len(lead) :]}{label}" for label in question.candidates]
        requests += [Instance("loglikelihood", {}, (context, text), 0) for text in texts]
    scores = iter(scorer.loglikelihood(requests, disable_tqdm=not progress))
    return [{label: next(scores)[0] for label in question.candidates} for question in questions]


def _by_generation(
    loaded: LoadedModel, questions: Sequence[Question], batch_size: int, max_new_tokens: int
) -> QuestionEvaluation:
    chats = [question.asked for question in questions]
    rows = []
    for question, said in zip(
        questions, generate_batch(loaded, chats, max_new_tokens=max_new_tokens, batch_size=batch_size), strict=True
    ):
        chosen = read_answer(said.text, question.candidates, question.lead)
        rows.append({"answer": question.answer, "chosen": chosen, **said._asdict()})
    unparseable = sum(row["chosen"] is None for row in rows) / len(rows)
    return QuestionEvaluation({"generated": _accuracy(rows), "unparseable": unparseable}, rows)


def read_answer(text: str, candidates: Sequence[str], lead: str) -> str | None:
    """Return the label that a text gives after `lead`, or as all that it says; else None. Letter case does not matter.

    A label that merely occurs somewhere does not count, nor one with another in its line; what a model thinks before
    it answers is not read.
    """
    said = text.rpartition("</think>")[2].strip()
    label = "|".join(re.escape(label) for label in sorted(candidates, key=len, reverse=True))
    opening = r"\s+".join(map(re.escape, lead.split()))
    found = re.match(rf"{opening}\s*:?\s*[\"'*(]*({label})(?!\w)(.*)", said, re.IGNORECASE) if opening else None
    found = found or re.fullmatch(rf"[\"'*(]*({label})([\"'*).!]*)", said, re.IGNORECASE)
    if found is None:
        return None
    named = {found[1].lower(), *map(str.lower, re.findall(rf"(?<!\w)(?:{label})(?!\w)", found[2], re.IGNORECASE))}
    return next(one for one in candidates if one.lower() in named) if len(named) == 1 else None


def _accuracy(rows: Sequence[dict[str, Any]]) -> float:
    return float(sum(row["chosen"] == row["answer"] for row in rows) / len(rows))
