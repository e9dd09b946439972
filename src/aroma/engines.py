"""A live adapter for engines that sample while it trains: plain LoRA tensors and a configuration, without files."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import bad_value
from .sharding import gathered
from .tuner import aroma_layers
from .tuner.layout import PEFT_PREFIX, plain_config, plain_factors, uniform_config
from .tuner.live import live_adapter


class LoraTensors(NamedTuple):
    """What a saved adapter has in its two files.

    Args:
        config: `adapter_config.json`, JSON-able.
        tensors: `adapter_model.safetensors`: `base_model.model.NAME.lora_A.weight` (R, n), `….lora_B.weight` (m, R).
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]


@torch.no_grad()
def lora_tensors(model: nn.Module, rank: int | None = None, adapter_name: str = "default") -> LoraTensors:
    """Return an adapter as it is now as plain LoRA, for vLLM, verl or any engine that takes tensors.

    The scale is folded into B, so that `lora_alpha == r`. All tensors are copies, on the devices of their layers. If
    parameters are sharded, all ranks call this together.

    Args:
        model: The model; wrapped, sharded or neither.
        rank: With a rank, every growing matrix is there, zero-padded to it: names and shapes never change while the
            adapter grows, so vLLM's `max_lora_rank` need not. Set `max_components` in the configuration, so that no
            matrix can outgrow it. None: every matrix with a rank above 0 has its own, as in a saved adapter.
        adapter_name: Name of the adapter.

    Raises:
        ConfigError: The model has no such adapter; a matrix has a larger rank; or the adapter trains
            other modules, too, which no LoRA tensors hold.
    """
    live = live_adapter(model, adapter_name)
    if live.config.modules_to_save:
        remedy = "they train, too, and no LoRA tensors hold them; leave them out of the adapter, or save it in files"
        raise bad_value("modules_to_save", [*live.config.modules_to_save], remedy)
    layers = aroma_layers(model, adapter_name)
    whole = iter(gathered([parameter for layer in layers.values() for parameter in layer.pair(adapter_name)]))
    updates = {name: layer.components(adapter_name, (next(whole), next(whole))) for name, layer in layers.items()}
    ranks = {name: len(A) for name, (_, A) in updates.items()}
    for name, found in ranks.items():
        if rank is not None and found > rank:
            raise bad_value("rank", rank, f"{name} has rank {found}; give at least that, and set max_components")
    fan_in_fan_out = any(layer.fan_in_fan_out for layer in layers.values())
    config = {**plain_config(live.config, ranks, fan_in_fan_out), "peft_type": "LORA", "inference_mode": True}
    if rank is not None:
        config = uniform_config(config, ranks, rank)
    tensors: dict[str, Tensor] = {}
    for name, (B, A) in plain_factors(updates, rank).items():
        stem = f"{PEFT_PREFIX}{name}"
        tensors |= {f"{stem}.lora_A.weight": A.detach().clone(), f"{stem}.lora_B.weight": B.detach().clone()}
    return LoraTensors(config, tensors)
