"""Reads saved adapters, and checks them before anything is computed from them.

Reads any plain LoRA folder of PEFT; every saved AROMA adapter is one. Adapters that AROMA saved are compared with the
checksums in `aroma_state.json`. All others have none, so only contradictions between their files are errors.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from .errors import CheckpointError, bad_value
from .files import own_file, read_tensors, require_adapter_folder
from .ranks import in_order
from .state import CONFIG_NAME, PEFT_PREFIX, STATE_FILE, WEIGHTS_NAME, factors, read_config, read_state
from .tuner.layout import padded

_OFF: tuple[str, ...] = (
    *("use_dora", "lora_bias", "use_qalora", "layer_replication", "target_parameters", "trainable_token_indices"),
    *(item.name for item in fields(LoraConfig) if item.metadata.get("is_lora_variant")),
)
"""Fields by which an update is more than B A, or lies elsewhere."""

_CHANGE_BASE = ("pissa", "olora", "loftq", "corda", "mica", "lora_ga")
"""Beginnings of values of init_lora_weights by which PEFT changes the base weights, too, when it loads an adapter."""


@dataclass(frozen=True)
class Update:
    """The update of one matrix, ΔW = B A (of an embedding, whose table PEFT holds transposed, ΔWᵀ).

    B is (m, R), with the scale folded in, and A (R, n); `kernel`: of a convolution, its input channels and sizes,
    whose product is n; `is_embedding`: whether PEFT names the tensors as those of an embedding.
    """

    B: Tensor
    A: Tensor
    kernel: tuple[int, ...] = ()
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """R."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.B.shape[0], self.A.shape[1]

    def tensors(self, module: str, rank: int) -> dict[str, Tensor]:
        """Return PEFT's two tensors of the module by their names, padded with components of zero to `rank`."""
        B, A = padded(self.B, self.A, rank)
        if self.kernel:
            A, B = A.reshape(rank, *self.kernel), B.reshape(*B.shape, *(1 for _ in self.kernel[1:]))
        name = "lora_embedding_{}" if self.is_embedding else "lora_{}.weight"
        return {f"{PEFT_PREFIX}{module}.{name.format(side)}": tensor for side, tensor in (("A", A), ("B", B))}


@dataclass(frozen=True)
class AdapterWeights:
    """A plain LoRA adapter in memory.

    `config` and `state` are the contents of `adapter_config.json` and `aroma_state.json` (None for an adapter that
    AROMA did not save), `updates` those of all adapted modules by name, in the order of layers, and `others` further
    tensors by their names in the file, such as trained heads (`modules_to_save`).
    """

    folder: Path
    config: dict[str, Any]
    updates: dict[str, Update]
    others: dict[str, Tensor]
    state: dict[str, Any] | None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(m, n) of every module that could grow; without an `aroma_state.json`, of every adapted module."""
        modules = (self.state or {}).get("modules", {})
        grown = {name: (entry["shape"][0], entry["shape"][1]) for name, entry in modules.items()}
        return grown | {name: update.shape for name, update in self.updates.items()}


def read_adapter(folder: str | os.PathLike[str]) -> AdapterWeights:
    """Read a plain LoRA adapter, with each module's scale folded into its B.

    Raises:
        CheckpointError: The folder, a file, a field or a tensor is missing, damaged or edited.
        ConfigError: The adapter is not a plain LoRA adapter.
    """
    path = require_adapter_folder(folder)
    state = read_state(path) if os.path.lexists(path / STATE_FILE) else None
    config = read_config(path)
    if field := _variant(config):
        remedy = f"in {path / CONFIG_NAME}: only plain LoRA adapters can be read (no DoRA, no bias, no variant)"
        raise bad_value(field, config[field], remedy)
    file = own_file(path, WEIGHTS_NAME)
    others = read_tensors(file)
    try:
        updates = _take_updates(others, config)
    except (AttributeError, TypeError, ValueError, RuntimeError, OverflowError, ZeroDivisionError, re.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file}: it and {CONFIG_NAME} are no LoRA adapter ({reason}); use another checkpoint"
        ) from error
    if stray := next((name for name in others if ".lora_" in name), None):
        raise CheckpointError(f"{file}: {stray} has no place in a plain LoRA adapter; use another checkpoint")
    return AdapterWeights(path, config, updates, others, state)


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of plain LoRA: an update is B A and nothing else."""
    return _variant(config) is None


def _variant(config: Mapping[str, Any]) -> str | None:
    """Return the field by which an adapter is more than plain LoRA; None if it is not."""
    if config["peft_type"] != "LORA":
        return "peft_type"
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGE_BASE):
        return "init_lora_weights"
    return next((name for name in _OFF if config.get(name)), None)


def _take_updates(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Update]:
    """Take the updates of modules out of `tensors` (any shapes), with the scale folded into B."""
    found: dict[str, Update] = {}
    for name, tensor in tensors.items():
        if not tensor.numel() or (tensor.is_floating_point() and not tensor.float().isfinite().all()):
            raise ValueError(f"{name} is empty, or has NaN or infinity in it")
    for part, name_of_B in factors([*tensors]):
        module, tensor, B = part["module"], tensors[part.string], tensors.get(name_of_B)
        if B is None or not 2 <= tensor.ndim == B.ndim or B.flatten(1).shape[1] != len(tensor):
            raise ValueError(f"{module} has an A of rank {len(tensor)} and no fitting B")
        if not (tensor.is_floating_point() and B.is_floating_point()):
            raise ValueError(f"{module} has components of {tensor.dtype} and {B.dtype}")
        module = module.removeprefix(PEFT_PREFIX)
        scale = _scale(module, len(tensor), config)
        kernel, is_embedding = tuple(tensor.shape[1:]) if tensor.ndim > 2 else (), bool(part["embedding"])
        found[module] = Update(B.float().flatten(1) * scale, tensor.float().flatten(1), kernel, is_embedding)
        del tensors[part.string], tensors[name_of_B]
    if not found:
        raise ValueError("it holds no lora_A and lora_B")
    return dict(sorted(found.items(), key=lambda item: in_order(item[0])))


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """Return what PEFT multiplies an update by."""
    said: list[float] = []
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        own = config.get(pattern) or {}
        said.append(own.get(get_pattern_key(own.keys(), module), config.get(default, 8)))
    if said[0] != rank:
        raise ValueError(f"{module} has rank {rank}, and {said[0]} in the configuration")
    scale = said[1] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isfinite(scale):
        raise ValueError(f"{module} has the scale {scale}")
    return scale


def zero_update(shape: tuple[int, int]) -> Update:
    """Return the update of rank 0 of a matrix of `shape` (m, n)."""
    return Update(torch.zeros(shape[0], 0), torch.zeros(0, shape[1]))
