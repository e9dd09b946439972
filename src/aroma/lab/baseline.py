"""What can be had without adapters: a linear head on the frozen model, trained to convergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .data import Examples
from .encode import encode

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
    features: NDArray[Any], labels: Sequence[float], held_out_features: NDArray[Any], held_out_labels: Sequence[float]
) -> float:
    """Return the held-out accuracy of a linear head trained to convergence on frozen features.

    Its L2 strength is chosen on a fifth of the training examples; the held-out ones are looked at once.

    Args:
        features: Of the training examples, (examples, hidden).
        labels: Their classes.
        held_out_features: Of the held-out examples, (examples, hidden).
        held_out_labels: Their classes.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit

    search = GridSearchCV(
        LogisticRegression(max_iter=2000),
        {"C": _STRENGTHS},
        cv=StratifiedShuffleSplit(n_splits=1, test_size=0.2, random_state=0),
    )
    search.fit(features, labels)
    return float(search.score(held_out_features, held_out_labels))
