"""A language model against whole sets of questions, each asked once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from aroma.errors import DataError, bad_value

from ..progress import Progress, no_progress
from .answers import extract
from .asked import prompt_of
from .commonsense import Question, load_questions
from .generate import generate_batch, open_adapter
from .likelihood import rank
from .model import positions_of
from .prompt import PromptBuilder
from .results import Method, QuestionEvaluation, RankedAnswer, WrittenAnswer
from .task import task_of


def evaluate_files(
    folder: str | os.PathLike[str],
    files: Mapping[str, str],
    method: Method = "likelihood",
    *,
    base_model: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    max_new_tokens: int = 32,
    limit: int | None = None,
    phase: Progress = no_progress,
) -> dict[str, QuestionEvaluation]:
    """Ask a language model all questions of files; every file is read before the model is.

    Args:
        folder: An adapter; a causal language model's folder; or `smollm2`, the model that comes with pip.
        files: Paths by the name of the set.
        method: As in `evaluate_questions`.
        base_model: Folder or hub name of the base model; the adapter's own by default.
        batch_size: Questions of one forward pass.
        max_length: Most tokens of prompt and response; as in training by default, else all that the model takes.
        max_new_tokens: Most tokens of a generated answer.
        limit: Ask the first so many of each file; None: all.
        phase: Announces the work on each set.

    Returns:
        The result by the name of the set.

    Raises:
        CheckpointError: The adapter is missing or damaged.
        ConfigError: The base model cannot be loaded or does not fit, or a limit that cannot be.
        DataError: A file cannot be used.
    """
    if limit is not None and limit < 1:
        raise bad_value("limit", limit, "give 1 or more")
    task = task_of(folder)
    asked = {name: load_questions("data", path, task.language)[:limit] for name, path in files.items()}
    opened = open_adapter(folder, base_model)
    positions = positions_of(opened.model.config)
    if max_length is not None and positions is not None and max_length > positions:
        raise bad_value("max_length", max_length, f"the model takes at most {positions} tokens")
    if max_length is None:
        max_length = task.max_length or positions
    found = {}
    for name, questions in asked.items():
        with phase(name, len(questions)) as advance:
            found[name] = evaluate_questions(
                opened.model,
                opened.builder,
                opened.tokenizer,
                questions,
                method,
                batch_size=batch_size,
                max_length=max_length,
                max_new_tokens=max_new_tokens,
                advance=advance,
            )
    return found


def evaluate_questions(
    model: Any,
    builder: PromptBuilder,
    tokenizer: Any,
    questions: Sequence[Question],
    method: Method = "likelihood",
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    max_new_tokens: int = 32,
    advance: Callable[[int], None] = lambda done: None,
) -> QuestionEvaluation:
    """Ask a model every question once.

    Args:
        model: A causal language model; it runs where it is, in evaluation mode, and is left in its own.
        builder: Makes prompts and responses.
        tokenizer: The model's, with a padding token.
        questions: The questions.
        method: `"likelihood"` ranks the candidates (see `likelihood`); `"generation"` reads a greedily generated text
            (see `answers`).
        batch_size: Questions of one forward pass.
        max_length: Most tokens of prompt and response, as in training; None: no limit.
        max_new_tokens: Most tokens of a generated answer; a prompt that leaves less room in the model is cut.
        advance: Called on the way with numbers of questions just done.

    Raises:
        ConfigError: A method that does not exist, a batch size below 1, or answers that leave no room for prompts.
        DataError: No questions, or one that cannot be asked.
    """
    if method not in ("likelihood", "generation"):
        raise bad_value("method", method, "give likelihood or generation")
    if batch_size < 1:
        raise bad_value("batch_size", batch_size, "give 1 or more")
    if not questions:
        raise bad_value("questions", 0, "there is nothing to ask; give at least one", DataError)
    if method == "likelihood":
        return _by_likelihood(model, builder, questions, batch_size, max_length, advance)
    return _by_generation(model, builder, tokenizer, questions, batch_size, max_length, max_new_tokens, advance)


def _by_generation(
    model: Any,
    builder: PromptBuilder,
    tokenizer: Any,
    questions: Sequence[Question],
    batch_size: int,
    max_length: int | None,
    max_new_tokens: int,
    advance: Callable[[int], None],
) -> QuestionEvaluation:
    positions = positions_of(model.config)
    most = None if positions is None else positions - max_new_tokens
    if most is not None and most < 2:  # one token and a beginning-of-text token
        raise bad_value("max_new_tokens", max_new_tokens, f"the model takes {positions} tokens in all; give fewer")
    asked = [prompt_of(builder, question, max_length, most) for question in questions]
    generations = generate_batch(
        model,
        builder,
        tokenizer,
        [prompt for prompt, _ in asked],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        advance=advance,
    )
    written = tuple(
        WrittenAnswer(
            question.answer, extract(said.text, question.candidates, question.lead), said.text, said.finished
        )
        for question, said in zip(questions, generations, strict=True)
    )
    return QuestionEvaluation(
        "generation",
        {"generated": _share(prediction.chosen == prediction.answer for prediction in written)},
        unparseable=sum(prediction.chosen is None for prediction in written),
        unfinished=sum(not prediction.finished for prediction in written),
        cut_prompts=sum(cut for _, cut in asked),
        loss=None,
        predictions=written,
    )


def _by_likelihood(
    model: Any,
    builder: PromptBuilder,
    questions: Sequence[Question],
    batch_size: int,
    max_length: int | None,
    advance: Callable[[int], None],
) -> QuestionEvaluation:
    rankings = rank(model, builder, questions, batch_size=batch_size, max_length=max_length, advance=advance)
    ranked = tuple(
        RankedAnswer(
            question.answer,
            question.candidates[ranking.best],
            question.candidates[ranking.best_normalised],
            question.candidates[ranking.best_per_character],
            dict(zip(question.candidates, ranking.log_probs, strict=True)),
            dict(zip(question.candidates, ranking.tokens, strict=True)),
        )
        for question, ranking in zip(questions, rankings, strict=True)
    )
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
        cut_prompts=sum(ranking.cut for ranking in rankings),
        loss=-sum(prediction.log_probs[prediction.answer] for prediction in ranked) / len(ranked),
        predictions=ranked,
    )


def _share(outcomes: Iterable[bool]) -> float:
    told = list(outcomes)
    return sum(told) / len(told)
