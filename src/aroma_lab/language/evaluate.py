"""Language models against whole sets of commonsense questions, each asked once: by likelihood or by generation."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lm_eval.models.huggingface import HFLM

from aroma.errors import DataError, NonFiniteError, bad_value

from .data import Question
from .generate import generate_batch
from .model import LoadedModel, positions_of
from .template import Template

Scoring = Literal["likelihood", "generation"]

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model it is given is a model


@dataclass(frozen=True)
class RankedAnswer:
    """The candidates of a question by their likelihood; of equals, the first is chosen."""

    answer: str
    """The right label."""
    chosen: str
    """The most likely label."""
    chosen_normalised: str
    """The most likely label by mean over its tokens."""
    chosen_per_character: str
    """The most likely label by mean over its characters, as lm-evaluation-harness' acc_norm."""
    log_probs: dict[str, float]
    """ln p of each label, a sum over its tokens, given the prompt and what every response begins with."""
    tokens: dict[str, int]
    """Number of tokens by label."""


@dataclass(frozen=True)
class WrittenAnswer:
    """What a model writes."""

    answer: str
    """The right label."""
    chosen: str | None
    """The label that the text gives; None where it gives none in the form asked for."""
    text: str
    finished: bool
    """Whether it ended by itself, not at the limit."""


@dataclass(frozen=True)
class QuestionEvaluation:
    """The result on one set.

    Args:
        metrics: Shares of right answers over all questions: `accuracy`, `accuracy_normalised` and
            `accuracy_per_character` by likelihood; `generated` by generation, where an answer that cannot be read is
            a wrong one.
        predictions: One a question, in their order.
        cut_prompts: Questions that lost tokens on the left to fit.
        loss: Mean negative log-likelihood of the right label, in nats a question; None by generation.
        unparseable: Generated answers that cannot be read.
        unfinished: Generated answers that ended at the limit of tokens.
    """

    metrics: dict[str, float]
    predictions: tuple[RankedAnswer | WrittenAnswer, ...]
    cut_prompts: int
    loss: float | None = None
    unparseable: int = 0
    unfinished: int = 0

    @property
    def examples(self) -> int:
        """Number of questions."""
        return len(self.predictions)


def evaluate_questions(
    loaded: LoadedModel,
    questions: Sequence[Question],
    scoring: Scoring = "likelihood",
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    max_new_tokens: int = 32,
    advance: Callable[[int], None] = lambda done: None,
) -> QuestionEvaluation:
    """Ask a model every question once.

    Args:
        loaded: A causal language model; it runs where it is, in evaluation mode, and is left in its own.
        scoring: `"likelihood"` ranks the candidates, with lm-evaluation-harness; `"generation"` reads a greedily
            generated text (see `read_answer`).
        batch_size: Sequences of one forward pass.
        max_length: Most tokens of prompt and response, as in training; None: no limit.
        max_new_tokens: Most tokens of a generated answer; a prompt that leaves less room in the model is cut.
        advance: Called with numbers of questions just done.

    Raises:
        ConfigError: A batch size below 1, or answers that leave no room for prompts.
        DataError: No questions, or one that cannot be asked.
        NonFiniteError: A log-probability that is not a number.
    """
    if batch_size < 1:
        raise bad_value("batch_size", batch_size, "give 1 or more")
    if not questions:
        raise bad_value("questions", 0, "there is nothing to ask; give at least one", DataError)
    if scoring == "likelihood":
        return _by_likelihood(loaded, questions, batch_size, max_length, advance)
    return _by_generation(loaded, questions, batch_size, max_length, max_new_tokens, advance)


# Likelihood ----------------------------------------------------------------------------------------------------------


def _by_likelihood(
    loaded: LoadedModel,
    questions: Sequence[Question],
    batch_size: int,
    max_length: int | None,
    advance: Callable[[int], None],
) -> QuestionEvaluation:
    contexts, labels, cut = [], [], 0
    for question in questions:
        context, tokens = tokens_of(loaded.template, question)
        over = over_limit(loaded.template, question, max_length)
        contexts.append(loaded.template.shorten(context, len(context) - over))
        labels.append(tokens)
        cut += over > 0
    training = loaded.model.training
    try:
        log_probs = _log_probs(loaded, contexts, labels, batch_size, advance)
    finally:
        loaded.model.train(training)
    ranked = tuple(map(_ranked, questions, log_probs, labels))
    metrics = {
        "accuracy": _share(one.chosen == one.answer for one in ranked),
        "accuracy_normalised": _share(one.chosen_normalised == one.answer for one in ranked),
        "accuracy_per_character": _share(one.chosen_per_character == one.answer for one in ranked),
    }
    loss = -sum(one.log_probs[one.answer] for one in ranked) / len(ranked)
    return QuestionEvaluation(metrics, ranked, cut, loss)


def tokens_of(template: Template, question: Question) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of a question up to the label, and of each label: a row of training without its end.

    Raises:
        DataError: The tokenizer writes one candidate as another, or as the beginning of another.
    """
    given = template.continuation(question.lead)
    labels = [template.continuation(question.response_of(label))[len(given) :] for label in question.candidates]
    for one, label in enumerate(labels):
        if any(label == other[: len(label)] for number, other in enumerate(labels) if number != one):
            remedy = (
                "the tokenizer writes one of them as the beginning of another, so that their likelihoods cannot be "
                "compared; use generation"
            )
            raise bad_value("candidates", list(question.candidates), remedy, DataError)
    return [*template.prompt(question.turns), *given], labels


def _log_probs(
    loaded: LoadedModel,
    contexts: Sequence[list[int]],
    labels: Sequence[list[list[int]]],
    batch_size: int,
    advance: Callable[[int], None],
) -> list[tuple[float, ...]]:
    scorer = HFLM(
        pretrained=loaded.model,
        backend="causal",
        tokenizer=loaded.template.tokenizer,
        batch_size=batch_size,
        max_length=positions_of(loaded.model.config) or 2**31,
        softmax_dtype="float32",
    )
    # The longest first, so that what does not fit in memory fails at once.
    order = sorted(range(len(contexts)), key=lambda number: -len(contexts[number]))
    found: dict[int, tuple[float, ...]] = {}
    step = 8 * batch_size
    for start in range(0, len(order), step):
        chosen = order[start : start + step]
        requests = [(("", ""), contexts[number], label) for number in chosen for label in labels[number]]
        scores = iter(scorer._loglikelihood_tokens(requests, disable_tqdm=True))
        for number in chosen:
            found[number] = tuple(next(scores)[0] for _ in labels[number])
            if any(map(math.isnan, found[number])):
                remedy = "the model's logits are not numbers; try another dtype"
                raise bad_value("log_probs", math.nan, remedy, NonFiniteError)
        advance(len(chosen))
    return [found[number] for number in range(len(contexts))]


def over_limit(template: Template, question: Question, max_length: int | None) -> int:
    """Return how many tokens a prompt has too many for itself and the longest response to fit, as in training.

    Raises:
        DataError: The responses alone are longer than `max_length`.
    """
    if max_length is None:
        return 0
    longest = max(len(template.response(question.response_of(label))) for label in question.candidates)
    if max_length - longest < 2:  # one token and a beginning-of-text token
        raise bad_value("max_length", max_length, f"a response alone has {longest} tokens; give more", DataError)
    return max(0, len(template.prompt(question.turns)) + longest - max_length)


def _ranked(question: Question, log_probs: Sequence[float], labels: Sequence[Sequence[int]]) -> RankedAnswer:
    def likeliest(lengths: Sequence[int]) -> str:
        scores = [value / length for value, length in zip(log_probs, lengths, strict=True)]
        return question.candidates[scores.index(max(scores))]

    tokens = [len(label) for label in labels]
    return RankedAnswer(
        question.answer,
        likeliest([1] * len(tokens)),
        likeliest(tokens),
        likeliest([len(label) for label in question.candidates]),
        dict(zip(question.candidates, log_probs, strict=True)),
        dict(zip(question.candidates, tokens, strict=True)),
    )


# Generation ----------------------------------------------------------------------------------------------------------


def _by_generation(
    loaded: LoadedModel,
    questions: Sequence[Question],
    batch_size: int,
    max_length: int | None,
    max_new_tokens: int,
    advance: Callable[[int], None],
) -> QuestionEvaluation:
    template, positions = loaded.template, positions_of(loaded.model.config)
    wanted = len(template.lead) + max_new_tokens
    if positions is not None and positions - wanted < 2:  # one token and a beginning-of-text token
        raise bad_value("max_new_tokens", max_new_tokens, f"the model takes {positions} tokens in all; give fewer")
    prompts, cut = [], 0
    for question in questions:
        prompt, over = template.prompt(question.turns), over_limit(template, question, max_length)
        if positions is not None:
            over = max(over, len(prompt) + wanted - positions)
        prompts.append(template.shorten(prompt, len(prompt) - over))
        cut += over > 0
    said = generate_batch(loaded, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, advance=advance)
    written = tuple(
        WrittenAnswer(
            question.answer, read_answer(one.text, question.candidates, question.lead), one.text, one.finished
        )
        for question, one in zip(questions, said, strict=True)
    )
    return QuestionEvaluation(
        {"generated": _share(one.chosen == one.answer for one in written)},
        written,
        cut,
        unparseable=sum(one.chosen is None for one in written),
        unfinished=sum(not one.finished for one in written),
    )


def read_answer(text: str, candidates: Sequence[str], lead: str) -> str | None:
    """Return the label that a text answers with, or None where it does not clearly give one.

    Either the text begins with the lead and a label ("The correct answer is answer2.", followed by anything, unless
    the same line names another label), or the label is all that it says. A label that merely occurs somewhere does
    not count. Letter case, quotation marks and surrounding spaces do not matter.

    Args:
        lead: What a response says before the label; it may be empty.
    """
    by_case = {label.lower(): label for label in candidates}
    said = text.strip()
    one_of = "|".join(re.escape(label) for label in sorted(candidates, key=len, reverse=True))
    opening = r"\s+".join(map(re.escape, lead.split()))
    if opening:
        answer = re.match(rf"{opening}\s*:?\s*[\"'*(]*({one_of})(?!\w)(.*)", said, re.IGNORECASE)
        if answer is not None:
            named = {label.lower() for label in re.findall(rf"(?<!\w)({one_of})(?!\w)", answer[2], re.IGNORECASE)}
            return by_case[answer[1].lower()] if named <= {answer[1].lower()} else None
    alone = re.fullmatch(rf"[\"'*(]*({one_of})[\"'*).!]*", said, re.IGNORECASE)
    return None if alone is None else by_case[alone[1].lower()]


def _share(outcomes: Iterable[bool]) -> float:
    told = list(outcomes)
    return sum(told) / len(told)
