"""What a Trainer makes of encoded examples: batches, a loss, and metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Objective:
    """What differs between kinds of tasks inside the one training loop.

    Args:
        collator: Makes batches of encoded examples.
        processor: The tokenizer, which goes into the checkpoints.
        metrics: The Trainer's `compute_metrics`; None where the loss is all that is measured on the way.
        choice: Metric that a checkpoint is chosen by, where one is, as the Trainer calls it without `eval_`.
        higher_is_better: Whether it is the higher the better.
        counts_items: Whether the loss of a step is the mean over all items of its micro-batches, as it is over the
            tokens of a language model; False: the mean of the micro-batches' means.
    """

    collator: Any
    processor: Any
    metrics: Callable[[Any], dict[str, float]] | None
    choice: str
    higher_is_better: bool = True
    counts_items: bool = False
