"""What can be had without adapters: a linear head on the frozen model, trained to convergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..tasks.data import Examples
from ..tasks.encode import encode

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


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier of three classes or more.

    Args:
        weight: (classes, hidden).
        bias: (classes,).
    """

    weight: NDArray[Any]
    bias: NDArray[Any]

    def accuracy(self, features: NDArray[Any], labels: Sequence[float]) -> float:
        """Return the share of `features`, (examples, hidden), that get their label."""
        predicted = (features @ self.weight.T + self.bias).argmax(axis=-1)
        return float((predicted == labels).mean())

    @torch.no_grad()
    def copy_to(self, layer: torch.nn.Linear) -> None:
        """Give `layer` these weights."""
        layer.weight.copy_(torch.from_numpy(self.weight))
        layer.bias.copy_(torch.from_numpy(self.bias))


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


def fit_head(features: NDArray[Any], labels: Sequence[float]) -> LinearHead:
    """Return a linear head trained to convergence on frozen features; its L2 strength is chosen on a fifth of them.

    Args:
        features: (examples, hidden).
        labels: Classes 0, 1, …, every one of which occurs.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit

    search = GridSearchCV(
        LogisticRegression(max_iter=2000),
        {"C": _STRENGTHS},
        cv=StratifiedShuffleSplit(n_splits=1, test_size=0.2, random_state=0),
    )
    best = search.fit(features, labels).best_estimator_
    return LinearHead(best.coef_, best.intercept_)
