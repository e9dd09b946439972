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

from ..errors import CheckpointError
from ..files import tensors_digest
from ..sharding import Factors
from .forms import Form, is_component

if TYPE_CHECKING:
    from .config import AromaConfig
    from .layer import AromaLinear

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PlainAdapter:
    """What the files beside an adapter's collected tensors need to know of them.

    Args:
        ranks: Rank of every module that has tensors, by module name.
        shapes: (m, n) of every growing module, also with rank 0.
        forms: Form of every growing module.
        trained: Whether any component in training has moved from its start.
        digest: `components_digest` of the tensors.
        fan_in_fan_out: Whether a base layer stores its weight as (n, m).
    """

    ranks: dict[str, int]
    shapes: dict[str, tuple[int, int]]
    forms: dict[str, Form]
    trained: bool
    digest: str
    fan_in_fan_out: bool

    def lora_config(self, config: AromaConfig) -> LoraConfig:
        """Return the plain LoRA configuration of the adapter whose live configuration is `config`."""
        r = min(self.ranks.values())
        patterns = {f"^{re.escape(name)}": rank for name, rank in self.ranks.items() if rank != r}
        return LoraConfig(
            r=r,
            lora_alpha=r,
            lora_dropout=config.lora_dropout,
            target_modules=sorted(self.ranks),
            rank_pattern=dict(patterns),
            alpha_pattern=dict(patterns),
            fan_in_fan_out=self.fan_in_fan_out,
            modules_to_save=config.modules_to_save,
            task_type=config.task_type,
            base_model_name_or_path=config.base_model_name_or_path,
            revision=config.revision,
            inference_mode=config.inference_mode,
        )


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
        Tensors `<layer>.lora_A.<adapter>.weight` (R, n) and `<layer>.lora_B.<adapter>.weight` (m, R), or what the form
        of the layer has instead, of every module with R > 0, and what is known of them. If all have rank 0, one module
        gets a zero component.
    """
    updates: dict[str, Factors] = {}
    ranks: dict[str, int] = {}
    for key, layer in layers.items():
        B, A = _whole_update(key, layer, adapter_name, state_dict)
        if A.shape[0]:
            ranks[_module_name(key)] = A.shape[0]
            updates[key] = B, A
    trained = any(bool(state_dict[f"{key}.lora_B.{adapter_name}.weight"].any()) for key in layers)
    if not ranks:
        # PEFT refuses an adapter without targets, and a rank of 0; a zero component is the same function.
        key, layer = next(iter(layers.items()))
        pair_a = state_dict[f"{key}.lora_A.{adapter_name}.weight"]
        ranks[_module_name(key)] = 1
        updates[key] = pair_a.new_zeros(layer.out_features, 1), pair_a.new_zeros(1, layer.in_features)
    tensors, saved = (
        {
            f"{key}.{layers[key].kind.form.name(side, name)}": tensor
            for key, update in updates.items()
            for side, tensor in zip("AB", layers[key].kind.form.write(*update), strict=True)
        }
        for name in (adapter_name, None)
    )
    shapes = {_module_name(key): (layer.out_features, layer.in_features) for key, layer in layers.items()}
    forms = {_module_name(key): layer.kind.form for key, layer in layers.items()}
    transposed = any(layer.fan_in_fan_out for layer in layers.values())
    return tensors, PlainAdapter(ranks, shapes, forms, trained, components_digest(saved), transposed)


def pairs_of(layers: Mapping[str, AromaLinear], adapter_name: str, state_dict: Mapping[str, Tensor]) -> list[Factors]:
    """Return the components in training, b (m, r) and a (r, n), that a state dict of the whole model holds."""
    return [
        (state_dict[f"{key}.lora_B.{adapter_name}.weight"], state_dict[f"{key}.lora_A.{adapter_name}.weight"])
        for key in layers
    ]


def padded(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (m, R) and A (R, n) with components of zero up to `rank`: (m, rank) and (rank, n)."""
    wide, tall = B.new_zeros(B.shape[0], rank), A.new_zeros(rank, A.shape[1])
    wide[:, : B.shape[1]], tall[: A.shape[0]] = B, A
    return wide, tall


def uniform_config(config: Mapping[str, Any], names: Iterable[str], rank: int) -> dict[str, Any]:
    """Return the configuration of an adapter whose modules all have one rank, and the scale 1.

    Args:
        config: Its configuration with ranks of their own, as `adapter_config.json` has it.
        names: The modules.
        rank: The rank.
    """
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
    return tensors_digest({_module_name(name): saved[name] for name in saved if is_component(name)})


def finished_tensors(
    layers: Mapping[str, AromaLinear], adapter_name: str, plain: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Turn the plain tensors of a saved adapter into the state-dict entries of a growing one.

    Everything saved becomes finished components, and the pair starts anew at b = 0. A resumed controller takes the
    component that was in training out again (`FinishedComponents.pop`). A module without tensors has rank 0.

    Args:
        layers: Growing layers by their name in the state dict.
        adapter_name: Adapter to load.
        plain: Saved tensors, A (R, n) and B (m, R) of linear layers, by their name in the file, with or without the
            `base_model.model.` prefix.

    Raises:
        CheckpointError: The tensors of a module do not fit it.
    """
    entries: dict[str, Tensor] = {}
    for key, layer in layers.items():
        b, a = layer.pair(adapter_name)
        B, A = _saved_update(key, layer, plain)
        if not A.any() and not B.any():
            A, B = A[:0], B[:, :0]  # the placeholder of an adapter whose ranks are all 0
        entries[f"{key}.lora_finished.{adapter_name}.A"] = A.to(a.dtype)
        entries[f"{key}.lora_finished.{adapter_name}.B"] = B.to(a.dtype)
        entries[f"{key}.lora_A.{adapter_name}.weight"] = a.detach()
        entries[f"{key}.lora_B.{adapter_name}.weight"] = torch.zeros_like(b)
    return entries


def _whole_update(
    key: str, layer: AromaLinear, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return B (m, R) and A (R, n) of one layer, the pair last if it has moved."""
    a = state_dict[f"{key}.lora_A.{adapter_name}.weight"]
    b = state_dict[f"{key}.lora_B.{adapter_name}.weight"]
    A = state_dict[f"{key}.lora_finished.{adapter_name}.A"].to(a)
    B = state_dict[f"{key}.lora_finished.{adapter_name}.B"].to(b)
    moved = layer.moved_slots(adapter_name, b)
    if not moved:
        return B, A
    return torch.cat([B, b[:, moved] * layer.own_scaling[adapter_name]], dim=1), torch.cat([A, a[moved]], dim=0)


def _saved_update(key: str, layer: AromaLinear, plain: Mapping[str, Tensor]) -> Factors:
    """Return B (m, R) and A (R, n) of one layer from saved tensors, any shape by name; R = 0 where there are none."""
    form = layer.kind.form
    A, B = (_saved(plain, f"{key}.{form.name(side)}") for side in "AB")
    if A is None or B is None:
        return torch.zeros(layer.out_features, 0), torch.zeros(0, layer.in_features)
    factors = form.read(A, B)
    if factors is None:
        raise CheckpointError(
            f"{_module_name(key)}: the saved components, A {tuple(A.shape)} and B {tuple(B.shape)}, are not those of "
            f"this {type(layer.get_base_layer()).__name__}; load the adapter into the model that it was trained on"
        )
    return factors


def _module_name(key: str) -> str:
    return key.removeprefix(PEFT_PREFIX)


def _saved(plain: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return a saved tensor of any shape by its name, with or without PEFT's prefix."""
    for candidate in (name, PEFT_PREFIX + name, _module_name(name)):
        if candidate in plain:
            return plain[candidate]
    return None
