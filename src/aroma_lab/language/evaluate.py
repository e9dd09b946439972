"""Language models against whole sets of commonsense questions, each asked once: by likelihood or by generation."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import yaml
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from aroma.errors import DataError, NonFiniteError, bad_value
from aroma.files import write_text

from ..progress import Progress, no_progress
from .data import Question, load_questions
from .generate import generate_batch, refuse_existing
from .inference import LoadedModel, load_for_inference, load_language_task
from .model import positions_of
from .template import QUESTION_FILE, Template

Scoring = Literal["likelihood", "generation"]

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model it is given is a model


@dataclass(frozen=True)
class RankedAnswer:
    """The candidates of a question by their likelihood.

    Args:
        answer: The right label.
        chosen: The most likely label; of equals, the first.
        chosen_normalised: The most likely label by mean over its tokens.
        chosen_per_character: The most likely label by mean over its characters, as lm-evaluation-harness' acc_norm.
        log_probs: Natural logarithm of the probability of each label, given the prompt and what every response begins
            with: a sum over its tokens.
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
        scoring: How the answers were found.
        metrics: Shares of right answers over all questions: `accuracy`, `accuracy_normalised` and
            `accuracy_per_character` by likelihood; `generated` by generation, where an answer that cannot be read is
            a wrong one.
        unparseable: Generated answers that cannot be read.
        unfinished: Generated answers that ended at the limit of tokens.
        cut_prompts: Questions that lost tokens on the left to fit.
        loss: Mean negative log-likelihood of the right label, in nats a question; None by generation.
        predictions: One a question, in their order.
    """

    scoring: Scoring
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


def evaluate_files(
    folder: str | os.PathLike[str],
    files: Mapping[str, str],
    scoring: Scoring = "likelihood",
    *,
    base_model: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    max_new_tokens: int = 32,
    limit: int | None = None,
    progress: Progress = no_progress,
) -> dict[str, QuestionEvaluation]:
    """Ask a language model all questions of files; every file is read before the model is.

    Args:
        folder: An adapter; a causal language model's folder; or `smollm2`, the packaged model.
        files: Paths by the name of the set.
        scoring: As in `evaluate_questions`.
        base_model: Folder or hub name of the base model; the adapter's own by default.
        batch_size: Sequences of one forward pass.
        max_length: Most tokens of prompt and response; as in training by default, else all that the model takes.
        max_new_tokens: Most tokens of a generated answer.
        limit: Ask the first so many of each file; None: all.
        progress: Announces the work on each set.

    Returns:
        The result by the name of the set.

    Raises:
        CheckpointError: The adapter is missing or damaged.
        ConfigError: The base model cannot be loaded or does not fit, or a limit out of range.
        DataError: A file cannot be used.
    """
    if limit is not None and limit < 1:
        raise bad_value("limit", limit, "give 1 or more")
    task = load_language_task(folder)
    sets = {name: load_questions("data", path, task.language)[:limit] for name, path in files.items()}
    loaded = load_for_inference(folder, base_model)
    positions = positions_of(loaded.model.config)
    if max_length is not None and positions is not None and max_length > positions:
        raise bad_value("max_length", max_length, f"the model takes at most {positions} tokens")
    if max_length is None:
        max_length = task.max_length or positions
    found = {}
    for name, questions in sets.items():
        with progress(name, len(questions)) as advance:
            found[name] = evaluate_questions(
                loaded,
                questions,
                scoring,
                batch_size=batch_size,
                max_length=max_length,
                max_new_tokens=max_new_tokens,
                advance=advance,
            )
    return found


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
        questions: The questions.
        scoring: `"likelihood"` ranks the candidates, with lm-evaluation-harness; `"generation"` reads a greedily
            generated text (see `read_answer`).
        batch_size: Sequences of one forward pass.
        max_length: Most tokens of prompt and response, as in training; None: no limit.
        max_new_tokens: Most tokens of a generated answer; a prompt that leaves less room in the model is cut.
        advance: Called with numbers of questions just done.

    Raises:
        ConfigError: An unknown scoring, a batch size below 1, or answers that leave no room for prompts.
        DataError: No questions, or one that cannot be asked.
        NonFiniteError: A log-probability that is not a number.
    """
    if scoring not in ("likelihood", "generation"):
        raise bad_value("method", scoring, "give likelihood or generation")
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
    template, training = loaded.template, loaded.model.training
    try:
        scorer = LikelihoodScorer(loaded, questions, batch_size)
        contexts, labels = zip(*(scorer.tokens_of(number) for number in range(len(questions))), strict=True)
        cut = [0 if max_length is None else over_limit(template, question, max_length) for question in questions]
        shortened = [template.shorten(ids, len(ids) - over) for ids, over in zip(contexts, cut, strict=True)]
        log_probs = scorer.log_probs(shortened, labels, advance)
    finally:
        loaded.model.train(training)
    ranked = tuple(map(_ranked, questions, log_probs, labels))
    return QuestionEvaluation(
        "likelihood",
        {
            "accuracy": _share(prediction.chosen == prediction.answer for prediction in ranked),
            "accuracy_normalised": _share(prediction.chosen_normalised == prediction.answer for prediction in ranked),
            "accuracy_per_character": _share(
                prediction.chosen_per_character == prediction.answer for prediction in ranked
            ),
        },
        unparseable=0,
        unfinished=0,
        cut_prompts=sum(map(bool, cut)),
        loss=-sum(prediction.log_probs[prediction.answer] for prediction in ranked) / len(ranked),
        predictions=ranked,
    )


class LikelihoodScorer(HFLM):
    """lm-evaluation-harness' language model, asked by the task of `QUESTION_FILE`.

    Args:
        loaded: The model, which is put into evaluation mode.
        questions: The questions.
        batch_size: Sequences of one forward pass.
    """

    def __init__(self, loaded: LoadedModel, questions: Sequence[Question], batch_size: int) -> None:
        super().__init__(
            pretrained=loaded.model,
            backend="causal",
            tokenizer=loaded.template.tokenizer,
            batch_size=batch_size,
            max_length=positions_of(loaded.model.config) or 2**31,
            softmax_dtype="float32",
            add_bos_token=False,  # the template writes it
        )
        self._questions, self._template = questions, loaded.template
        columns = Dataset.from_list([asdict(question) for question in questions])
        config = yaml.safe_load(QUESTION_FILE.read_text(encoding="utf-8"))
        self._task = ConfigurableTask(
            config={
                **config,
                "task": "commonsense",
                "metadata": None,
                "custom_dataset": lambda: {"test": columns},
                "doc_to_choice": "candidates",  # read and checked, also where the instruction does not list them
            }
        )

    def tokens_of(self, number: int) -> tuple[list[int], list[list[int]]]:
        """Return the tokens of a question up to the label, and of each label.

        Raises:
            DataError: The tokenizer writes one candidate as another, or as the beginning of another.
        """
        question = self._questions[number]
        lead = question.lead.rstrip()
        if lead:
            columns = asdict(question)
            text = self._task.fewshot_context(
                columns,
                0,
                system_instruction=self._template.spec.system,
                apply_chat_template=True,
                chat_template=self.apply_chat_template,
                gen_prefix=self._task.doc_to_prefix(columns),
            )
            pairs = [
                self._encode_pair(text, question.response_of(label)[len(lead) :]) for label in question.candidates
            ]
            context, labels = pairs[0][0], [label for _, label in pairs]
        else:  # lm-evaluation-harness would score the line end before the label, too
            given = self._template.continuation("")
            context = [*self._template.prompt(question.turns), *given]
            labels = [self._template.continuation(label)[len(given) :] for label in question.candidates]
        for one in range(len(labels)):
            for other in range(len(labels)):
                if one != other and labels[one] == labels[other][: len(labels[one])]:
                    remedy = (
                        "the tokenizer writes one of them as the beginning of another, so that their likelihoods "
                        "cannot be compared; use generation"
                    )
                    raise bad_value("candidates", list(question.candidates), remedy, DataError)
        return context, labels

    def log_probs(
        self, contexts: Sequence[list[int]], labels: Sequence[list[list[int]]], advance: Callable[[int], None]
    ) -> list[tuple[float, ...]]:
        """Return the log-probability of every label of every question.

        Args:
            contexts: Tokens up to the label, by question.
            labels: Tokens of each label, by question.
            advance: Called with numbers of questions just done.

        Raises:
            NonFiniteError: One of them is not a number.
        """
        # The longest first, so that what does not fit in memory fails at once.
        order = sorted(range(len(contexts)), key=lambda number: -len(contexts[number]))
        found: dict[int, tuple[float, ...]] = {}
        step = 8 * self.batch_size
        for start in range(0, len(order), step):
            chosen = order[start : start + step]
            requests = [(("", ""), contexts[number], label) for number in chosen for label in labels[number]]
            scores = iter(self._loglikelihood_tokens(requests, disable_tqdm=True))
            for number in chosen:
                found[number] = tuple(next(scores)[0] for _ in labels[number])
                if any(value != value for value in found[number]):
                    remedy = "the model's logits are not numbers; try another dtype"
                    raise bad_value("log_probs", float("nan"), remedy, NonFiniteError)
            advance(len(chosen))
        return [found[number] for number in range(len(contexts))]


def over_limit(template: Template, question: Question, max_length: int) -> int:
    """Return how many tokens a prompt has too many for itself and the longest response to fit, as in training.

    Raises:
        DataError: The responses alone are longer than `max_length`.
    """
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
    positions = positions_of(loaded.model.config)
    if positions is not None and positions - max_new_tokens < 2:  # one token and a beginning-of-text token
        raise bad_value("max_new_tokens", max_new_tokens, f"the model takes {positions} tokens in all; give fewer")
    prompts, cut = [], 0
    for question in questions:
        prompt = loaded.template.prompt(question.turns)
        over = 0 if max_length is None else over_limit(loaded.template, question, max_length)
        if positions is not None:
            over = max(over, len(prompt) + max_new_tokens - positions)
        prompts.append(loaded.template.shorten(prompt, len(prompt) - over))
        cut += over > 0
    generations = generate_batch(
        loaded, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, advance=advance
    )
    written = tuple(
        WrittenAnswer(
            question.answer, read_answer(said.text, question.candidates, question.lead), said.text, said.finished
        )
        for question, said in zip(questions, generations, strict=True)
    )
    return QuestionEvaluation(
        "generation",
        {"generated": _share(prediction.chosen == prediction.answer for prediction in written)},
        unparseable=sum(prediction.chosen is None for prediction in written),
        unfinished=sum(not prediction.finished for prediction in written),
        cut_prompts=cut,
        loss=None,
        predictions=written,
    )


def read_answer(text: str, candidates: Sequence[str], lead: str) -> str | None:
    """Return the label that a text answers with, or None where it does not clearly give one.

    Either the text begins with the lead and a label ("The correct answer is answer2.", followed by anything, unless
    the same line names another label), or the label is all that it says. A label that merely occurs somewhere does
    not count. Letter case, quotation marks and surrounding spaces do not matter.

    Args:
        text: What was generated.
        candidates: The labels.
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


# Results -------------------------------------------------------------------------------------------------------------


def average(evaluations: Mapping[str, QuestionEvaluation]) -> dict[str, float]:
    """Return each metric's mean over sets, every set of equal weight (Table 3)."""
    found = list(evaluations.values())
    return {name: sum(one.metrics[name] for one in found) / len(found) for name in found[0].metrics}


def write_predictions(path: str | os.PathLike[str], evaluations: Mapping[str, QuestionEvaluation]) -> None:
    """Write every prediction of every set as a JSON line with its `set`, and its number from 1 as `example`.

    Raises:
        DataError: The file exists.
    """
    refuse_existing("predictions", path)
    lines = [
        json.dumps({"set": name, "example": number, **asdict(prediction)}, ensure_ascii=False) + "\n"
        for name, evaluation in evaluations.items()
        for number, prediction in enumerate(evaluation.predictions, start=1)
    ]
    write_text(path, "".join(lines))


def _share(outcomes: Iterable[bool]) -> float:
    told = list(outcomes)
    return sum(told) / len(told)
