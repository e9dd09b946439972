"""The layers of an adapter of PEFT: their pairs, and the products that the weights of their base include.

ReLoRA adds its pair to the base at every restart; LoRA-GA takes the pair that it starts with away from it. Either way
the update of the original base is a sum of products, of which the pair in training is the last.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .base import Hooks, require_keys
from .head import base_name

ADAPTER = "default"
"""The name that PEFT gives the adapter of `get_peft_model`."""

Layer = TypeVar("Layer", bound=nn.Module)

Product = tuple[Tensor, Tensor]
"""B (m, R) and A (R, n)."""


def layers_of(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Return the adapted layers of a `PeftModel`, in order, by their modules' names in the base model."""
    return {base_name(name): module for name, module in model.named_modules() if isinstance(module, kind)}


def pair_of(layer: Any) -> Product:
    """Return copies of B (m, r), with the scale folded in, and A (r, n) of a layer of PEFT's LoRA."""
    scaled = layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]
    return scaled, layer.lora_A[ADAPTER].weight.detach().clone()


def merged_of(layer: Any) -> Product:
    """Return the products of the update that the base weight includes, as one; its rank may be 0."""
    a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
    products: Product = getattr(layer, "merged_products", (b[:, :0], a[:0]))
    return products


def note_merged(layer: Any, product: Product) -> None:
    """Note that the base weight now includes one product more; whoever calls this has changed the weight."""
    layer.merged_products = joined(merged_of(layer), product)


def joined(one: Product, other: Product) -> Product:
    """Return the sum of two products B A as one."""
    return torch.cat([one[0], other[0]], dim=1), torch.cat([one[1], other[1]], dim=0)


class MergedWeights(Hooks):
    """Carries base weights that include products from a run to the one that resumes it."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self._layers = layers

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weight and the merged products of every layer; see `Hooks.state_dict`.

        The weight is stored as it is: adding the products again would round alike on the same machine only.
        """
        state = {}
        for name, layer in self._layers.items():
            B, A = merged_of(layer)
            weight = layer.get_base_layer().weight
            state |= {f"weight.{name}": weight, f"B.{name}": B, f"A.{name}": A}
        return {key: tensor.detach().clone() for key, tensor in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`; see `Hooks.load_state_dict`."""
        require_keys(state, {f"{part}.{name}" for name in self._layers for part in ("weight", "B", "A")})
        for name, layer in self._layers.items():
            layer.get_base_layer().weight.copy_(state[f"weight.{name}"])
            like = layer.lora_A[ADAPTER].weight
            layer.merged_products = tuple(state[f"{part}.{name}"].to(like, copy=True) for part in ("B", "A"))
