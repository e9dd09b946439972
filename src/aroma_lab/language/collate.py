"""Batches for training and for the loss on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from aroma.errors import bad_value

from .encode import NOT_LEARNED


@dataclass(frozen=True)
class LanguageCollator:
    """Pads rows on the right to the longest of their batch.

    Rows of single examples get an attention mask. Packed rows must have none, for transformers to keep their examples
    apart by `position_ids`; padding then is examples of its own, which nothing learns from.

    Args:
        pad_token_id: Any token: it is masked, or nobody attends to it.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `labels`, and `attention_mask` or `position_ids`, each of shape (rows, tokens)."""
        batch = {"input_ids": _padded(rows, "input_ids", self.pad_token_id), "labels": _padded(rows, "labels")}
        if "position_ids" in rows[0]:
            batch["position_ids"] = _padded(rows, "position_ids", 0)
        else:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch


def make_collator(tokenizer: Any) -> LanguageCollator:
    """Return the collator for a tokenizer's pad token, or else its eos token, which labels do not stem from.

    Raises:
        ConfigError: It has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return LanguageCollator(token)
    raise bad_value("model.name", tokenizer.name_or_path, "its tokenizer has neither a pad nor an eos token")


def _padded(rows: Sequence[Mapping[str, Any]], name: str, value: int = NOT_LEARNED) -> Tensor:
    return pad_sequence([torch.as_tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
