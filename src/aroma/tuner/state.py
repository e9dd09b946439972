"""`aroma_state.json`: the manifest of a saved adapter, with the state of the run that made it.

The state of a run is what `AromaController.state_dict()` returns: a JSON-able dict, and tensors, which are in
`aroma_state.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from .. import files
from ..errors import CheckpointError
from .layout import components_digest

STATE_FILE = "aroma_state.json"
STATE_TENSORS_FILE = "aroma_state.safetensors"
STATE_FORMAT = 2

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
    names = [SAFETENSORS_WEIGHTS_NAME] if with_weights and Path(folder, SAFETENSORS_WEIGHTS_NAME).exists() else []
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
    weights = path / SAFETENSORS_WEIGHTS_NAME
    is_vouched = weights.name in state["files"] or not os.path.lexists(weights)
    tensors = {} if is_vouched else files.read_tensors(files.own_file(path, weights.name))
    if not is_vouched and components_digest(tensors) != state["components"]:
        raise CheckpointError(f"{weights}: edited, or of another save; use another checkpoint")
    config = files.read_json(files.own_file(path, CONFIG_NAME))
    if not isinstance(config, dict) or _config_digest(config) != state["adapter_config"]:
        raise CheckpointError(f"{path / CONFIG_NAME}: edited since the adapter was saved; use another checkpoint")
    return state


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
    """Return a digest of what a configuration means: PEFT's lists are sets, and it may leave out what is empty."""
    meant = {
        name: sorted(value, key=str) if isinstance(value, list) else value
        for name, value in config.items()
        if value and name not in _FREE
    }
    return hashlib.sha256(json.dumps(meant, sort_keys=True).encode()).hexdigest()
