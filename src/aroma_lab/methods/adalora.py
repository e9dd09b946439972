"""AdaLoRA, as PEFT has it, with what PEFT leaves to the user's loop: the allocator, called after every step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.adalora import SVDLinear
from torch import Tensor

from aroma.errors import bad_value

from .allocation import Allocation, kept_triplets
from .base import with_dropout
from .hooks import Hooks
from .lora import check_dropout
from .modules import find_targets
from .peft_adapter import ADAPTER, PeftAdapter, layers_of, wrap


@dataclass(frozen=True)
class AdaLora(PeftAdapter):
    """AdaLoRA: the budget shrinks from `init_r` to `target_r` a module on average, spent where it matters most.

    The schedule follows the planned steps (`total_step`). PEFT's forward adds the orthogonality term to the loss
    whenever the model is given labels.

    Args:
        init_r: Rank of every module at the start.
        target_r: Average rank at the end.
        alpha: PEFT's lora_alpha, which AdaLoRA divides by the rank; None for `init_r`, so that the scale is 1.
        dropout: Dropout on the adapter's input.
        initial_share: Share of the planned steps before the budget shrinks (tinit).
        final_share: Share of the planned steps after it has shrunk (tfinal).
        initial_steps: Optimizer steps before the budget shrinks, in place of `initial_share`; None: the share decides.
        final_steps: Optimizer steps after it has shrunk, in place of `final_share`; None: the share decides.
        interval: Optimizer steps between two allocations (deltaT).
        orthogonality: Weight of the orthogonality term.
        target_modules: Modules to adapt; see `modules.find_targets`.
    """

    init_r: int = 12
    target_r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    initial_share: float = 0.0
    final_share: float = 0.0
    initial_steps: int | None = None
    final_steps: int | None = None
    interval: int = 1
    orthogonality: float = 0.5
    target_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        # At equal ranks there would be nothing to allocate, and PEFT's allocator fails with an error of torch's.
        if not 0 < self.target_r < self.init_r:
            raise bad_value("target_r", self.target_r, f"give 1 or more, and less than init_r={self.init_r}")
        if self.interval < 1:
            raise bad_value("interval", self.interval, "allocations are at least one optimizer step apart")
        if self.orthogonality < 0:
            raise bad_value("orthogonality", self.orthogonality, "give 0 or more")
        check_dropout(self.dropout)
        self._check_phases()

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return with_dropout(f"AdaLoRA r={self.init_r}→{self.target_r}", self.dropout)

    def build(self, model: Any, planned_steps: int) -> Any:
        """Wrap `model` with PEFT; see `Method.build`."""
        from peft import AdaLoraConfig

        initial, final = self._phases(planned_steps)
        config = AdaLoraConfig(
            init_r=self.init_r,
            target_r=self.target_r,
            lora_alpha=self.init_r if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            tinit=initial,
            tfinal=final,
            deltaT=self.interval,
            orth_reg_weight=self.orthogonality,
            total_step=planned_steps,
            target_modules=find_targets(self.target_modules, model),
        )
        return wrap(model, config)

    def _check_phases(self) -> None:
        for name in ("initial_steps", "final_steps"):
            steps = getattr(self, name)
            if steps is not None and steps < 0:
                raise bad_value(name, steps, "give 0 optimizer steps or more, or None")
        for name in ("initial_share", "final_share"):
            share = getattr(self, name)
            if not 0 <= share < 1:
                raise bad_value(name, share, "give a share of the planned steps, in [0, 1)")

    def _phases(self, planned_steps: int) -> tuple[int, int]:
        """Return the steps before the budget shrinks, and those after it has shrunk."""
        initial = int(self.initial_share * planned_steps) if self.initial_steps is None else self.initial_steps
        final = int(self.final_share * planned_steps) if self.final_steps is None else self.final_steps
        if initial + final >= planned_steps:
            raise bad_value(
                "final_steps",
                final,
                f"with {initial} initial steps it leaves none of the {planned_steps} planned ones for the budget to "
                "shrink in; lower one, or train longer",
            )
        return initial, final

    def hooks(self, model: Any, optimizer: Any, planned_steps: int) -> Hooks:
        """Return the call of the allocator; see `Method.hooks`."""
        return Allocation(model, planned_steps)

    def ranks(self, model: Any) -> dict[str, int]:
        """Return how many triplets of every module the last allocation left; see `Method.ranks`."""
        kept = kept_triplets(model)
        return {
            name: sum(kept[name]) if name in kept else layer.r[ADAPTER]
            for name, layer in layers_of(model, SVDLinear).items()
        }

    def active_parameters(self, model: Any) -> int:
        """Return the parameters of the triplets that the last allocation left; see `Method.active_parameters`."""
        layers = layers_of(model, SVDLinear)
        return sum(
            rank * (layers[name].in_features + layers[name].out_features + 1)
            for name, rank in self.ranks(model).items()
        )

    def components(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the triplets that add anything, singular values and scale folded into B; see `Method.components`."""
        return {name: _triplets_of(layer) for name, layer in layers_of(model, SVDLinear).items()}

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter as PEFT does, without the masked triplets; see `Method.save`."""
        config = model.peft_config[ADAPTER]
        allocated = config.rank_pattern
        super().save(model, folder)
        config.rank_pattern = allocated  # PEFT leaves a shortened one, by other names, in the living configuration


def _triplets_of(layer: Any) -> tuple[Tensor, Tensor]:
    values = layer.lora_E[ADAPTER].detach().flatten()
    # Not those that are masked: between two allocations the optimizer moves them, too, and then they do add.
    used = values != 0
    # The same arithmetic as in the layer's forward, whose rank has a little something added.
    scale = layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER].detach() + 1e-5)
    B = layer.lora_B[ADAPTER].detach()[:, used] * values[used] * scale
    return B, layer.lora_A[ADAPTER].detach()[used]
