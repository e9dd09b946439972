"""The loss of a language model on a whole set: the mean over its learned tokens, whatever the batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from aroma.errors import DataError, bad_value

from .collate import LanguageCollator
from .encode import NOT_LEARNED

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class TokenLoss:
    """A loss over tokens.

    Args:
        loss: Mean of -ln p over the learned tokens, in nats.
        tokens: Their number.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Return e to the loss; infinity where that is too large for a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@torch.no_grad()
def token_loss(
    model: Any,
    data: Dataset,
    collator: LanguageCollator,
    batch_size: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> TokenLoss:
    """Return the mean over all learned tokens of a set; the model is left in its mode.

    Args:
        model: A causal language model; it runs where it is.
        data: Rows of `encode_conversations`, or packed ones.
        collator: Makes the batches.
        batch_size: Rows of one forward pass; rows of similar lengths go together.
        advance: Called after each batch with its number of rows.

    Raises:
        DataError: Nothing is learned in `data`.
    """
    from torch.utils.data import DataLoader

    lengths = [len(ids) for ids in data["input_ids"]]  # the Trainer has no column of them left
    order = sorted(range(len(data)), key=lambda index: -lengths[index])
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for batch in DataLoader(data, batch_size=batch_size, sampler=order, collate_fn=collator):
            losses = _losses(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
            total += float(losses.double().sum())
            tokens += len(losses)
            advance(len(batch["input_ids"]))
    finally:
        model.train(training)
    if not tokens:
        raise bad_value("rows", len(data), "none of their tokens is learned; give examples with responses", DataError)
    return TokenLoss(total / tokens, tokens)


def _losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return -ln p of every learned token of a batch, float32."""
    labels = batch.pop("labels")[:, 1:]
    # Without a cache transformers keeps the examples of packed rows apart.
    logits = model(**batch, use_cache=False).logits[:, :-1]
    learned = labels != NOT_LEARNED
    return cross_entropy(logits[learned].float(), labels[learned], reduction="none")
