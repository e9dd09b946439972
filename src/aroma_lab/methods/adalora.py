"""AdaLoRA as PEFT has it, and the call of its allocator after every step, which PEFT leaves to the user's loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import SVDLinear
from torch import Tensor

from .base import Hooks
from .lora import ADAPTER, PeftAdapter, layers_of

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What PEFT's `RankAllocator` keeps of every parameter: its last sensitivity, and two averages over the steps."""
_PATTERN = "rank_pattern"


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
        initial_steps: Optimizer steps before the budget shrinks (tinit); below 1 a share of the planned steps.
        final_steps: Optimizer steps after it has shrunk (tfinal); below 1 a share of the planned steps.
        interval: Optimizer steps between two allocations (deltaT).
        orthogonality: Weight of the orthogonality term.
        target_modules: Modules to adapt; see `head.find_targets`.
    """

    init_r: int = 12
    target_r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    initial_steps: int | float = 0
    final_steps: int | float = 0
    interval: int = 1
    orthogonality: float = 0.5
    target_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        # At equal ranks there would be nothing to allocate, and PEFT's allocator fails with an error of torch's.
        less = f"give 1 or more, and less than init_r={self.init_r}"
        self._require(0 < self.target_r < self.init_r, "target_r", less)

    def config(self, planned_steps: int) -> AdaLoraConfig:
        """Return PEFT's configuration; ValueError if no step is left for the budget to shrink in."""
        initial, final = (int(n * planned_steps if n < 1 else n) for n in (self.initial_steps, self.final_steps))
        alpha: Any = self.init_r if self.alpha is None else self.alpha
        return AdaLoraConfig(
            init_r=self.init_r,
            target_r=self.target_r,
            lora_alpha=alpha,
            lora_dropout=self.dropout,
            tinit=initial,
            tfinal=final,
            deltaT=self.interval,
            orth_reg_weight=self.orthogonality,
            total_step=planned_steps,
            target_modules=self.target_modules,
        )

    def hooks(self, model: Any) -> Allocation:
        """Return the call of the allocator; see `Method.hooks`."""
        return Allocation(model)

    def ranks(self, model: Any) -> dict[str, int]:
        """Return how many triplets of every module the last allocation left; see `Method.ranks`."""
        pattern, layers = model.peft_config[ADAPTER].rank_pattern or {}, layers_of(model, SVDLinear).items()
        kept = {name.removesuffix(f".lora_E.{ADAPTER}"): sum(mask) for name, mask in pattern.items()}
        return {name: kept.get(name, layer.r[ADAPTER]) for name, layer in layers}

    def active_parameters(self, model: Any) -> int:
        """Return the parameters of the triplets that the last allocation left; see `Method.active_parameters`."""
        ranks, layers = self.ranks(model), layers_of(model, SVDLinear).items()
        return sum(ranks[name] * (layer.in_features + layer.out_features + 1) for name, layer in layers)

    def components(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the triplets that add anything, singular values and scale folded into B; see `Method.components`."""
        return {name: _triplets_of(layer) for name, layer in layers_of(model, SVDLinear).items()}

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter as PEFT does, without the masked triplets; see `Method.save`."""
        config = model.peft_config[ADAPTER]
        allocated = config.rank_pattern
        super().save(model, folder)
        config.rank_pattern = allocated  # PEFT has replaced it by a shortened one, with other names


class Allocation(Hooks):
    """Calls PEFT's allocator after every optimizer step, while the gradients that it reads are there."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def after_step(self, step: int) -> None:
        """Score every triplet by the gradients, and mask those beyond the budget."""
        self._model.base_model.update_and_allocate(step)

    def state_dict(self) -> dict[str, Tensor]:
        """Return sensitivities, averages and masks; see `Hooks.state_dict`."""
        allocator = self._model.base_model.rankallocator
        averages = {f"{kind}.{name}": one for kind in _AVERAGES for name, one in getattr(allocator, kind).items()}
        pattern = self._model.peft_config[ADAPTER].rank_pattern or {}
        masks = {f"{_PATTERN}.{name}": torch.tensor(kept, dtype=torch.bool) for name, kept in pattern.items()}
        return {name: values.detach().clone() for name, values in (averages | masks).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`; see `Hooks.load_state_dict`."""
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*_AVERAGES, _PATTERN)}
        for key, values in state.items():
            kind, _, name = key.partition(".")
            parts[kind][name] = values
        for kind in _AVERAGES:
            averages = {name: values.to(self._model.device, copy=True) for name, values in parts[kind].items()}
            setattr(self._model.base_model.rankallocator, kind, averages)
        # None, not empty, before the first allocation: as PEFT has it.
        masks = {name: kept.tolist() for name, kept in parts[_PATTERN].items()} or None
        self._model.peft_config[ADAPTER].rank_pattern = masks


def _triplets_of(layer: Any) -> tuple[Tensor, Tensor]:
    values = layer.lora_E[ADAPTER].detach().flatten()
    # By value, not by mask: between two allocations the optimizer also moves masked triplets, and then they count.
    used = values != 0
    # The same arithmetic as in the layer's forward, epsilon included.
    scale = layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER].detach() + 1e-5)
    B = layer.lora_B[ADAPTER].detach()[:, used] * values[used] * scale
    return B, layer.lora_A[ADAPTER].detach()[used]
