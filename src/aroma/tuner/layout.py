"""The plain LoRA form of a growing adapter: how it is written at any moment, and how it is read back.

Ranks differ between modules, so the plain form names every module with a rank above 0 as a target and gives its rank.
The scale is folded into B, so alpha equals the rank everywhere, and an engine that reads only `r` and `lora_alpha`
scales by 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

from ..errors import CheckpointError, bad_value
from ..state import is_component, module_name
from .finished import Factors

if TYPE_CHECKING:
    from .config import AromaConfig
    from .layer import AromaLinear

# Written -------------------------------------------------------------------------------------------------------------


def plain_config(
    config: AromaConfig, ranks: Mapping[str, int], names: Iterable[str], fan_in_fan_out: bool
) -> dict[str, Any]:
    """Return the plain LoRA configuration, JSON-able, of an adapter whose growing modules have `ranks`.

    `names` are those of all modules: PEFT takes for a target, too, whose name ends with that of one.
    """
    targets = _targets(ranks)
    also = sorted(name for name in {*names} - {*targets} if name.endswith(tuple(f".{one}" for one in targets)))
    r = min(targets.values())
    patterns = {f"^{re.escape(name)}": rank for name, rank in targets.items() if rank != r}
    plain = LoraConfig(
        r=r,
        lora_alpha=r,
        lora_dropout=config.lora_dropout,
        target_modules=sorted(targets),
        exclude_modules="|".join(map(re.escape, also)) or None,
        rank_pattern=dict(patterns),
        alpha_pattern=dict(patterns),
        fan_in_fan_out=fan_in_fan_out,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=config.inference_mode,
    )
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(plain.to_dict().items())}


def _targets(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return the ranks of the modules that have tensors. PEFT refuses an adapter without any: then one has zeros."""
    return {name: rank for name, rank in ranks.items() if rank} or {next(iter(ranks)): 1}


def plain_factors(updates: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return the factors B (m, R) and A (R, n) that a plain adapter has tensors of, of those of all modules."""
    ranks = _targets({name: len(A) for name, (_, A) in updates.items()})
    return {name: padded(*updates[name], rank) for name, rank in ranks.items()}


def padded(B: Tensor, A: Tensor, rank: int) -> Factors:
    """Return B (m, R) and A (R, n) with components of zero up to `rank`: (m, rank) and (rank, n)."""
    missing = rank - len(A)
    return F.pad(B, (0, missing)), F.pad(A, (0, 0, 0, missing))


# To and from the state dict of the live model ------------------------------------------------------------------------


def components_in(
    state_dict: Mapping[str, Tensor], key: str, layer: AromaLinear, adapter_name: str
) -> tuple[Factors, Factors]:
    """Return the finished components, B (m, R) and A (R, n), and the pair, b (m, r) and a (r, n), of one module.

    `state_dict`, in which `layer` is called `key`, is whole. If DeepSpeed has collected it, it lacks frozen pairs, and
    has buffers with their padding.
    """
    finished, stem = layer.finished(adapter_name), f"{key}.lora_finished.{adapter_name}"
    A, B = state_dict.get(f"{stem}.A", finished.A), state_dict.get(f"{stem}.B", finished.B)
    # Only zeros are padding: a state dict of another moment may have more components.
    if len(A) > finished.rank and not A[finished.rank :].any():
        A, B = A[: finished.rank], B[:, : finished.rank]
    b, a = (f"{key}.lora_{side}.{adapter_name}.weight" for side in "BA")
    if layer.is_frozen(adapter_name) and b not in state_dict:
        r = layer.r[adapter_name]
        return (B, A), (B.new_zeros(layer.out_features, r), A.new_zeros(r, layer.in_features))
    pair = state_dict[b], state_dict[a]
    return (B.to(pair[0]), A.to(pair[1])), pair


def finished_tensors(
    layers: Mapping[str, AromaLinear], adapter_name: str, plain: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Turn the plain tensors of a saved adapter into the state-dict entries of a growing one.

    Everything saved, A (R, n) and B (m, R) by name, becomes finished components, and the pair starts anew at b = 0. A
    resumed controller takes the component that was in training out again. A module without tensors has rank 0.

    Raises:
        CheckpointError: The tensors of a module do not fit it.
        ConfigError: There are tensors of a module that does not grow; PEFT would drop them silently.
    """
    saved = {module_name(name): tensor for name, tensor in plain.items() if is_component(name)}
    entries: dict[str, Tensor] = {}
    for key, layer in layers.items():
        b, a = layer.pair(adapter_name)
        A, B = (saved.pop(f"{module_name(key)}.lora_{side}.weight", None) for side in "AB")
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
    if saved:
        raise bad_value(
            "target_modules",
            min(saved).partition(".lora_")[0],
            "the saved adapter has components for it, and it does not grow in this model; make the adapter with the "
            "target_modules of the saved one",
        )
    return entries
