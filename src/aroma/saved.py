"""A saved adapter read back: every field and every tensor is checked before anything is computed from it.

Reads any plain LoRA folder of PEFT; every saved AROMA adapter is one. `aroma_state.json` vouches for one that AROMA
saved: it has the digests of the tensor files and a copy of the configuration. Nothing vouches for another, so of that
only what contradicts itself is noticed.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from .errors import AromaError, AromaWarning, CheckpointError, bad_value, shown_value
from .files import own_file, read_json, read_tensors, require_adapter_folder
from .forms import LINEAR, Form, form_of_tensor
from .patterns import Patterns, wrong
from .tuner.layout import PEFT_PREFIX, is_component, plain_factors
from .tuner.state import LARGEST_SIDE, STATE_FILE, is_whole, read_state, require_files

_MOVABLE = ("base_model_name_or_path", "revision")
"""Fields that a person changes when the base model has moved: the adapter stays what it is, so it is only told."""

_INFORMATIVE = ("peft_version", "inference_mode")
"""Fields that change nothing of what is computed."""

_SETS = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save")
"""Fields whose order says nothing; PEFT writes them from sets."""


@dataclass(frozen=True)
class Update:
    """The update of one matrix, ΔW = B A.

    Args:
        B: (m, R), the scale folded in.
        A: (R, n).
        alpha: What PEFT divides by the rank, or its root with use_rslora, to get the scale.
        form: How a plain adapter holds it.
    """

    B: Tensor
    A: Tensor
    alpha: float
    form: Form = LINEAR

    @property
    def rank(self) -> int:
        """R."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def is_zero(self) -> bool:
        """Whether all is 0, as in the one component of an adapter whose ranks are all 0."""
        return not self.A.any() and not self.B.any()


@dataclass(frozen=True)
class AdapterWeights:
    """A plain LoRA adapter in memory.

    Args:
        config: Content of `adapter_config.json`.
        updates: The update of every adapted module by its name in the base model, in the order of layers.
        others: Further tensors by their name in the file, such as trained heads (`modules_to_save`); any shape.
        state: Content of `aroma_state.json`; None for an adapter that AROMA did not save.
    """

    folder: Path
    config: dict[str, Any]
    updates: dict[str, Update]
    others: dict[str, Tensor]
    state: dict[str, Any] | None

    @property
    def tensor_names(self) -> list[str]:
        """Names of all tensors of components in the file, without PEFT's prefix."""
        return [f"{name}.{update.form.name(side)}" for name, update in self.updates.items() for side in "AB"]

    def component_tensors(self, rank: int | None = None) -> dict[str, Tensor]:
        """Return the tensors of a file, of any shape; with a `rank`, of all that could grow, padded to it."""
        empty = {name: (torch.zeros(m, 0), torch.zeros(0, n)) for name, (m, n) in self.shapes.items()}
        factors = plain_factors(empty | {name: (one.B, one.A) for name, one in self.updates.items()}, rank)
        tensors: dict[str, Tensor] = {}
        for name, (B, A) in factors.items():
            form = self.updates[name].form if name in self.updates else LINEAR
            tensors |= form.tensors(f"{PEFT_PREFIX}{name}", B, A)
        return tensors

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(m, n) of every module that could grow; without an `aroma_state.json`, of every adapted module."""
        if self.state is None:
            return {name: update.shape for name, update in self.updates.items()}
        return {name: (entry["shape"][0], entry["shape"][1]) for name, entry in self.state["modules"].items()}

    def lora_config(self) -> LoraConfig:
        """Return a configuration that names modules and ranks one by one.

        PEFT is given it in place of the file's: it would match the patterns there without a limit.
        """
        r = min(update.rank for update in self.updates.values())
        return LoraConfig(
            r=r,
            lora_alpha=r,
            rank_pattern={f"^{re.escape(name)}": update.rank for name, update in self.updates.items()},
            alpha_pattern={f"^{re.escape(name)}": update.alpha for name, update in self.updates.items()},
            target_modules=list(self.updates),
            use_rslora=bool(self.config.get("use_rslora")),
            fan_in_fan_out=bool(self.config.get("fan_in_fan_out")),
            bias=self.config.get("bias", "none"),
            modules_to_save=self.config.get("modules_to_save"),
            ensure_weight_tying=bool(self.config.get("ensure_weight_tying")),
            task_type=self.config.get("task_type"),
            base_model_name_or_path=self.config.get("base_model_name_or_path"),
            revision=self.config.get("revision"),
            inference_mode=True,
        )


def read_adapter(folder: str | os.PathLike[str]) -> AdapterWeights:
    """Read a plain LoRA adapter, with each module's scale folded into its B.

    Raises:
        CheckpointError: The folder, a file, a field or a tensor is missing, damaged or edited.
        ConfigError: The adapter is not a plain LoRA adapter.

    Warns:
        AromaWarning: The base model that it names was changed since it was saved.
    """
    path = require_adapter_folder(folder)
    # Whatever bears the name: a symlink to nowhere is a damaged state, and not an adapter of somebody else.
    state = read_state(path) if os.path.lexists(path / STATE_FILE) else None
    config = read_config(path)
    if state is not None:
        _require_saved_config(path / CONFIG_NAME, config, state.get("adapter_config"))
        require_files(path, state)
    _require_plain(path / CONFIG_NAME, config)
    weights = own_file(path, SAFETENSORS_WEIGHTS_NAME)
    tensors = read_tensors(weights)
    _require_numbers(weights, tensors)
    updates, others = _split(weights, tensors, config)
    updates = dict(sorted(updates.items(), key=lambda item: _natural(item[0])))
    if state is not None:
        _require_modules(weights, updates, state["modules"])
        _require_no_scale(path / CONFIG_NAME, config, updates)
    return AdapterWeights(path, config, updates, others, state)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of `adapter_config.json` in `folder`; of its fields nothing is known yet.

    Raises:
        CheckpointError: It is missing, damaged or no configuration.
    """
    path = own_file(require_adapter_folder(folder), CONFIG_NAME)
    config = read_json(path)
    if not isinstance(config, dict) or "peft_type" not in config:
        found = "peft_type" if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(
            f"{path}: no configuration of an adapter ({found}{' is missing' if isinstance(config, dict) else ''}); "
            "use another checkpoint"
        )
    for name in ("base_model_name_or_path", "revision", "task_type", "peft_type"):
        if not isinstance(config.get(name), str | None) or "\0" in (config.get(name) or ""):
            raise wrong(path, name, config[name], "give a name")
    return config


def require_vouched(folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Check that configuration and files in `folder` are those that `state`, its `aroma_state.json`, vouches for.

    Raises:
        CheckpointError: One is missing, damaged or edited; file and field are named.
    """
    path = require_adapter_folder(folder)
    _require_saved_config(path / CONFIG_NAME, read_config(path), state.get("adapter_config"))
    require_files(path, state)


# The configuration ---------------------------------------------------------------------------------------------------


def _require_saved_config(path: Path, config: Mapping[str, Any], saved: Mapping[str, Any] | None) -> None:
    """Raise if a field that decides what is computed was changed since the adapter was saved; warn of a new base."""
    if saved is None:
        return  # saved by an early version; what contradicts the tensors is still noticed
    for name in sorted({*config, *saved} - {*_INFORMATIVE}):
        now, then = _normal(name, config), _normal(name, saved)
        if now == then:
            continue
        if name in _MOVABLE:
            warnings.warn(
                f"{path}: {name}={config.get(name)!r}: edited since the adapter was saved, as {saved.get(name)!r}; "
                "its updates are right only for the same weights",
                AromaWarning,
                stacklevel=4,
            )
        elif not (name == "task_type" and saved.get(name) is None):
            raise wrong(
                path,
                name,
                config.get(name),
                f"edited since the adapter was saved, as {shown_value(saved.get(name), 200)}; put that back, or use "
                "another checkpoint (a base model that has moved may be given as base_model_name_or_path)",
            )


def _normal(name: str, config: Mapping[str, Any]) -> str:
    """Return the value of a field as text in which equal meanings are equal; a missing one has PEFT's default."""
    value = config.get(name, _defaults().get(name))
    if name in _SETS and isinstance(value, list):
        value = sorted(value, key=str)
    return json.dumps(value, sort_keys=True, default=str)


@cache
def _defaults() -> dict[str, Any]:
    return {
        item.name: item.default if item.default_factory is MISSING else {}
        for item in fields(LoraConfig)
        if item.default is not MISSING or item.default_factory is dict
    }


_OFF: tuple[str, ...] = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    *(item.name for item in fields(LoraConfig) if item.metadata.get("is_lora_variant")),
)
"""Fields by which an update is more than B A, or lies elsewhere."""

_CHANGE_BASE = ("pissa", "olora", "loftq", "corda", "mica", "lora_ga")
"""Beginnings of values of init_lora_weights by which PEFT changes the base weights, too, when it loads an adapter."""


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of plain LoRA: an update is B A and nothing else."""
    return config["peft_type"] == "LORA" and not any(config.get(name) for name in _OFF)


def _require_plain(path: Path, config: Mapping[str, Any]) -> None:
    """Raise unless a configuration is that of a plain LoRA adapter, with fields of their types.

    Raises:
        CheckpointError: A field is of a wrong type or beyond all bounds.
        ConfigError: It is another kind of adapter.
    """
    if not is_plain(config):
        field = next((name for name in _OFF if config.get(name)), "peft_type")
        raise bad_value(
            field, config[field], f"in {path}: only plain LoRA adapters can be read (no DoRA, no bias, no variant)"
        )
    unknown = [name for name in sorted({*config} - {*_defaults(), "runtime_config"}) if config[name]]
    if unknown:
        raise wrong(
            path, unknown[0], config[unknown[0]], "this version of peft does not know it; upgrade peft, or remove it"
        )
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool | str | None) or str(start).lower().startswith(_CHANGE_BASE):
        raise bad_value(
            "init_lora_weights",
            start,
            f"in {path}: it changes the base weights, too; convert the adapter with PEFT's "
            "path_initial_model_for_weight_conversion",
        )
    expected: dict[str, tuple[bool, str]] = {
        "r": (is_whole(config.get("r", 8), 1, LARGEST_SIDE), "give a rank"),
        "lora_alpha": (_is_scale(config.get("lora_alpha", 8)), "give a finite number"),
        "rank_pattern": (_is_pattern(config.get("rank_pattern"), _is_rank), "give ranks by module"),
        "alpha_pattern": (_is_pattern(config.get("alpha_pattern"), _is_scale), "give numbers by module"),
        "target_modules": (_is_names(config.get("target_modules"), or_text=True), "give names of modules"),
        "exclude_modules": (_is_names(config.get("exclude_modules"), or_text=True), "give names of modules"),
        "modules_to_save": (_is_names(config.get("modules_to_save")), "give names of modules"),
        "use_rslora": (isinstance(config.get("use_rslora"), bool | None), "give true or false"),
        "fan_in_fan_out": (isinstance(config.get("fan_in_fan_out"), bool | None), "give true or false"),
        "bias": (config.get("bias", "none") in ("none", "all", "lora_only"), "give none, all or lora_only"),
        "auto_mapping": (isinstance(config.get("auto_mapping"), dict | None), "leave it out"),
    }
    for name, (fits, remedy) in expected.items():
        if not fits:
            raise wrong(path, name, config.get(name), f"{remedy}, or use another checkpoint")


def _is_rank(value: object) -> bool:
    return is_whole(value, 1, LARGEST_SIDE)


def _is_scale(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_pattern(value: object, fits: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(fits, value.values())))


def _is_names(value: object, or_text: bool = False) -> bool:
    if value is None or (or_text and isinstance(value, str)):
        return True
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# Tensors -------------------------------------------------------------------------------------------------------------


def _split(
    path: Path, tensors: dict[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Update], dict[str, Tensor]]:
    """Return the updates of modules, and all other tensors; any shapes, each checked.

    Raises:
        CheckpointError: A tensor is missing, of a wrong kind, not finite, or not as the configuration says.
        ConfigError: A tensor belongs to another kind of adapter.
    """
    own = path.parent / CONFIG_NAME
    patterns = Patterns(own, config)
    others = dict(tensors)
    updates: dict[str, Update] = {}
    for key in tensors:
        found = form_of_tensor(key, tensors[key])
        if found is None:
            continue
        stem, form = found
        first, second = others.pop(key), others.pop(f"{stem}.{form.name('B')}", None)
        if first.ndim < 2:
            raise CheckpointError(
                f"{path}: {key} is no matrix, its shape is {tuple(first.shape)}; use another checkpoint"
            )
        factors = None if second is None else form.factors(first, second)
        if factors is None:
            raise CheckpointError(
                f"{path}: {stem} has an A of rank {first.shape[0]} and no fitting B; the file is damaged, use another "
                "checkpoint"
            )
        B, A = factors
        name = stem.removeprefix(PEFT_PREFIX)
        rank = patterns.value("rank_pattern", name, config.get("r", 8))
        if rank != A.shape[0]:
            raise wrong(own, "rank_pattern", rank, f"{path.name} has rank {A.shape[0]} for {name}; one was edited")
        if not patterns.names("target_modules", name) or patterns.names("exclude_modules", name):
            raise wrong(
                own, "target_modules", config.get("target_modules"), f"{path.name} has {name}, too; one was edited"
            )
        alpha = float(patterns.value("alpha_pattern", name, config.get("lora_alpha", 8)))
        updates[name] = Update(B.float() * _scale(config, alpha, rank), A.float(), alpha, form)
    stray = next((name for name in others if ".lora_" in name), None)
    if stray is not None:
        raise _stray(path, stray)
    if not updates:
        raise CheckpointError(f"{path}: no lora_A and lora_B in it; not a LoRA adapter")
    _require_targets(own, config.get("target_modules"), updates)
    prefixed = all(name.startswith(PEFT_PREFIX) for name in tensors)
    if not prefixed and any(name.startswith(PEFT_PREFIX) for name in tensors):
        name = next(name for name in tensors if not name.startswith(PEFT_PREFIX))
        raise CheckpointError(f"{path}: {name} is named otherwise than the rest; use another checkpoint")
    return updates, others


def _stray(path: Path, name: str) -> AromaError:
    if is_component(name):
        return CheckpointError(f"{path}: {name} has no lora_A beside it; the file is damaged, use another checkpoint")
    return bad_value("adapter", name, f"in {path}: it is no part of a plain LoRA adapter; give one of those")


def _require_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise if a weight or a bias is empty, no number of floating point, NaN or infinite; any shapes."""
    for name, tensor in tensors.items():
        remedy = None
        if not tensor.numel():
            remedy = f"is empty, of shape {tuple(tensor.shape)}"
        elif name.endswith((".weight", ".bias")) and not tensor.is_floating_point():
            remedy = f"is of {str(tensor.dtype).removeprefix('torch.')}"
        elif tensor.is_floating_point() and not tensor.float().isfinite().all():
            remedy = "has NaN or infinity in it"
        if remedy is not None:
            raise CheckpointError(f"{path}: {name} {remedy}; use another checkpoint")


def _require_targets(path: Path, targets: list[str] | str | None, updates: Iterable[str]) -> None:
    """Raise if a target has no tensors: the file of tensors lacks what the configuration promises."""
    if isinstance(targets, list):
        endings = {ending for name in updates for ending in _endings(name)}
        missing = next((target for target in targets if target not in endings), None)
        if missing is not None:
            raise wrong(path, "target_modules", missing, f"{SAFETENSORS_WEIGHTS_NAME} has no tensors of it")


def _endings(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _scale(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    """Return what PEFT multiplies an update by."""
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _require_modules(path: Path, updates: Mapping[str, Update], modules: Mapping[str, Any]) -> None:
    """Raise if shapes and ranks of the tensors are not those of aroma_state.json.

    It gives rank 0 to the component of zeros that an adapter without updates has. Early versions gave it rank 1.
    """
    empty = {name for name, one in updates.items() if one.rank == 1 and one.is_zero}
    expected = {
        name: (tuple(entry["shape"]), entry["rank"] or 1)
        for name, entry in modules.items()
        if entry["rank"] or name in empty
    }
    found = {name: (update.shape, update.rank) for name, update in updates.items()}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: {name} has shape and rank {found.get(name)}, and {expected.get(name)} in {STATE_FILE}; one "
                "of them is of another save, use another checkpoint"
            )


def _require_no_scale(path: Path, config: Mapping[str, Any], updates: Mapping[str, Update]) -> None:
    """Raise if an update that AROMA saved has a scale: it folds all scales into B."""
    for name, update in updates.items():
        if update.alpha != update.rank or config.get("use_rslora"):
            raise wrong(
                path, "lora_alpha", update.alpha, f"{name} has rank {update.rank}, and no scale; put that back"
            )


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]
