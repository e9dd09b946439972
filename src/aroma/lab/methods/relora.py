"""ReLoRA for fine-tuning: LoRA whose product is merged into the backbone again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from ...errors import bad_value
from ...integrations.rewarmup import Rewarmup
from ...reset import component_generator, reset_state
from ...warmup import rewarmup_factor
from .base import Hooks, Method
from .lora import Lora


@dataclass(frozen=True)
class ReLora(Method):
    """LoRA that restarts every `restart_every` steps (arXiv 2307.05695), on a pretrained model, not from scratch.

    At a restart the product is added to the backbone's weight, the pair starts anew, a share of its optimizer moments
    is zeroed (at random, as in AROMA), and the learning rate climbs from 0 again.

    Args:
        r: Rank of the pair.
        restart_every: Optimizer steps between two restarts.
        alpha: lora_alpha; None for r, so that the scale is 1.
        dropout: Dropout on the adapter's input.
        prune_ratio: Share of the moments that a restart zeroes.
        rewarmup_steps: Optimizer steps of the climb after a restart.
        seed: Seed of the fresh pairs and of the zeroed entries.
    """

    writes_backbone: ClassVar[bool] = True

    r: int = 8
    restart_every: int = 100
    alpha: float | None = None
    dropout: float = 0.0
    prune_ratio: float = 0.99
    rewarmup_steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.restart_every < 1:
            raise bad_value("restart_every", self.restart_every, "restarts are at least one optimizer step apart")

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return self._lora().name.replace("LoRA", "ReLoRA", 1)

    def build(self, model: Any, planned_steps: int) -> Any:
        """Wrap `model` with PEFT's LoRA; see `Method.build`."""
        return self._lora().build(model, planned_steps)

    def hooks(self, model: Any, optimizer: Any, planned_steps: int) -> Hooks:
        """Return the restarts; see `Method.hooks`."""
        return Restarts(self, model, optimizer)

    def _lora(self) -> Lora:
        return Lora(r=self.r, alpha=self.alpha, dropout=self.dropout)


class Restarts(Hooks):
    """Merges and restarts the pairs of a model, and lets the learning rate climb afterwards.

    Args:
        method: The method.
        model: A model that `ReLora.build` made.
        optimizer: The optimizer of its pairs.
    """

    def __init__(self, method: ReLora, model: nn.Module, optimizer: Any) -> None:
        self._method = method
        self._layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
        self._optimizer = optimizer
        self._rewarmup = Rewarmup()
        self._restarts = 0
        self._last_restart = 0

    def before_step(self, step: int) -> None:
        """Scale the learning rate for this step."""
        taken = step - 1 - self._last_restart
        self._rewarmup.begin(self._optimizer, rewarmup_factor(self._restarts + 1, taken, self._method.rewarmup_steps))

    def after_step(self, step: int) -> None:
        """Give the learning rate back; restart where it is due."""
        self._rewarmup.end(self._optimizer, None)
        if step % self._method.restart_every == 0:
            self.restart()
            self._last_restart = step

    @torch.no_grad()
    def restart(self) -> None:
        """Merge every product into its weight, and start the pair anew; the function stays what it was."""
        self._restarts += 1
        for index, layer in enumerate(self._layers):
            # One draw a layer, so that the fresh pairs depend on the seed alone and not on who drew before.
            generator = component_generator(self._method.seed, self._restarts, index, "relora")
            _merge(layer)
            _start_anew(layer, generator)
            for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                reset_state(self._optimizer, parameter, "prune", self._method.prune_ratio, generator)


def _merge(layer: Any) -> None:
    """Add the product to the base weight: in float32, so that a weight of lower precision is rounded once."""
    weight = layer.get_base_layer().weight
    weight.copy_(weight.float() + layer.get_delta_weight("default").float())


def _start_anew(layer: Any, generator: torch.Generator) -> None:
    """Zero B, and draw A as PEFT does at the start: uniform in ±1/√n."""
    a = layer.lora_A["default"].weight
    bound = a.shape[1] ** -0.5
    a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
    layer.lora_B["default"].weight.zero_()
