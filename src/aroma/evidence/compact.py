"""Compacting: an adapter whose matrices have the ranks that they use, as plain LoRA."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from ..errors import bad_value
from .updates import Update, Updates


@torch.no_grad()
def compact(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """Give every matrix of a LoRA adapter the rank that it uses: directions that are zero in A or in B go.

    The model computes the same. Its configuration names each adapted weight and its rank, and the scale is folded into
    B, so that engines which read only `r` and `lora_alpha` are right, too. An optimizer made before no longer fits the
    adapter.

    Args:
        model: A model with a LoRA adapter of PEFT, not sharded.
        adapter_name: The adapter; the active one by default.

    Returns:
        Rank of each adapted weight by its name; of experts, that of the largest. Weights that are not named are no
        longer adapted.

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
    kept = {name: rank for name, rank in ranks.items() if rank}
    _describe(updates, kept)
    return kept


def _used(update: Update) -> int:
    """Return the largest rank that a matrix of the update uses; DoRA's magnitudes keep one direction."""
    used = int(_has_effect(update).sum(1).max())
    return max(used, 1) if update.adapter in update.layer.lora_magnitude_vector else used


def _has_effect(update: Update) -> Tensor:
    """Return which directions are not zero, (matrices, r)."""
    A, B = update.pair
    return update.rows(A).any(2) & update.columns(B).any(1)


def _narrow(update: Update, rank: int) -> None:
    """Keep the `rank` first directions of each matrix that have an effect, and fold the scale into B."""
    layer, name, (A, B) = update.layer, update.adapter, update.pair
    first = (~_has_effect(update)).int().argsort(dim=1, stable=True)[:, :rank]
    rows, columns = update.rows(A), update.columns(B)
    rows = rows.gather(1, first[:, :, None].expand(-1, -1, rows.shape[2]))
    columns = columns.gather(2, first[:, None].expand(-1, columns.shape[1], -1))
    for parameter, values in zip((A, B), update.shaped(rows, columns * layer.scaling[name], A, B), strict=True):
        parameter.data, parameter.grad = values.contiguous(), None
    if name in layer.lora_A:
        inner, outer = layer.lora_A[name], layer.lora_B[name]
        given, taken = (
            ("out_features", "in_features") if isinstance(inner, nn.Linear) else ("out_channels", "in_channels")
        )
        for module, attribute in ((inner, given), (outer, taken)):
            setattr(module, attribute, rank * update.matrices)
    layer.r[name] = layer.lora_alpha[name] = rank
    layer.scaling[name], layer.use_rslora[name] = 1.0, False


def _remove(update: Update) -> None:
    """Take the adapter out of a layer. `delete_adapter` of PEFT would activate another one there."""
    layer: Any = update.layer
    held = [getattr(layer, name) for name in (*layer.adapter_layer_names, *layer.other_param_names)]
    for values in (*held, layer.lora_variant):
        if update.adapter in values:
            del values[update.adapter]


def _describe(updates: Updates, ranks: dict[str, int]) -> None:
    """Let the adapter's configuration name the weights that it adapts, and their ranks."""
    configs: Any = updates.model.peft_config
    # The caller's own configuration stays as it is: another adapter may be made with it.
    config = configs[updates.adapter] = copy.copy(configs[updates.adapter])
    experts = {update.name for update in updates.each if isinstance(update.layer, ParamWrapper)}
    config.r = config.lora_alpha = min(ranks.values())
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != config.r}
    config.rank_pattern, config.alpha_pattern = others, dict(others)
    config.target_modules = ranks.keys() - experts
    config.target_parameters = sorted(experts & ranks.keys()) or None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.use_rslora, config.init_lora_weights, config.eva_config = False, True, None
