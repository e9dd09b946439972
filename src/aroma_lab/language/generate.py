"""Text from language models: one streamed response, and many greedy ones in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from transformers import TextStreamer

from aroma.errors import DataError, bad_value

from .data import Messages
from .encode import encode_chat, stop_ids
from .model import LoadedModel, positions_of


class Generation(NamedTuple):
    """What a model writes after a prompt."""

    text: str
    """The response, without white space around it."""
    finished: bool
    """Whether it ended by itself, not at the limit."""


def generate_batch(
    loaded: LoadedModel,
    chats: Sequence[Messages],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Generation]:
    """Return the greedy responses to chats, in their order; those of similar lengths go together.

    Args:
        loaded: The model; it runs where it is, and is left in its mode.
        chats: Each ends with the user's message.
        max_new_tokens: Most tokens of a response.
        batch_size: Chats of one forward pass.
        on_batch: Called with the number of responses just written.

    Raises:
        DataError: A chat that no prompt can be made of, or that leaves no room for `max_new_tokens`.
    """
    model, tokenizer = loaded
    prompts = [_prompt(loaded, chat, max_new_tokens, f"data (row {row})") for row, chat in enumerate(chats, start=1)]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    stops, training = stop_ids(tokenizer), model.training
    found: dict[int, Generation] = {}
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            written = _generate(loaded, [prompts[index] for index in chosen], max_new_tokens, do_sample=False)
            for index, ids in zip(chosen, written, strict=True):
                said = list(takewhile(lambda token: token not in stops, ids))
                text = tokenizer.decode(said, skip_special_tokens=True).strip()
                found[index] = Generation(text, len(said) < len(ids))
            on_batch(len(chosen))
    finally:
        model.train(training)
    return [found[index] for index in range(len(prompts))]


def stream(loaded: LoadedModel, messages: Messages, max_new_tokens: int, **sampling: Any) -> None:
    """Print a response and a line end, piece by piece, as the model generates it.

    Args:
        loaded: The model, in evaluation mode; it runs where it is.
        messages: The chat; the last message is the user's.
        max_new_tokens: Most tokens of the response.
        **sampling: Of `generate`, as `temperature`; nothing: always the likeliest token.

    Raises:
        DataError: A chat that no prompt can be made of, or that leaves no room for `max_new_tokens`.
    """
    prompt = _prompt(loaded, messages, max_new_tokens, "PROMPT")
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    _generate(loaded, [prompt], max_new_tokens, streamer=streamer, do_sample=bool(sampling), **sampling)


def _prompt(loaded: LoadedModel, messages: Messages, wanted: int, where: str) -> list[int]:
    prompt, _ = encode_chat(loaded.tokenizer, messages, where)
    positions = positions_of(loaded.model.config)
    if positions is not None and len(prompt) + wanted > positions:
        remedy = f"{wanted} are to follow, and the model takes {positions} in all; shorten it, or let fewer follow"
        raise bad_value(where, f"{len(prompt)} tokens", remedy, DataError)
    return prompt


@torch.no_grad()
def _generate(loaded: LoadedModel, prompts: list[list[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
    """Return the tokens that follow each prompt, padded where another one is longer."""
    model, tokenizer = loaded
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    ends = {"eos_token_id": stop_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    written = model.generate(**batch, **ends, max_new_tokens=max_new_tokens, use_cache=True, **options)
    return [row[batch["input_ids"].shape[1] :] for row in written.tolist()]
