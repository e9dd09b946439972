"""ReLoRA, twice: as the AROMA paper compares it (`ReLoraComponents`), and merged into the backbone (`ReLoraMerge`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from aroma.integrations.loop import Rewarmup
from aroma.reset import component_generator, reset_state

from .aroma import Aroma
from .lora import ADAPTER, LoraBase, MergedWeights, update_of

_CHECKS = {"inner_tolerance", "inner_check_interval", "inner_criterion", "outer_tolerance", "min_components"}
"""Options of AROMA that mean nothing without its checks."""
_COUNTERS = "restarts"
"""Key of a state's counters: restarts, the step of the last one, and the seed."""


@dataclass(frozen=True)
class ReLoraComponents(Aroma):
    """ReLoRA 1×8 (section 4.1): AROMA without (5) and (6), so that every module has the same number of components.

    Each component trains for the same number of optimizer steps and is always kept. The backbone is not written.

    Args:
        max_components: Components of every module, one after the other.
        max_inner_steps: Optimizer steps of one component; None: the planned steps divided by `max_components`.
    """

    title: ClassVar[str] = "ReLoRA {0.r}×{0.max_components}"

    max_components: int = 8
    max_inner_steps: int | None = None

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        """Return the type of every option: AROMA's without those of its checks; see `Method.option_types`."""
        return {name: kind for name, kind in super().option_types().items() if name not in _CHECKS}

    def _config_fields(self) -> dict[str, Any]:
        lengths = {"max_components": self.max_components, "max_inner_steps": self.max_inner_steps}
        return super()._config_fields() | {"inner_tolerance": None, "outer_tolerance": None} | lengths


@dataclass(frozen=True)
class ReLoraMerge(LoraBase):
    """LoRA that restarts every `restart_every` steps (arXiv 2307.05695), on a pretrained model, not from scratch.

    At a restart the product is added to the backbone's weight, the pair starts anew, a random share of its optimizer
    moments is zeroed, as in AROMA, and the learning rate climbs from 0 again. The rank and the components of a module
    include the products that are already merged.

    Args:
        restart_every: Optimizer steps between two restarts.
        prune_ratio: Share of the moments that a restart zeroes.
        rewarmup_steps: Optimizer steps of the climb after a restart.
        seed: Seed of the fresh pairs and of the zeroed entries; None: `torch.initial_seed()`, that is, the run's seed.
    """

    title: ClassVar[str] = "ReLoRA r={0.r}"
    writes_backbone: ClassVar[bool] = True

    restart_every: int = 100
    prune_ratio: float = 0.99
    rewarmup_steps: int = 50
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.restart_every >= 1, "restart_every", "restarts are at least one optimizer step apart")
        self._require(0 <= self.prune_ratio <= 1, "prune_ratio", "give the share of moments to zero, in [0, 1]")

    def hooks(self, model: Any) -> Restarts:
        """Return the restarts; see `Method.hooks`."""
        return Restarts(model, self)


class Restarts(MergedWeights):
    """Merges and restarts the pairs of a model of `ReLoraMerge`, and lets the learning rate climb afterwards."""

    def __init__(self, model: nn.Module, method: ReLoraMerge) -> None:
        super().__init__(model)
        self._method, self._rewarmup = method, Rewarmup()
        self._restarts, self._last_restart, self._seed = 0, 0, -1 if method.seed is None else method.seed

    def begin(self, optimizer: Any, planned_steps: int) -> Self:
        """Begin; a seed that the method leaves open is that of the run; see `Hooks.begin`."""
        if self._seed < 0:
            self._seed = torch.initial_seed() % 2**31
        return super().begin(optimizer, planned_steps)

    def before_step(self, step: int) -> None:
        """Scale the learning rate for this step."""
        climb = self._method.rewarmup_steps if self._restarts else 0  # the schedule has a first warm-up of its own
        self._rewarmup.begin(self.optimizer, min(1.0, (step - 1 - self._last_restart) / climb) if climb else 1.0)

    def after_step(self, step: int) -> None:
        """Restore the learning rate; restart if it is time."""
        self._rewarmup.end(self.optimizer, None)
        if step % self._method.restart_every == 0:
            self.restart()
            self._last_restart = step

    @torch.no_grad()
    def restart(self) -> None:
        """Merge every product into its weight, and start the pair anew; the model computes the same function."""
        self._restarts += 1
        for index, layer in enumerate(self._layers.values()):
            # One generator a layer, so that the fresh pairs depend on the seed alone.
            generator = component_generator(self._seed, self._restarts, index, "relora")
            layer.merged_products = update_of(layer)
            # Added in float32, so that a weight of lower precision is rounded once.
            weight = layer.get_base_layer().weight
            weight.copy_(weight.float() + layer.get_delta_weight(ADAPTER).float())
            # B is 0 and A uniform in ±1/√n, as PEFT starts.
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            bound = a.shape[1] ** -0.5
            a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
            b.zero_()
            for parameter in (a, b):
                reset_state(self.optimizer, parameter, "prune", self._method.prune_ratio, generator)

    def state_dict(self) -> dict[str, Tensor]:
        """Return counters, seed, and the weight and merged products of every layer; see `Hooks.state_dict`."""
        counters = torch.tensor([self._restarts, self._last_restart, self._seed])
        return {_COUNTERS: counters} | super().state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`, and with it the merged backbone; see `Hooks.load_state_dict`."""
        super().load_state_dict(state)
        self._restarts, self._last_restart, self._seed = state[_COUNTERS].tolist()
