"""The restarts of ReLoRA: merge, start anew, reset, climb; and what they leave in the backbone."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from aroma.algorithm.paper import rewarmup_factor
from aroma.integrations.rewarmup import Rewarmup
from aroma.reset import component_generator, reset_state

from .hooks import Hooks, require_keys
from .lora import pair_of
from .peft_adapter import ADAPTER, layers_of

_COUNTERS = "restarts"
_PARTS = ("weight", "B", "A")


class Restarts(Hooks):
    """Merges and restarts the pairs of a model, and lets the learning rate climb afterwards.

    Args:
        model: A model that `ReLora.build` made.
        optimizer: The optimizer of its pairs.
        restart_every: Optimizer steps between two restarts.
        prune_ratio: Share of the moments that a restart zeroes.
        rewarmup_steps: Optimizer steps of the climb after a restart.
        seed: Seed of the fresh pairs and of the zeroed entries.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, restart_every: int, prune_ratio: float, rewarmup_steps: int, seed: int
    ) -> None:
        self._layers: dict[str, Any] = layers_of(model, LoraLinear)
        self._optimizer = optimizer
        self._restart_every = restart_every
        self._prune_ratio = prune_ratio
        self._rewarmup_steps = rewarmup_steps
        self._seed = seed
        self._rewarmup = Rewarmup()
        self._restarts = 0
        self._last_restart = 0

    def before_step(self, step: int) -> None:
        """Scale the learning rate for this step."""
        taken = step - 1 - self._last_restart
        self._rewarmup.begin(self._optimizer, rewarmup_factor(self._restarts + 1, taken, self._rewarmup_steps))

    def after_step(self, step: int) -> None:
        """Give the learning rate back; restart where it is due."""
        self._rewarmup.end(self._optimizer, None)
        if step % self._restart_every == 0:
            self.restart()
            self._last_restart = step

    @torch.no_grad()
    def restart(self) -> None:
        """Merge every product into its weight, and start the pair anew; the function stays what it was."""
        self._restarts += 1
        for index, layer in enumerate(self._layers.values()):
            # One draw a layer, so that the fresh pairs depend on the seed alone and not on who drew before.
            generator = component_generator(self._seed, self._restarts, index, "relora")
            _merge(layer)
            _start_anew(layer, generator)
            for parameter in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight):
                reset_state(self._optimizer, parameter, "prune", self._prune_ratio, generator)

    def state_dict(self) -> dict[str, Tensor]:
        """Return counters, seed, and of every layer its weight and merged products; see `Hooks.state_dict`.

        The weight as it is: the products added to the pretrained one again would round alike on the same machine only.
        """
        state = {_COUNTERS: torch.tensor([self._restarts, self._last_restart, self._seed])}
        for name, layer in self._layers.items():
            tensors = (layer.get_base_layer().weight, *_merged(layer))
            state |= {key: tensor.detach().clone() for key, tensor in zip(_keys(name), tensors, strict=True)}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`, and with it the merged backbone; see `Hooks.load_state_dict`."""
        require_keys(state, {_COUNTERS, *(key for name in self._layers for key in _keys(name))})
        self._restarts, self._last_restart, self._seed = state[_COUNTERS].tolist()
        for name, layer in self._layers.items():
            weight, B, A = (state[key] for key in _keys(name))
            layer.get_base_layer().weight.copy_(weight)
            a = layer.lora_A[ADAPTER].weight
            layer.merged_products = (B.to(a, copy=True), A.to(a, copy=True))


def whole_ranks(model: nn.Module) -> dict[str, int]:
    """Return the sum of the ranks of all products of every layer."""
    layers = layers_of(model, LoraLinear)
    return {name: layer.r[ADAPTER] + _merged(layer)[1].shape[0] for name, layer in layers.items()}


def whole_updates(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return all products of every layer, the pair last, as B (m, R) with the scale folded in and A (R, n)."""
    updates = {}
    for name, layer in layers_of(model, LoraLinear).items():
        (B, A), (b, a) = _merged(layer), pair_of(layer)
        updates[name] = (torch.cat([B, b], dim=1), torch.cat([A, a], dim=0))
    return updates


def _keys(name: str) -> list[str]:
    return [f"{part}.{name}" for part in _PARTS]


def _merged(layer: Any) -> tuple[Tensor, Tensor]:
    """Return the products that are in the base weight already."""
    products: tuple[Tensor, Tensor] | None = getattr(layer, "merged_products", None)
    if products is None:
        a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
        products = (b[:, :0], a[:0])
    return products


def _merge(layer: Any) -> None:
    """Add the product to the base weight: in float32, so that a weight of lower precision is rounded once."""
    (B, A), (b, a) = _merged(layer), pair_of(layer)
    layer.merged_products = (torch.cat([B, b], dim=1), torch.cat([A, a], dim=0))
    weight = layer.get_base_layer().weight
    weight.copy_(weight.float() + layer.get_delta_weight(ADAPTER).float())


def _start_anew(layer: Any, generator: torch.Generator) -> None:
    """Zero B, and draw A as PEFT does at the start: uniform in ±1/√n."""
    a = layer.lora_A[ADAPTER].weight
    bound = a.shape[1] ** -0.5
    a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
    layer.lora_B[ADAPTER].weight.zero_()
