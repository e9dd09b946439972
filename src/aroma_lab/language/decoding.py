"""What every way of generating text has in common: room in the model, padding, and settings of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from aroma.errors import DataError, bad_value

from .model import positions_of
from .prompt import PromptBuilder


def room_after(model: Any, prompt: Sequence[int], field: str) -> int:
    """Return how many tokens a model can take after a prompt.

    Args:
        model: The model.
        prompt: The tokens of the prompt.
        field: What the prompt is called in errors.

    Raises:
        DataError: There are no tokens, or no room.
    """
    if not prompt:
        raise bad_value(field, "", "it has no tokens; write something", DataError)
    positions = positions_of(model.config)
    if positions is None:
        return 2**31
    if len(prompt) >= positions:
        remedy = f"it has {len(prompt)} tokens, and the model takes {positions} in all; shorten it"
        raise bad_value(field, "…", remedy, DataError)
    return positions - len(prompt)


def greedy_settings(builder: PromptBuilder, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Return settings of greedy search."""
    padding = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(builder.stop_ids),
        pad_token_id=builder.stop_ids[0] if padding is None else padding,
    )


@contextmanager
def settings_alone(model: Any) -> Iterator[None]:
    """Keep a model's own generation settings, as of sampling or penalties, from filling in what ours leave out."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def left_padded(prompts: Sequence[list[int]], padding: int, device: Any) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, each of shape (prompts, tokens of the longest)."""
    longest = max(map(len, prompts))
    rows = [[padding] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
