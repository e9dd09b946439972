"""Compressing a saved adapter by size alone: no base model is read, so it works wherever it was trained."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

from ..errors import CheckpointError, NonFiniteError, bad_value
from ..files import own_file, read_tensors, require_adapter_folder, write_json, write_tensors
from ..outputs import TASK_FILE, TOKENIZER_FILES, copy_files, filled_at_once, new_folder
from ..state import CONFIG_NAME, PEFT_PREFIX, WEIGHTS_NAME, factors, read_config
from .metric import Product, by_size, cut, spectrum, worths
from .plan import Compression, Limits, conclude
from .weights import compact_fields, require_products, wide


@dataclass(frozen=True)
class _Saved:
    """A saved update that can be cut: its module, the names of its tensors, and these, as PEFT shapes them."""

    name: str
    names: tuple[str, str]
    A: Tensor
    B: Tensor
    scale: float
    is_pinned: bool

    @property
    def r(self) -> int:
        """Its rank."""
        return len(self.A)

    @property
    def cost(self) -> int:
        """Numbers that one direction stores."""
        return (self.A.numel() + self.B.numel()) // self.r

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.A.element_size()

    def product(self) -> Product:
        """Return the update, with the scale folded in."""
        return Product(wide(self.B).flatten(1)[None] * self.scale, wide(self.A).flatten(1)[None])

    def tensors(self, product: Product) -> dict[str, Tensor]:
        """Return the tensors of another product, of scale 1, in the shapes and types of this one."""
        A = product.A[0].reshape(-1, *self.A.shape[1:]).to(self.A.dtype)
        B = product.B[0].reshape(len(self.B), -1, *self.B.shape[2:]).to(self.B.dtype)
        return dict(zip(self.names, (A.contiguous(), B.contiguous()), strict=True))


def compress_saved(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, size: float | None = None, rank: int | None = None
) -> Compression:
    """Write a saved LoRA adapter with its largest singular directions alone; see `compress` without batches.

    Everything else in the files stays: heads, magnitudes of DoRA, and layers that cannot be cut.

    Args:
        folder: A LoRA adapter that PEFT saved.
        out: Folder to write; new or empty.
        size: As for `compress`.
        rank: As for `compress`.

    Raises:
        ConfigError: A value out of range, or an adapter whose updates cannot be cut without its base model.
        CheckpointError: A file is missing or damaged.
        OutputError: `out` is not empty, or cannot be written.
    """
    limits = Limits(None, size, rank)
    limits.require_valid(has_examples=False)
    target, path = new_folder("out", out), require_adapter_folder(folder)
    config = read_config(path)
    require_products(config)
    if config.get("target_parameters"):
        remedy = "which matrices experts have is known to their base model only; give data, or use aroma.compress"
        raise bad_value("target_parameters", config["target_parameters"], remedy)
    tensors = read_tensors(own_file(path, WEIGHTS_NAME))
    updates, others = _updates(path / WEIGHTS_NAME, tensors, config)
    found = [spectrum(one.product()) for one in updates]
    directions = [by_size(one) for one in found]
    sizes = limits.sizes(updates, [*map(worths, found, directions)])
    result, kept = conclude(limits, updates, sizes, None, sorted(others))
    ranks = {one.name: after for one, after in zip(updates, kept, strict=True)}
    for one, parts, order in zip(updates, found, directions, strict=True):
        for name in one.names:
            del tensors[name]
        if ranks[one.name]:
            tensors |= one.tensors(cut(parts, order, ranks[one.name]))
    fields = compact_fields({name: rank_ for name, rank_ in ranks.items() if rank_}, others, set(), {*ranks, *others})
    with filled_at_once(target) as staging:
        write_tensors(staging / WEIGHTS_NAME, tensors)
        write_json(staging / CONFIG_NAME, {**config, **fields})
        copy_files([path], staging, (*TOKENIZER_FILES, TASK_FILE))
    return result


def _updates(
    file: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[list[_Saved], dict[str, tuple[int, float]]]:
    """Return the updates that can be cut, and rank and alpha of the others by module."""
    updates, others = [], {}
    is_pinned = config.get("bias", "none") != "none" or bool(config.get("use_dora"))
    for part, name_of_B in factors([*tensors]):
        module = part["module"].removeprefix(PEFT_PREFIX)
        A, B = tensors[part.string], tensors.get(name_of_B)
        if B is None or A.dim() < 2 or B.dim() < 2:
            raise CheckpointError(f"{file}: {module} has an A and no fitting B; use another checkpoint")
        if not (bool(A.isfinite().all()) and bool(B.isfinite().all())):
            raise NonFiniteError(f"{file}: {module} is NaN or infinite; use an earlier checkpoint")
        attention = module.removesuffix(".base_layer.out_proj")
        r, alpha = (
            _pattern(config, attention, *keys) for keys in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        if r != len(A):
            raise CheckpointError(
                f"{file}: {module} has rank {len(A)}, and {r} in {CONFIG_NAME}; use another checkpoint"
            )
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        is_attention = f"{PEFT_PREFIX}{attention}.base_layer.out_proj.lora_A.weight" in tensors
        if is_attention or B.flatten(1).shape[1] != len(A):
            others[attention] = (r, scale * r)
        else:
            updates.append(_Saved(module, (part.string, name_of_B), A, B, scale, is_pinned))
    if not any(bool(one.A.any()) and bool(one.B.any()) for one in updates):
        raise bad_value("adapter", str(file.parent), "it has no update B A that can be cut, or all of them are zero")
    return updates, others


def _pattern(config: Mapping[str, Any], module: str, pattern: str, default: str) -> Any:
    """Return what a configuration says of a module."""
    own = config.get(pattern) or {}
    return own.get(get_pattern_key(own.keys(), module), config.get(default, 8))
