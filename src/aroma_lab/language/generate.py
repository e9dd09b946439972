"""Greedy text from language models, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch

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


@torch.no_grad()
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
        loaded: The model, in evaluation mode; it runs where it is.
        chats: Each ends with the user's message.
        max_new_tokens: Most tokens of a response.
        batch_size: Chats of one forward pass.
        on_batch: Called with the number of responses just written.

    Raises:
        DataError: A chat that no prompt can be made of, or that leaves no room for `max_new_tokens`.
    """
    model, tokenizer = loaded
    stops, positions = stop_ids(tokenizer), positions_of(model.config)
    prompts = []
    for row, chat in enumerate(chats, start=1):
        prompt, _ = encode_chat(tokenizer, chat, f"data (row {row})")
        if positions is not None and len(prompt) + max_new_tokens > positions:
            remedy = (
                f"{max_new_tokens} are to follow, and the model takes {positions} in all; shorten it, or let fewer"
            )
            raise bad_value(f"data (row {row})", f"{len(prompt)} tokens", f"{remedy} follow", DataError)
        prompts.append(prompt)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    found: dict[int, Generation] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad(
            {"input_ids": [prompts[index] for index in chosen]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        ends = {"eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id}
        written = model.generate(**batch, **ends, max_new_tokens=max_new_tokens, use_cache=True, do_sample=False)
        for index, ids in zip(chosen, written[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            said = list(takewhile(lambda token: token not in stops, ids))
            text = tokenizer.decode(said, skip_special_tokens=True).strip()
            found[index] = Generation(text, len(said) < len(ids))
        on_batch(len(chosen))
    return [found[index] for index in range(len(prompts))]
