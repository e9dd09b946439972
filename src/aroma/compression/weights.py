"""The adapted weights of a model: which can be cut, their factors, and the configuration of what stays."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn

from .. import sharding
from ..errors import NonFiniteError, bad_value
from .metric import Product

STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they are."""
_VARIANTS = ("use_dora", "velora_config", "monteclora_config", "alora_invocation_tokens")
"""Variants of LoRA that keep A and B as they are."""


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight with an update s B A; of a stack of experts, all of theirs.

    Args:
        name: Its name in the base model.
        layer: PEFT's layer.
        adapter: Name of the adapter.
        scale: What PEFT multiplies B A by.
        is_pinned: Whether it keeps a direction, because something else is saved with it.
    """

    name: str
    layer: LoraLayer
    adapter: str
    scale: float
    is_pinned: bool

    @property
    def matrices(self) -> int:
        """How many matrices it stacks: 1, or the number of experts."""
        return self.layer.num_experts if isinstance(self.layer, ParamWrapper) else 1

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters A and B, as PEFT shapes them."""
        if self.adapter in self.layer.lora_embedding_A:
            return self.layer.lora_embedding_A[self.adapter], self.layer.lora_embedding_B[self.adapter]
        return self.layer.lora_A[self.adapter].weight, self.layer.lora_B[self.adapter].weight

    @property
    def r(self) -> int:
        """Rank that the layer has room for, for each matrix."""
        r: int = self.layer.r[self.adapter]
        return r

    @property
    def cost(self) -> int:
        """Numbers that one direction stores, of every matrix."""
        A, B = self.parameters
        return (A.numel() + B.numel()) // self.r

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.parameters[0].element_size()

    def is_product(self) -> bool:
        """Whether the update is a product B A of each matrix, as that of a grouped convolution is not."""
        A, B = self.parameters
        return A.shape[0] == B.shape[1] == self.r * self.matrices and all(size == 1 for size in B.shape[2:])

    def rows(self, A: Tensor) -> Tensor:
        """Return A, or its gradient, as rows, (matrices, r, n)."""
        return A.reshape(self.matrices, -1, math.prod(A.shape[1:]))

    def product(self) -> Product:
        """Return the update, with the scale folded in, in float32 or more."""
        A, B = (parameter.detach() for parameter in self.parameters)
        columns = B.reshape(len(B), -1, self.matrices).permute(2, 0, 1)
        return Product(wide(columns) * self.scale, wide(self.rows(A)))

    def shaped(self, product: Product, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and B of an update of any rank as PEFT shapes them, for a layer whose scale is 1."""
        A, B = self.parameters
        rank = self.matrices * product.A.shape[1]
        packed = product.B.permute(1, 2, 0).reshape(len(B), rank, *B.shape[2:])
        return product.A.reshape(rank, *A.shape[1:]).to(A.device, dtype), packed.to(B.device, dtype)

    @torch.no_grad()
    def fill(self, values: tuple[Tensor, Tensor]) -> None:
        """Write A and B of an update of any rank, as `shaped` returns them, and zeros into the rest."""
        for place, parameter in enumerate(self.parameters):
            whole = torch.zeros_like(parameter)
            if values[place].numel():
                sides = (self.matrices, -1) if place == 0 else (len(parameter), -1, self.matrices)
                part = values[place].reshape(*sides, *([math.prod(parameter.shape[1:])] if place == 0 else []))
                whole.view(*sides, *part.shape[len(sides) :])[:, : part.shape[1]] = part.to(whole)
            parameter.copy_(whole)

    @torch.no_grad()
    def narrow(self, product: Product) -> None:
        """Give the layer the update and rank of `product`, with scale 1; of rank 0 it is adapted no more."""
        layer, name, rank = self.layer, self.adapter, product.A.shape[1]
        if not rank:
            # `delete_adapter` of PEFT would activate another one.
            held = [getattr(layer, attribute) for attribute in (*layer.adapter_layer_names, *layer.other_param_names)]
            for values in (*held, layer.lora_variant):
                if name in values:
                    del values[name]
            return
        for parameter, values in zip(self.parameters, self.shaped(product, self.parameters[0].dtype), strict=True):
            parameter.data, parameter.grad = values.contiguous(), None
        layer.scaling[name], layer.use_rslora[name] = 1.0, False
        layer.r[name] = layer.lora_alpha[name] = rank
        if name in layer.lora_A:
            inner, outer = layer.lora_A[name], layer.lora_B[name]
            kind = "features" if isinstance(inner, nn.Linear) else "channels"
            for module, side in ((inner, f"out_{kind}"), (outer, f"in_{kind}")):
                setattr(module, side, rank * self.matrices)


class Adapter:
    """The active LoRA adapter of a model, all of whose weights are checked.

    Args:
        model: The model, unwrapped.
        is_trained: Whether its updates must not all be zero, as they are when a training begins.

    Attributes:
        model: The model, unwrapped.
        name: The adapter's name.
        weights: What can be cut, in the order of the model.
        others: What cannot, and stays as it is: grouped convolutions, and `nn.MultiheadAttention`, whose two weights
            PEFT gives one rank.

    Raises:
        ConfigError: There is no such adapter, or it cannot be cut; nothing is changed.
        NonFiniteError: An update is NaN or infinite.
    """

    def __init__(self, model: Any, is_trained: bool = True) -> None:
        self.model = model
        if sharding.sharding_of_model(model) is not sharding.REPLICAS:
            raise bad_value("model", "sharded", "save the adapter, and run `aroma compress` on it in one process")
        self.name = _active(model)
        config = self.model.peft_config[self.name]
        require_products(config.to_dict())
        layers = {
            key: layer
            for key, layer in model.named_modules()
            if isinstance(layer, LoraLayer) and {self.name} & {*layer.lora_A, *layer.lora_embedding_A}
        }
        _require_in_use(layers, self.name)
        self.weights: list[AdaptedWeight] = []
        self.others: list[AdaptedWeight] = []
        attention = [key for key, layer in layers.items() if isinstance(layer, MultiheadAttention)]
        for key, layer in layers.items():
            if any(key.startswith(f"{outer}.") for outer in attention):
                continue
            # Several wrappers of one module lie within each other, and are saved under the names that this gives.
            is_nested = isinstance(layer, ParamWrapper) and any(
                key in (other, f"{other}.base_layer") or other == f"{key}.base_layer"
                for other, one in layers.items()
                if one is not layer and isinstance(one, ParamWrapper)
            )
            is_pinned = is_nested or config.bias != "none" or self.name in layer.lora_magnitude_vector
            weight = AdaptedWeight(_name_of(key, layer), layer, self.name, float(layer.scaling[self.name]), is_pinned)
            can_be_cut = weight.is_product() and key not in attention
            (self.weights if can_be_cut else self.others).append(weight)
        if not self.weights:
            remedy = "none of its updates is a product B A that can be cut; docs/compress.md lists the kinds of layers"
            raise bad_value("model", self.name, remedy)
        if is_trained:
            self._require_updates()

    def _require_updates(self) -> None:
        for weight in self.weights:
            if weight.parameters[0].is_meta:
                remedy = f"{weight.name} is offloaded with its base; load it into memory, on whatever devices"
                raise bad_value("model", f"{self.name} on meta", remedy)
            if not all(bool(parameter.isfinite().all()) for parameter in weight.parameters):
                raise NonFiniteError(f"{weight.name}: its adapter is NaN or infinite; use an earlier checkpoint")
        if not any(bool((part := weight.product()).B.any()) and bool(part.A.any()) for weight in self.weights):
            remedy = "all its updates are zero, so there is nothing to keep; train it first, or load its weights"
            raise bad_value("model", self.name, remedy)

    def describe(self, ranks: Mapping[str, int]) -> None:
        """Let the configuration name every weight that is still adapted: `ranks`, by name, and those that stay."""
        configs = self.model.peft_config
        # The caller's own configuration stays as it is: another adapter may be made with it.
        config = configs[self.name] = copy.copy(configs[self.name])
        scales = {one.name: (one.r, one.scale * one.r) for one in self.others}
        parameters = {one.name for one in (*self.weights, *self.others) if isinstance(one.layer, ParamWrapper)}
        names = {re.sub(r"\.base_layer\b", "", key.removeprefix(_PREFIX)) for key, _ in self.model.named_modules()}
        for field, value in compact_fields(ranks, scales, parameters, names).items():
            setattr(config, field, value)
        config.target_modules = set(config.target_modules)


_PREFIX = "base_model.model."


def compact_fields(
    ranks: Mapping[str, int], others: Mapping[str, tuple[int, float]], parameters: set[str], names: set[str]
) -> dict[str, Any]:
    """Return the fields of a `LoraConfig` that name adapted weights and give each its rank.

    Args:
        ranks: Rank of each weight whose scale is 1, by its name.
        others: Rank and alpha of each further weight, by its name.
        parameters: Those among all of them that are parameters of experts, not modules.
        names: Modules of the model, as far as they are known. PEFT takes those for targets, too, whose name ends with
            that of a target, unless they are excluded.
    """
    every = {name: (rank, rank) for name, rank in ranks.items()} | dict(others)
    r = min(ranks.values())
    keys = {name: f"^{re.escape(name)}" for name in every}
    targets = every.keys() - parameters
    also = sorted(name for name in names - targets if any(name.endswith(f".{target}") for target in targets))
    return {
        "r": r,
        "lora_alpha": r,
        "rank_pattern": {keys[name]: rank for name, (rank, _) in every.items() if rank != r},
        "alpha_pattern": {keys[name]: alpha for name, (_, alpha) in every.items() if alpha != r},
        "target_modules": sorted(targets),
        "target_parameters": sorted(every.keys() & parameters) or None,
        "exclude_modules": "|".join(map(re.escape, also)) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_rslora": False,
        "init_lora_weights": True,
        "eva_config": None,
    }


def require_products(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a LoRA whose updates are not products B A beside unchanged base weights."""
    if config.get("peft_type") != "LORA":
        raise bad_value("peft_type", config.get("peft_type"), "only LoRA adapters can be compressed")
    if config.get("init_lora_weights", True) not in STARTS:
        remedy = "it changes the base weights, and a direction that goes would take a part of them with it; use True"
        raise bad_value("init_lora_weights", config["init_lora_weights"], remedy)
    if config.get("lora_bias"):
        raise bad_value("lora_bias", True, "a bias is no direction, and goes with a layer that keeps none; use False")
    from peft import LoraConfig

    for field in fields(LoraConfig):
        is_other = field.metadata.get("is_lora_variant") and field.name not in _VARIANTS
        if is_other and config.get(field.name):
            raise bad_value(field.name, config[field.name], "its updates are no products B A; leave it out")


def _active(model: nn.Module) -> str:
    """Return the name of the one active LoRA adapter of a model."""
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    names = [name for name in configs if name in getattr(model, "active_adapters", ())]
    if len(names) != 1 or configs[names[0]].peft_type != "LORA":
        found = ", ".join(f"{name} ({configs[name].peft_type})" for name in names) or type(model).__name__
        remedy = "give a PeftModel with one active LoRA adapter: get_peft_model(model, LoraConfig(...)), set_adapter"
        raise bad_value("model", found, remedy)
    return str(names[0])


def _require_in_use(layers: Mapping[str, Any], adapter: str) -> None:
    """Raise ConfigError unless the layers compute with the adapter apart from the base weights."""
    for key, layer in layers.items():
        if layer.merged:
            raise bad_value(
                "model", f"{adapter} merged", f"{key} holds it in its weights; call unmerge_adapter() first"
            )
        if layer.disable_adapters:
            raise bad_value(
                "model", f"{adapter} disabled", "its answers cannot be seen; call outside disable_adapter()"
            )
        if "_orig_mod" in key.split("."):
            remedy = "a module inside is wrapped by torch.compile, so PEFT saves other names; use module.compile()"
            raise bad_value("model", key, remedy)


def _name_of(key: str, layer: LoraLayer) -> str:
    name = re.sub(r"\.base_layer\b", "", key.removeprefix(_PREFIX))
    return f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name


def wide(values: Tensor) -> Tensor:
    """Return values (any shape) in float32 or more."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
