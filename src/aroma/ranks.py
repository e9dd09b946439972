"""Ranks of a saved adapter, read without PyTorch: what `aroma inspect` shows."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import CheckpointError, bad_value
from .files import own_file, read_arrays, require_adapter_folder
from .state import CONFIG_NAME, PEFT_PREFIX, STATE_FILE, WEIGHTS_NAME, factors, read_config, read_state

if TYPE_CHECKING:
    import numpy as np


class RankRow(NamedTuple):
    """A matrix: its module's name, rank and effective rank (Appendix C) of its update, and (m, n) of its weight."""

    name: str
    rank: int
    effective_rank: float
    shape: tuple[int, int]


def rank_table(folder: str | os.PathLike[str]) -> list[RankRow]:
    """Return rank and effective rank of every matrix that a LoRA adapter adapts, in the order of the layers.

    Those of rank 0 are among them, if AROMA grew the adapter.

    Raises:
        CheckpointError: The folder or a file is missing or damaged.
        ConfigError: The adapter is not a LoRA adapter.
    """
    path = require_adapter_folder(folder)
    state = read_state(path) if os.path.lexists(path / STATE_FILE) else {}
    if (kind := read_config(path)["peft_type"]) != "LORA":
        raise bad_value("peft_type", kind, f"in {path / CONFIG_NAME}: only LoRA adapters have ranks of this kind")
    shapes = {name: entry["shape"] for name, entry in state.get("modules", {}).items()}
    found = {name: RankRow(name, 0, 0.0, (m, n)) for name, (m, n) in shapes.items()}
    file = own_file(path, WEIGHTS_NAME)
    arrays = read_arrays(file)
    for part, name_of_B in factors(sorted(arrays, key=in_order)):
        module = part["module"].removeprefix(PEFT_PREFIX)
        try:
            found[module] = _row(module, arrays[name_of_B], arrays[part.string])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: {module} has no whole factors A and B ({error})") from error
    if not found:
        raise CheckpointError(f"{file}: it holds no lora_A and lora_B; use another checkpoint")
    return [*found.values()]


def _row(module: str, B: np.ndarray[Any, Any], A: np.ndarray[Any, Any]) -> RankRow:
    """Return rank and effective rank of an update B A; B (m, R) and A (R, n), kernels of convolutions flattened."""
    import numpy as np

    B, A = (factor.reshape(len(factor), -1).astype(np.float64) for factor in (B, A))
    left, right = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (B, A.T))
    core = left @ right.T  # ValueError where they do not fit
    if not np.isfinite(core).all():
        raise ValueError("NaN or infinity")
    shares = np.linalg.svd(core, compute_uv=False)
    shares = shares[shares > 0] / max(shares.sum(), math.ulp(0.0))
    if not len(shares):
        return RankRow(module, 0, 0.0, (len(B), A.shape[1]))
    rank = int((A.any(1) & B.any(0)).sum())  # rows and columns of zeros are no directions
    return RankRow(module, rank, float(np.exp(-(shares * np.log(shares)).sum())), (len(B), A.shape[1]))


def in_order(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]
