"""What can be had without adapters: a linear head on the frozen model, trained to convergence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .data import Examples, split_validation
from .encode import encode
from .metrics import classification_metrics

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""Inverse L2 strengths that are tried."""


@dataclass(frozen=True)
class Features:
    """Frozen features of examples.

    Args:
        pooled: What the model's own classification head sees, (examples, hidden).
        mean: Mean of the last hidden states over tokens, (examples, hidden): the model's sentence embedding.
    """

    pooled: NDArray[Any]
    mean: NDArray[Any]


@torch.no_grad()
def features_of(
    model: Any, tokenizer: Any, examples: Examples, max_length: int, batch_size: int, on_batch: Callable[[int], None]
) -> Features:
    """Return the frozen features of examples.

    Args:
        model: An encoder with a pooler, as `AutoModel` loads it.
        tokenizer: Its tokenizer.
        examples: The examples.
        max_length: Most tokens of an example.
        batch_size: Examples of one forward pass.
        on_batch: Called after each batch with its number of examples.
    """
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    model.eval()
    data: Any = encode(examples, tokenizer, max_length).remove_columns("labels")
    pooled, mean = [], []
    for batch in DataLoader(data, batch_size=batch_size, collate_fn=DataCollatorWithPadding(tokenizer)):
        output = model(**batch)
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled.append(output.pooler_output)
        mean.append((output.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1))
        on_batch(len(mask))
    return Features(torch.cat(pooled).numpy(), torch.cat(mean).numpy())


def head_accuracy(
    features: NDArray[Any], train: Examples, held_out_features: NDArray[Any], held_out: Examples, names: tuple[str, ...]
) -> float:
    """Return the held-out accuracy of a linear head trained to convergence on frozen features.

    Its L2 strength is chosen on a fifth of the training examples; the held-out ones are looked at once.

    Args:
        features: Features of `train`, (examples, hidden).
        train: Training examples.
        held_out_features: Features of `held_out`, (examples, hidden).
        held_out: Held-out examples.
        names: Names of the classes.
    """
    strength = _best_strength(features, train, names)
    predicted = _fit(features, train.labels, strength).predict(held_out_features)
    return classification_metrics(predicted, torch.tensor(held_out.labels).numpy())["accuracy"]
