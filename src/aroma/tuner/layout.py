"""The plain LoRA form of a growing adapter: how it is written at any moment, and how it is read back.

Ranks differ between modules, so the plain form names every module with a rank above 0 as a target and gives its rank.
The scale is folded into B, so alpha equals the rank everywhere, and an engine that reads only `r` and `lora_alpha`
scales by 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

from ..errors import CheckpointError
from ..files import tensors_digest
from ..patterns import is_component
from ..sharding import Factors

if TYPE_CHECKING:
    from .config import AromaConfig
    from .layer import AromaLinear

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PlainAdapter:
    """What the files beside an adapter's collected tensors need to know of them.

    Args:
        ranks: Rank of every growing module by its name, also 0.
        shapes: (m, n) of every growing module.
        trained: Whether any component in training has moved from its start.
        digest: `components_digest` of the tensors.
        fan_in_fan_out: Whether a base layer stores its weight as (n, m).
    """

    ranks: dict[str, int]
    shapes: dict[str, tuple[int, int]]
    trained: bool
    digest: str
    fan_in_fan_out: bool


def plain_config(config: AromaConfig, ranks: Mapping[str, int], fan_in_fan_out: bool) -> LoraConfig:
    """Return the plain LoRA configuration for a live one, given the rank of every growing module by its name."""
    targets = _targets(ranks)
    r = min(targets.values())
    patterns = {f"^{re.escape(name)}": rank for name, rank in targets.items() if rank != r}
    return LoraConfig(
        r=r,
        lora_alpha=r,
        lora_dropout=config.lora_dropout,
        target_modules=sorted(targets),
        rank_pattern=dict(patterns),
        alpha_pattern=dict(patterns),
        fan_in_fan_out=fan_in_fan_out,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=config.inference_mode,
    )


def _targets(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return the ranks of the modules that have tensors. PEFT refuses an adapter without any: then one has zeros."""
    return {name: rank for name, rank in ranks.items() if rank} or {next(iter(ranks)): 1}


def plain_factors(updates: Mapping[str, Factors], rank: int | None = None) -> dict[str, Factors]:
    """Return the factors B (m, R) and A (R, n) that a plain adapter has tensors of.

    Args:
        updates: Those of every growing module, also with R = 0.
        rank: All modules get it, padded with zeros. None: each has its own, and those of rank 0 are left out.
    """
    targets = _targets({name: len(A) for name, (_, A) in updates.items()}) if rank is None else {}
    chosen = dict.fromkeys(updates, rank or 0) if rank is not None else targets
    return {name: _padded(*updates[name], count) for name, count in chosen.items()}


def plain_tensors(
    layers: Mapping[str, AromaLinear], adapter_name: str, state_dict: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], PlainAdapter]:
    """Collect the plain LoRA tensors of an adapter.

    Args:
        layers: Growing layers by their name in the state dict.
        adapter_name: Adapter to collect.
        state_dict: State dict of the whole model, from which pairs and finished components are taken; nothing that
            trains may be sharded in it.

    Returns:
        Tensors `<layer>.lora_A.<adapter>.weight` (R, n) and `<layer>.lora_B.<adapter>.weight` (m, R) of every module
        with R > 0, and what is known of them. If all have rank 0, one module gets a zero component.
    """
    updates = {key: _whole_update(key, layer, adapter_name, state_dict) for key, layer in layers.items()}
    tensors: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    for key, (B, A) in plain_factors(updates).items():
        tensors |= {f"{key}.lora_A.{adapter_name}.weight": A, f"{key}.lora_B.{adapter_name}.weight": B}
        saved |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
    return tensors, PlainAdapter(
        ranks={module_name(key): len(A) for key, (_, A) in updates.items()},
        shapes={module_name(key): (layer.out_features, layer.in_features) for key, layer in layers.items()},
        trained=any(bool(state_dict[f"{key}.lora_B.{adapter_name}.weight"].any()) for key in layers),
        digest=components_digest(saved),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
    )


def pairs_of(layers: Mapping[str, AromaLinear], adapter_name: str, state_dict: Mapping[str, Tensor]) -> list[Factors]:
    """Return the components in training, b (m, r) and a (r, n), that a state dict of the whole model holds."""
    return [
        (state_dict[f"{key}.lora_B.{adapter_name}.weight"], state_dict[f"{key}.lora_A.{adapter_name}.weight"])
        for key in layers
    ]


def _padded(B: Tensor, A: Tensor, rank: int) -> Factors:
    """Return B (m, R) and A (R, n) with components of zero up to `rank`: (m, rank) and (rank, n)."""
    missing = rank - len(A)
    return (B, A) if not missing else (F.pad(B, (0, missing)), F.pad(A, (0, 0, 0, missing)))


def uniform_config(config: Mapping[str, Any], names: Iterable[str], rank: int) -> dict[str, Any]:
    """Return a configuration, as `adapter_config.json` has it, with one rank for all modules `names`, and scale 1."""
    return {
        **config,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_modules": sorted(names),
        "use_rslora": False,
        "inference_mode": True,
    }


def components_digest(saved: Mapping[str, Tensor]) -> str:
    """Return a digest of the components (any shapes) in an adapter file; trained heads do not count."""
    return tensors_digest({module_name(name): saved[name] for name in saved if is_component(name)})


def finished_tensors(
    layers: Mapping[str, AromaLinear], adapter_name: str, plain: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Turn the plain tensors of a saved adapter into the state-dict entries of a growing one.

    Everything saved becomes finished components, and the pair starts anew at b = 0. A resumed controller takes the
    component that was in training out again (`FinishedComponents.pop`). A module without tensors has rank 0.

    Args:
        layers: Growing layers by their name in the state dict.
        adapter_name: Adapter to load.
        plain: Saved tensors, A (R, n) and B (m, R), by their name in the file, with or without the
            `base_model.model.` prefix.

    Raises:
        CheckpointError: The tensors of a module do not fit it.
    """
    entries: dict[str, Tensor] = {}
    for key, layer in layers.items():
        b, a = layer.pair(adapter_name)
        A, B = (_saved(plain, f"{key}.lora_{side}.weight") for side in "AB")
        if A is None or B is None or not (A.any() or B.any()):  # zeros: of an adapter whose ranks are all 0
            A, B = torch.zeros(0, layer.in_features), torch.zeros(layer.out_features, 0)
        if A.ndim != 2 or A.shape[1] != layer.in_features or B.shape != (layer.out_features, len(A)):
            raise CheckpointError(
                f"{module_name(key)}: the saved components, A {tuple(A.shape)} and B {tuple(B.shape)}, are not those "
                f"of this {type(layer.get_base_layer()).__name__}; load the adapter into the model that it was "
                "trained on"
            )
        entries[f"{key}.lora_finished.{adapter_name}.A"] = A.to(a.dtype)
        entries[f"{key}.lora_finished.{adapter_name}.B"] = B.to(a.dtype)
        entries[f"{key}.lora_A.{adapter_name}.weight"] = a.detach()
        entries[f"{key}.lora_B.{adapter_name}.weight"] = torch.zeros_like(b)
    return entries


def _whole_update(key: str, layer: AromaLinear, adapter_name: str, state_dict: Mapping[str, Tensor]) -> Factors:
    """Return B (m, R) and A (R, n) of one layer, the pair last if it has moved."""
    a = state_dict[f"{key}.lora_A.{adapter_name}.weight"]
    b = state_dict[f"{key}.lora_B.{adapter_name}.weight"]
    A = state_dict[f"{key}.lora_finished.{adapter_name}.A"].to(a)
    B = state_dict[f"{key}.lora_finished.{adapter_name}.B"].to(b)
    if not b.any():
        return B, A
    return torch.cat([B, b * layer.own_scaling[adapter_name]], dim=1), torch.cat([A, a], dim=0)


def module_name(key: str) -> str:
    """Return the name of a module in the base model for its key in a state dict."""
    return key.removeprefix(PEFT_PREFIX)


def _saved(plain: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return a saved tensor of any shape by its name, with or without PEFT's prefix."""
    for candidate in (name, PEFT_PREFIX + name, module_name(name)):
        if candidate in plain:
            return plain[candidate]
    return None
