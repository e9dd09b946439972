"""Text from language models: one streamed response, and many greedy ones in batches."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from aroma.errors import DataError, bad_value

from ..specs import LanguageSpec
from .data import turns_of_messages
from .model import LoadedModel, positions_of
from .template import Template, Turn, instruction_turns


@dataclass(frozen=True)
class Generation:
    """What a model writes after a prompt.

    Args:
        text: The response, without white space around it.
        ids: Its tokens, all but the one that ended it.
        finished: Whether such a token ended it, and not the limit.
    """

    text: str
    ids: list[int]
    finished: bool


@torch.no_grad()
def generate_batch(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Generation]:
    """Return the greedy responses to prompts, in their order, each as if it were alone.

    Prompts of similar lengths go together, padded on the left. The model is left in its mode.

    Args:
        loaded: The model; it runs where it is.
        prompts: Tokens of `Template.prompt`.
        max_new_tokens: Most tokens of a response, after the template's `lead`.
        batch_size: Prompts of one forward pass.
        advance: Called with the number of responses just written.

    Raises:
        ConfigError: `max_new_tokens` or `batch_size` is below 1.
        DataError: A prompt after which the model has no room for `max_new_tokens`.
    """
    model, template = loaded
    for field, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise bad_value(field, value, "give 1 or more")
    rows = [[*prompt, *template.lead] for prompt in prompts]
    for number, row in enumerate(rows, start=1):
        require_room(model, row, max_new_tokens, f"prompt {number}")
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    written: dict[int, Generation] = {}
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, ids in zip(chosen, _generate(loaded, [rows[i] for i in chosen], max_new_tokens), strict=True):
                said = list(takewhile(lambda token: token not in template.stop_ids, ids))
                text = template.tokenizer.decode(said, skip_special_tokens=True).strip()
                written[index] = Generation(text, said, finished=len(said) < len(ids))
            advance(len(chosen))
    finally:
        model.train(training)
    return [written[index] for index in range(len(rows))]


@torch.no_grad()
def stream(
    loaded: LoadedModel,
    turns: Sequence[Turn],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> None:
    """Print a response and a line end, piece by piece, as the model generates it.

    Args:
        loaded: The model, in evaluation mode; it runs where it is.
        turns: The conversation; the last turn is the user's.
        max_new_tokens: Most tokens of the response; fewer where the model takes no more.
        temperature: Divides the logits; 0: greedy.
        top_p: Draw only among the likeliest tokens that together have this probability, in (0, 1].
        seed: Seed of the draw; None: another response each time.

    Raises:
        DataError: Turns that no prompt can be made of, or a prompt that leaves no room in the model.
    """
    model, template = loaded
    row = [*template.prompt(turns), *template.lead]
    room = require_room(model, row, 1, "prompt")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    with torch.random.fork_rng():
        if temperature > 0:
            torch.manual_seed(secrets.randbits(63) if seed is None else seed)
        _generate(loaded, [row], min(max_new_tokens, room), _Streamer(template), **sampling)


def turns_of_row(where: str, row: Mapping[str, Any], spec: LanguageSpec) -> tuple[Turn, ...]:
    """Return what a row asks: its `prompt`, its messages, or its instruction and perhaps an input.

    Args:
        where: File and row, for errors.
        spec: Names of the columns.

    Raises:
        DataError: It asks nothing.
    """
    if spec.messages in row and "prompt" not in row:
        return turns_of_messages(where, row[spec.messages])
    prompt = row["prompt"] if "prompt" in row else row.get(spec.instruction)
    given = "" if "prompt" in row else row.get(spec.input) or ""
    if not isinstance(prompt, str) or not isinstance(given, str) or not (prompt + given).strip():
        remedy = f"give a text as prompt or {spec.instruction}, or a list as {spec.messages}"
        raise bad_value(where, list(row), remedy, DataError)
    return (Turn("user", prompt),) if "prompt" in row else instruction_turns(prompt, given)


class _Streamer(TextStreamer):
    """Prints a response without the token that ends it, which is a special token only in most tokenizers."""

    def __init__(self, template: Template) -> None:
        super().__init__(template.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stop_ids = template.stop_ids

    def put(self, value: Any) -> None:
        if self.next_tokens_are_prompt or int(value.flatten()[-1]) not in self._stop_ids:
            super().put(value)


def _generate(
    loaded: LoadedModel, rows: list[list[int]], max_new_tokens: int, streamer: Any = None, **sampling: Any
) -> list[list[int]]:
    """Return the tokens that follow each row, padded where another one is longer."""
    model, template = loaded
    padding = template.tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=list(template.stop_ids),
        pad_token_id=template.stop_ids[0] if padding is None else padding,
        **{"do_sample": False, **sampling},
    )
    longest = max(map(len, rows))
    ids = [[settings.pad_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    inputs = {"input_ids": ids, "attention_mask": mask}
    placed = {name: torch.tensor(value, device=model.device) for name, value in inputs.items()}
    with _only_these_settings(model):
        written: list[list[int]] = model.generate(**placed, generation_config=settings, streamer=streamer).tolist()
    return [row[longest:] for row in written]


@contextmanager
def _only_these_settings(model: Any) -> Iterator[None]:
    """Keep a model's own generation settings, such as penalties, from filling in what ours leave out."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def require_room(model: Any, row: Sequence[int], wanted: int, field: str) -> int:
    """Return how many tokens a model can take after a prompt; DataError for fewer than wanted."""
    positions = positions_of(model.config)
    room = 2**31 if positions is None else positions - len(row)
    if room < wanted:
        remedy = f"it has {len(row)} tokens, the model takes {positions} in all, and {wanted} are to follow; give less"
        raise bad_value(field, "…", remedy, DataError)
    return room
