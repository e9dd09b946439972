"""Questions as tokens: the prompt, what every response begins with, and what tells the candidates apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from aroma.errors import DataError, bad_value

from .commonsense import Question
from .prompt import PromptBuilder


@dataclass(frozen=True)
class Asked:
    """A question as tokens.

    Args:
        prompt: Up to where the response begins.
        lead: What every response begins with.
        labels: The rest of each candidate's response, none of them empty or the beginning of another.
        cut: Whether the prompt lost tokens on the left to fit.
    """

    prompt: list[int]
    lead: list[int]
    labels: tuple[list[int], ...]
    cut: bool


def prompt_of(
    builder: PromptBuilder, question: Question, max_length: int | None = None, most: int | None = None
) -> tuple[list[int], bool]:
    """Return the tokens of a question up to where the response begins, and whether they had to be cut.

    Args:
        builder: Makes prompts and responses.
        question: The question.
        max_length: Most tokens of prompt and longest response with its end: a longer prompt loses tokens on the left,
            as in training. None: no limit.
        most: Most tokens of the prompt alone, 2 or more; None: no other limit.

    Raises:
        DataError: The responses alone are longer than `max_length`.
    """
    prompt = builder.prompt(question.turns)
    room = len(prompt) if most is None else most
    if max_length is not None:
        longest = max(len(builder.response(question.response_of(label))) for label in question.candidates)
        room = min(room, max_length - longest)
        if room < 2:  # one token and a beginning-of-text token
            raise bad_value("max_length", max_length, f"a response alone has {longest} tokens; give more", DataError)
    return builder.shorten(prompt, room), room < len(prompt)


def ask(builder: PromptBuilder, question: Question, max_length: int | None = None) -> Asked:
    """Return a question and its candidates as tokens; arguments as of `prompt_of`.

    Raises:
        DataError: As `prompt_of`, or the tokenizer writes one candidate as another or as the beginning of another.
    """
    responses = [builder.continuation(question.response_of(label)) for label in question.candidates]
    given = _common([builder.continuation(question.lead), *responses])
    labels = tuple(response[given:] for response in responses)
    if any(one == other[: len(one)] for one, other in permutations(labels, 2)):
        remedy = (
            "the tokenizer writes one of them as the beginning of another, so that their likelihoods cannot be "
            "compared; use generation"
        )
        raise bad_value("candidates", list(question.candidates), remedy, DataError)
    prompt, cut = prompt_of(builder, question, max_length)
    return Asked(prompt, responses[0][:given], labels, cut)


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens at the front all rows share."""
    shared = 0
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared
