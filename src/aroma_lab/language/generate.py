"""Text from a language model: many prompts at once, greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from aroma.errors import DataError, bad_value

from .decoding import greedy_settings, left_padded, room_after, settings_alone
from .model import positions_of
from .opening import OpenedModel, open_adapter
from .prompt import PromptBuilder
from .stream import stream

__all__ = ["Generation", "OpenedModel", "generate_batch", "open_adapter", "stream"]


@dataclass(frozen=True)
class Generation:
    """What a model writes after a prompt.

    Args:
        text: The response, without what the template puts before every one and without white space around it.
        ids: Its tokens, all but the one that ended it.
        finished: Whether such a token ended it, and not the limit.
    """

    text: str
    ids: list[int]
    finished: bool


@torch.no_grad()
def generate_batch(
    model: Any,
    builder: PromptBuilder,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Generation]:
    """Return the greedy responses to prompts, in their order, each as if it were alone.

    Prompts are padded on the left, masked, and their positions count from their own first token; those of similar
    lengths go together. What the model's own generation settings say of sampling and penalties does not count. The
    model is left in its mode.

    Args:
        model: A causal language model; it runs where it is.
        builder: Knows what ends a response.
        tokenizer: The model's.
        prompts: Tokens of `builder.prompt`.
        max_new_tokens: Most tokens of a response.
        batch_size: Prompts of one forward pass.
        advance: Called on the way with the number of responses just written.

    Raises:
        ConfigError: `max_new_tokens` or `batch_size` is below 1.
        DataError: A prompt without tokens, or one after which the model has no place for `max_new_tokens`.
    """
    for field, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise bad_value(field, value, "give 1 or more")
    for number, prompt in enumerate(prompts, start=1):
        if room_after(model, prompt, f"prompt {number}") < max_new_tokens:
            limit = positions_of(model.config)
            remedy = f"prompt {number} has {len(prompt)} tokens already, and the model takes {limit} in all; give less"
            raise bad_value("max_new_tokens", max_new_tokens, remedy, DataError)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    settings = greedy_settings(builder, tokenizer, max_new_tokens)
    written: dict[int, Generation] = {}
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = left_padded([prompts[index] for index in chosen], settings.pad_token_id, model.device)
            with settings_alone(model):
                rows = model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]
            for index, row in zip(chosen, rows.tolist(), strict=True):
                written[index] = _generation(row, builder)
            advance(len(chosen))
    finally:
        model.train(training)
    return [written[index] for index in range(len(prompts))]


def _generation(row: list[int], builder: PromptBuilder) -> Generation:
    ids = list(takewhile(lambda token: token not in builder.stop_ids, row))
    return Generation(builder.read(ids), ids, finished=len(ids) < len(row))
