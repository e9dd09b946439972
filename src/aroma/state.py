"""`aroma_state.json`: the manifest of a saved adapter, with the state of the run that made it.

The state of a run is what `AromaController.state_dict()` returns: a JSON-able dict, and tensors, which are in
`aroma_state.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files
from .errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's names. Nothing here imports PyTorch, so that `aroma inspect` answers at once."""
PEFT_PREFIX = "base_model.model."
STATE_FILE = "aroma_state.json"
STATE_TENSORS_FILE = "aroma_state.safetensors"
STATE_FORMAT = 2

_FACTOR_A = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?A(?P<ending>(\.weight)?)")

_FREE = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "task_type"}
"""Fields that may be edited: the place and class of the base model, and others that no computation reads."""


def write_adapter_state(
    folder: str | os.PathLike[str],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    with_weights: bool = True,
) -> None:
    """Write the state of the adapter that was just saved into `folder` beside it.

    `state` is what `aroma_state.json` says, but for the digests; `config` the content of `adapter_config.json`;
    `tensors` (any shapes) are those of the state of the run; `with_weights`: whether the adapter's own are there
    already, so that the digest of their file is known.
    """
    names = [WEIGHTS_NAME] if with_weights and Path(folder, WEIGHTS_NAME).exists() else []
    if tensors:
        files.write_tensors(Path(folder, STATE_TENSORS_FILE), tensors)
        names.append(STATE_TENSORS_FILE)
    files.write_manifest(Path(folder, STATE_FILE), {**state, "adapter_config": _config_digest(config)}, names)


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of `aroma_state.json` in `folder`, after the files that it vouches for were checked.

    Raises:
        CheckpointError: A file is missing, damaged, edited, or of another moment; it is named.
    """
    path = files.require_adapter_folder(folder)
    state = files.read_manifest(files.own_file(path, STATE_FILE), STATE_FORMAT)
    files.require_files(path, state)
    config = files.read_json(files.own_file(path, CONFIG_NAME))
    if not isinstance(config, dict) or _config_digest(config) != state["adapter_config"]:
        raise CheckpointError(f"{path / CONFIG_NAME}: edited since the adapter was saved; use another checkpoint")
    return state


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of `adapter_config.json` in `folder`; only names of models and classes are checked yet.

    Raises:
        CheckpointError: It is missing, damaged or no configuration.
    """
    path = files.own_file(files.require_adapter_folder(folder), CONFIG_NAME)
    config: Any = files.read_json(path)
    names = ("base_model_name_or_path", "revision", "task_type", "peft_type")
    is_one = isinstance(config, dict) and "peft_type" in config
    is_one = is_one and all(isinstance(config.get(name), str | None) for name in names)
    if not is_one or not isinstance(config.get("auto_mapping"), dict | None):
        raise CheckpointError(f"{path}: no configuration of an adapter; use another checkpoint")
    return dict(config)


def read_controller_state(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the state of the run saved in `folder`, as `AromaController.state_dict()`; None without one.

    Raises:
        CheckpointError: The adapter or its state is missing, damaged, or of different moments.
    """
    state = read_state(folder)
    if state["controller"] is None:
        return None
    # An earlier save may have left tensors, which this state does not name.
    named = STATE_TENSORS_FILE in state["files"]
    tensors = files.read_tensors(Path(folder, STATE_TENSORS_FILE)) if named else {}
    return {"state": state["controller"], "tensors": tensors}


def _config_digest(config: Mapping[str, Any]) -> str:
    """Return a digest of what a configuration means: PEFT's lists are sets, and it may leave out empty fields."""
    meant = {
        name: sorted(value, key=str) if isinstance(value, list) else value
        for name, value in config.items()
        if value and name not in _FREE
    }
    return hashlib.sha256(json.dumps(meant, sort_keys=True).encode()).hexdigest()


def module_name(key: str) -> str:
    """Return the name in the base model for a name in a state dict, or in a model that is wrapped."""
    # Wrappers (DDP's "module.") come before PEFT's own prefix; torch.compile may wrap any module.
    return key.replace("_orig_mod.", "").rpartition(PEFT_PREFIX)[2]


def is_component(name: str) -> bool:
    """Whether a tensor of a plain adapter, by its name in a file, is a factor of a module's components."""
    return any(mark in name for mark in (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B"))


def factors(names: Iterable[str]) -> Iterator[tuple[re.Match[str], str]]:
    """Yield a match, with the groups `module` and `embedding`, for each name of an A, and the name of its B."""
    for name in names:
        if part := _FACTOR_A.fullmatch(name):
            yield part, f"{part['module']}.lora_{part['embedding'] or ''}B{part['ending']}"
