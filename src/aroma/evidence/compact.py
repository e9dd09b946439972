"""Compacting: an adapter whose matrices have the ranks that they use, as plain LoRA."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import bad_value
from .updates import Update, Updates


@torch.no_grad()
def compact(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """Give every matrix of a LoRA adapter the rank that it uses: directions that are zero in A or in B go.

    The model computes the same. Its configuration names each adapted weight and its rank, and the scale is folded into
    B, so that engines which read only `r` and `lora_alpha` are right, too. An optimizer made before is of no use
    afterwards.

    Args:
        model: A model with a LoRA adapter of PEFT, not sharded.
        adapter_name: The adapter; the active one by default.

    Returns:
        Rank of each adapted weight by its name; of experts, the largest. Weights of rank 0 are adapted no more.

    Raises:
        ConfigError: No LoRA adapter, or a sharded model.
    """
    updates = Updates(model, adapter_name=adapter_name)
    if updates.is_sharded:
        remedy = "its shards cannot change shape; save the adapter, load it into one process, and call compact there"
        raise bad_value("model", "sharded", remedy)
    ranks = {update.name: _used(update) for update in updates.each}
    if not any(ranks.values()):
        ranks[updates.each[0].name] = 1  # PEFT refuses an adapter without targets
    for update in updates.each:
        if ranks[update.name]:
            _narrow(update, ranks[update.name])
        else:
            _remove(update)
    _describe(updates, ranks)
    return {name: rank for name, rank in ranks.items() if rank}


def _used(update: Update) -> int:
    """Return the largest rank that a matrix of the update uses; DoRA's magnitudes keep one direction."""
    A, B = (parameter.detach() for parameter in update.pair)
    used = int(_nonzero(update, A, B).sum(1).max())
    return max(used, 1) if update.adapter in update.layer.lora_magnitude_vector else used


def _nonzero(update: Update, A: Tensor, B: Tensor) -> Tensor:
    """Return which directions have an effect, (matrices, r)."""
    return update.rows(A).any(2) & update.columns(B).any(1)


def _narrow(update: Update, rank: int) -> None:
    """Keep the `rank` first directions of each matrix that have an effect, and fold the scale into B."""
    layer, name = update.layer, update.adapter
    A, B = update.pair
    rows, columns = update.rows(A), update.columns(B)
    first = (~_nonzero(update, A, B)).int().argsort(dim=1, stable=True)[:, :rank]
    rows = rows.gather(1, first[:, :, None].expand(-1, -1, rows.shape[2]))
    columns = columns.gather(2, first[:, None].expand(-1, columns.shape[1], -1))
    values = update.shaped(rows, columns * layer.scaling[name], A, B)
    for parameter, value in zip((A, B), values, strict=True):
        parameter.data = value.contiguous()
        parameter.grad = None
    if not update.is_embedding:
        inner, outer = layer.lora_A[name], layer.lora_B[name]
        width = rank * update.matrices
        if isinstance(inner, nn.Linear):
            inner.out_features = outer.in_features = width
        else:
            inner.out_channels = outer.in_channels = width
    layer.r[name] = layer.lora_alpha[name] = rank
    layer.scaling[name], layer.use_rslora[name] = 1.0, False


def _remove(update: Update) -> None:
    """Take the adapter out of a layer. `delete_adapter` of PEFT would activate another one there."""
    for attribute in (*update.layer.adapter_layer_names, *update.layer.other_param_names):
        held = getattr(update.layer, attribute)
        if update.adapter in held:
            del held[update.adapter]
    update.layer.lora_variant.pop(update.adapter, None)


def _describe(updates: Updates, ranks: dict[str, int]) -> None:
    """Let the adapter's configuration name the weights that it adapts, and their ranks."""
    model: Any = updates.model
    config = model.peft_config[updates.adapter]
    kept = {name: rank for name, rank in ranks.items() if rank}
    experts = {update.name for update in updates.each if update.layer.__class__.__name__ == "ParamWrapper"}
    config.r = config.lora_alpha = min(kept.values())
    others = {f"^{re.escape(name)}": rank for name, rank in kept.items() if rank != config.r}
    config.rank_pattern, config.alpha_pattern = others, dict(others)
    config.target_modules = {name for name in kept if name not in experts}
    config.target_parameters = sorted(name for name in kept if name in experts) or None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.use_rslora, config.init_lora_weights, config.eva_config = False, True, None
