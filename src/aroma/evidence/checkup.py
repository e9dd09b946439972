"""One checkup: held-out batches decide which directions of an adapter stay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..errors import bad_value
from .schedule import HeldOut
from .statistics import fewest, paired, sizes_to_measure
from .updates import Updates

Loss = Callable[[nn.Module, Any], Tensor]
"""Maps a model and a batch to a scalar loss."""


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that `model` computes of `batch`, a mapping with labels; ConfigError if it computes none."""
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        remedy = f"{type(model).__name__} returns none of a batch; give labels, or a function of model and batch"
        raise bad_value("loss", None, remedy)
    return loss


@dataclass(frozen=True)
class Checkup:
    """What a checkup found and did.

    Args:
        step: Optimizer steps taken before it.
        ranks_before: Rank of every matrix before, by the name of its weight: one number, or one for each expert.
        ranks: The same after.
        r: Largest rank that a layer has room for.
        sizes: Total numbers of directions whose held-out loss was measured, ascending: from none to all.
        losses: Held-out loss at each of these sizes. Other trained parameters, such as a head, are as trained.
        saves: Held-out loss with no direction, less that with the kept ones.
        standard_error: Standard error of that difference.
        gains: Held-out loss with all directions, less that with the kept ones.
        gains_error: Standard error of that difference.
        smaller: How many directions `standard_errors=1` would have kept.
        kept: Total number of directions that stay.
        kind: What event it is, in files that hold several kinds.
    """

    step: int
    ranks_before: dict[str, list[int]]
    ranks: dict[str, list[int]]
    r: int
    sizes: list[int]
    losses: list[float]
    saves: float
    standard_error: float
    gains: float
    gains_error: float
    smaller: int
    kept: int
    kind: str = "checkup"

    @property
    def loss(self) -> float:
        """Held-out loss with the directions that stay."""
        return self.losses[self.sizes.index(self.kept)]

    def totals(self) -> dict[str, float]:
        """Return the numbers that a tracker shows."""
        ranks = [rank for ranks in self.ranks.values() for rank in ranks]
        sizes = {"total_rank": self.kept, "largest_rank": max(ranks), "mean_rank": self.kept / len(ranks)}
        return {**sizes, "held_out_loss": self.loss, "loss_of_all": self.losses[-1], "loss_of_none": self.losses[0]}

    def as_dict(self) -> dict[str, Any]:
        """Return the checkup as a JSON-able dict, which `Checkup(**...)` takes."""
        return asdict(self)

    def __str__(self) -> str:
        ranks = [rank for ranks in self.ranks.values() for rank in ranks]
        full = ranks.count(self.r)
        said = f"{self.kept} of {self.sizes[-1]} directions stay in {len(ranks)} matrices"
        said += f" ({ranks.count(0)} keep none)" if 0 in ranks else ""
        said += f": held-out loss {self.loss:.4g}, with all {self.losses[-1]:.4g}, with none {self.losses[0]:.4g}"
        if abs(self.saves) <= 2 * self.standard_error:
            said += "; the improvement is within noise"
        if 2 * full > len(ranks):
            said += f"; {full} of {len(ranks)} matrices kept all {self.r} directions: try a larger r"
        return said


def check(updates: Updates, held_out: HeldOut, loss: Loss, count: int, standard_errors: float, step: int) -> Checkup:
    """Order the singular directions of all updates by size, and keep as many as give the least held-out loss.

    Directions that go are zero in A and in B afterwards.
    """
    sigma = updates.to_singular_directions()
    before = updates.ranks()
    order = sigma.argsort(descending=True, stable=True)[: int((sigma > 0).sum())]
    batches = [partial(_loss_of, updates.model, loss, batch) for batch in held_out.take(count)]
    sizes = sizes_to_measure(len(order))
    losses = torch.stack([updates.losses(batches, _first(order, size, len(sigma))) for size in sizes])
    chosen = fewest(losses, standard_errors)
    ranks = updates.cut(_first(order, sizes[chosen], len(sigma)))
    saves, gains = paired(losses[chosen], losses[0]), paired(losses[chosen], losses[-1])
    return Checkup(
        step=step,
        ranks_before=before,
        ranks=ranks,
        r=max(update.r for update in updates.each),
        sizes=sizes,
        losses=losses.mean(1).tolist(),
        saves=saves[0],
        standard_error=saves[1],
        gains=gains[0],
        gains_error=gains[1],
        smaller=sizes[fewest(losses, 1.0)],
        kept=sizes[chosen],
    )


def _first(order: Tensor, size: int, directions: int) -> Tensor:
    """Return which of all directions are among the first `size` in `order` (directions that exist,), (directions,)."""
    kept = torch.zeros(directions, dtype=torch.bool)
    kept[order[:size]] = True
    return kept


def _loss_of(model: nn.Module, loss: Loss, batch: Any) -> Tensor:
    # Weights that are offloaded are on the meta device, and their hooks bring inputs to where they compute.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    # A copy: a loss may take labels out of its batch, and every batch is measured at nine sizes.
    return loss(model, send_to_device(copy.copy(batch), device))
