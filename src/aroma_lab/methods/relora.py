"""ReLoRA for fine-tuning: LoRA whose product is merged into the backbone again and again."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from aroma.errors import bad_value
from aroma.files import write_tensors
from aroma.tuner.layout import PEFT_PREFIX

from .lora import Lora
from .peft_adapter import ADAPTER, PeftAdapter, staged
from .restarts import Restarts, whole_ranks, whole_updates


@dataclass(frozen=True)
class ReLora(PeftAdapter):
    """LoRA that restarts every `restart_every` steps (arXiv 2307.05695), on a pretrained model, not from scratch.

    At a restart the product is added to the backbone's weight, the pair starts anew, a share of its optimizer moments
    is zeroed (at random, as in AROMA), and the learning rate climbs from 0 again. Rank and components of a module are
    those of all its products, the merged ones included.

    Args:
        r: Rank of the pair.
        restart_every: Optimizer steps between two restarts.
        alpha: lora_alpha; None for r, so that the scale is 1.
        dropout: Dropout on the adapter's input.
        prune_ratio: Share of the moments that a restart zeroes.
        rewarmup_steps: Optimizer steps of the climb after a restart.
        seed: Seed of the fresh pairs and of the zeroed entries; None: `torch.initial_seed()`, so that the run's seed
            decides it.
        target_modules: Modules to adapt; see `modules.find_targets`.
    """

    writes_backbone: ClassVar[bool] = True

    r: int = 8
    restart_every: int = 100
    alpha: float | None = None
    dropout: float = 0.0
    prune_ratio: float = 0.99
    rewarmup_steps: int = 50
    seed: int | None = None
    target_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        if self.restart_every < 1:
            raise bad_value("restart_every", self.restart_every, "restarts are at least one optimizer step apart")
        if not 0 <= self.prune_ratio <= 1:
            raise bad_value("prune_ratio", self.prune_ratio, "give the share of moments to zero, in [0, 1]")
        if self.rewarmup_steps < 0:
            raise bad_value("rewarmup_steps", self.rewarmup_steps, "give 0 for no climb, or a number of steps")
        self._lora()  # checks the rest

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return self._lora().name.replace("LoRA", "ReLoRA", 1)

    def build(self, model: Any, planned_steps: int) -> Any:
        """Wrap `model` with PEFT's LoRA; see `Method.build`."""
        return self._lora().build(model, planned_steps)

    def hooks(self, model: Any, optimizer: Any, planned_steps: int) -> Restarts:
        """Return the restarts; see `Method.hooks`."""
        seed = torch.initial_seed() % 2**31 if self.seed is None else self.seed
        return Restarts(model, optimizer, self.restart_every, self.prune_ratio, self.rewarmup_steps, seed)

    def ranks(self, model: Any) -> dict[str, int]:
        """Return the sum of the ranks of all products of every module; see `Method.ranks`."""
        return whole_ranks(model)

    def components(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return all products of every module, the pair in training last; see `Method.components`."""
        return whole_updates(model)

    def save(self, model: Any, folder: Path) -> None:
        """Write all products as one plain LoRA adapter, which an unmerged base model needs; see `Method.save`."""
        from peft import get_peft_model_state_dict

        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        config = copy.deepcopy(model.peft_config[ADAPTER])
        for name, (B, A) in whole_updates(model).items():
            tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = A
            tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = B
            # The scale is folded into B, and every module has restarted as often.
            config.r = config.lora_alpha = A.shape[0]
        config.inference_mode = True
        with staged(folder) as staging:
            write_tensors(staging / "adapter_model.safetensors", tensors)
            config.save_pretrained(staging)

    def _lora(self) -> Lora:
        return Lora(r=self.r, alpha=self.alpha, dropout=self.dropout, target_modules=self.target_modules)
