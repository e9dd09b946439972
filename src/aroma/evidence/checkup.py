"""One checkup: which directions of an adapter stay, asked of held-out batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from .. import compat
from ..errors import bad_value
from .schedule import Effort, HeldOut
from .statistics import fewest, ordered, paired, sizes_to_measure, t_values
from .updates import Updates

Loss = Callable[[nn.Module, Any], Tensor]
"""Maps a model and a batch to a scalar loss."""


@dataclass(frozen=True)
class Checkup:
    """What a checkup found and did.

    Args:
        step: Optimizer steps taken before it.
        ranks_before: Directions of each matrix before, by the name of its weight; of experts, of each.
        ranks: The same after.
        r: Rank that the adapter has room for, in its largest matrix.
        sizes: Total numbers of directions whose held-out loss was measured, ascending; the first is the base alone.
        losses: Held-out loss at each of these sizes.
        saves: How much less held-out loss the kept directions leave than the base alone.
        standard_error: Standard error of that difference.
        gains: How much less held-out loss the kept directions leave than all of them.
        gains_error: Standard error of that difference.
        smaller: Total number of directions that one standard error of loss would keep.
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
    def total_before(self) -> int:
        """Directions of all matrices before."""
        return self.sizes[-1]

    @property
    def loss_of_base(self) -> float:
        """Held-out loss of the base alone, with what else was trained, such as a head."""
        return self.losses[0]

    @property
    def loss_before(self) -> float:
        """Held-out loss with all directions."""
        return self.losses[-1]

    @property
    def loss(self) -> float:
        """Held-out loss with the directions that stay."""
        return self.losses[self.sizes.index(self.kept)]

    def totals(self) -> dict[str, float]:
        """Return the numbers that a tracker shows."""
        ranks = [rank for ranks in self.ranks.values() for rank in ranks]
        shown = {"total_rank": self.kept, "largest_rank": max(ranks), "mean_rank": self.kept / len(ranks)}
        return {
            **shown,
            "held_out_loss": self.loss,
            "loss_before": self.loss_before,
            "loss_of_base": self.loss_of_base,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the checkup as a JSON-able dict, which `Checkup(**...)` takes."""
        return asdict(self)

    def __str__(self) -> str:
        matrices = sum(map(len, self.ranks.values()))
        empty = sum(rank == 0 for ranks in self.ranks.values() for rank in ranks)
        full = sum(rank == self.r for ranks in self.ranks.values() for rank in ranks)
        said = f"{self.kept} of {self.total_before} directions stay in {matrices} matrices"
        said += f" ({empty} keep none)" if empty else ""
        said += f": held-out loss {self.loss:.4g}, with all {self.loss_before:.4g}, without {self.loss_of_base:.4g}"
        if abs(self.saves) <= 2 * self.standard_error:
            said += "; what all updates save cannot be told from noise"
        if 2 * full > matrices:
            said += f"; {full} of {matrices} matrices kept all {self.r} directions: a larger r would be used"
        return said


def check(
    updates: Updates, held_out: HeldOut, loss: Loss, effort: Effort, standard_errors: float, step: int
) -> Checkup:
    """Order the directions by what they save on held-out batches, and keep the first that lose nothing there.

    Args:
        updates: The adapter's updates. Directions that go are zero in A and in B afterwards.
        held_out: Held-out batches.
        loss: Loss of a model and a batch.
        effort: How much to ask.
        standard_errors: How many standard errors of loss a smaller adapter may cost.
        step: Optimizer steps taken.
    """
    ask = partial(_losses, updates.model, loss)
    alive = updates.to_singular_directions() > 0
    before = updates.ranks()
    order = ordered(t_values(updates.credits(ask(held_out.take(effort.questions)))), alive)
    measured, sizes = ask(held_out.take(effort.measured)), sizes_to_measure(len(order))
    losses = torch.stack([updates.losses(measured, _first(order, size, alive)) for size in sizes])
    chosen = fewest(losses, standard_errors)
    updates.cut(_first(order, sizes[chosen], alive))
    saves, error = paired(losses[chosen], losses[0])
    gains, gains_error = paired(losses[chosen], losses[-1])
    return Checkup(
        step=step,
        ranks_before=before,
        ranks=updates.ranks(),
        r=max(update.r for update in updates.each),
        sizes=sizes,
        losses=losses.mean(1).tolist(),
        saves=saves,
        standard_error=error,
        gains=gains,
        gains_error=gains_error,
        smaller=sizes[fewest(losses, 1.0)],
        kept=sizes[chosen],
    )


def _first(order: Tensor, size: int, alive: Tensor) -> Tensor:
    kept = torch.zeros_like(alive)
    kept[order[:size]] = True
    return kept


def _losses(model: nn.Module, loss: Loss, batches: list[Any]) -> list[Callable[[], Tensor]]:
    return [partial(_loss_of, model, loss, batch) for batch in batches]


def _loss_of(model: nn.Module, loss: Loss, batch: Any) -> Tensor:
    # Weights that are offloaded are on the meta device, and their hooks bring inputs to where they compute.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    with compat.without_metrics(loss):
        return loss(model, send_to_device(batch, device))


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that `model` computes of `batch`, a mapping with labels.

    Raises:
        ConfigError: It computes none.
    """
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        remedy = (
            f"{type(model).__name__} returns no loss for a held-out batch; give the examples labels, or give loss="
        )
        raise bad_value("loss", None, f"{remedy}, a function of model and batch")
    return found
