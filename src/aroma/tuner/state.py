"""`aroma_state.json`: the manifest of a saved adapter, with the state of the run that made it.

The state of a run is what `AromaController.state_dict()` returns: a JSON-able dict, and a few tensors, which are in
`aroma_state.safetensors`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..errors import CheckpointError
from ..files import (
    own_file,
    read_manifest,
    read_tensors,
    require_adapter_folder,
    require_files,
    write_manifest,
    write_tensors,
)
from .layout import components_digest

STATE_FILE = "aroma_state.json"
STATE_TENSORS_FILE = "aroma_state.safetensors"
STATE_FORMAT = 1


def write_adapter_state(
    folder: str | os.PathLike[str], state: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write the state of the adapter that was just saved into `folder` beside it.

    Args:
        folder: Where the adapter was saved.
        state: What `aroma_state.json` says, but for the digests.
        tensors: What the state of the run needs beside it, by name; of any shape.
    """
    target, names = Path(folder), []
    # transformers' `model.save_pretrained` writes the tensors after the configuration, so they may be of another save.
    weights = target / SAFETENSORS_WEIGHTS_NAME
    if weights.exists() and components_digest(read_tensors(weights)) == state["components"]:
        names.append(weights.name)
    if tensors:
        write_tensors(target / STATE_TENSORS_FILE, dict(tensors))
        names.append(STATE_TENSORS_FILE)
    write_manifest(target / STATE_FILE, state, names)


def write_export_state(
    folder: str | os.PathLike[str],
    state: dict[str, Any],
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    ranks: Mapping[str, int],
) -> None:
    """Write the state of an export with the ranks of its modules, and without the run: none goes on from it.

    Args:
        folder: Holds the export.
        state: Of the adapter that was exported.
        config: The content of adapter_config.json.
        tensors: The saved tensors, of any shape.
        ranks: Rank of every module.
    """
    modules = {name: {**entry, "rank": ranks[name]} for name, entry in state["modules"].items()}
    changes = {"modules": modules, "components": components_digest(tensors), "adapter_config": config}
    write_adapter_state(folder, {**state, **changes, "controller": None}, {})


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of `aroma_state.json` in `folder`.

    Raises:
        CheckpointError: It is missing, damaged, or of a newer format.
    """
    return read_manifest(own_file(require_adapter_folder(folder), STATE_FILE), STATE_FORMAT)


def read_controller_state(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the state of the run saved in `folder`, as `AromaController.state_dict()`; None without one.

    Raises:
        CheckpointError: The adapter or its state is missing, damaged, or of different moments.
    """
    state = read_state(folder)
    if state["controller"] is None:
        return None
    require_adapter_files(Path(folder), state)
    # An earlier save may have left tensors, which this state does not name.
    named = STATE_TENSORS_FILE in state["files"]
    return {"state": state["controller"], "tensors": read_tensors(Path(folder, STATE_TENSORS_FILE)) if named else {}}


def require_adapter_files(folder: Path, state: Mapping[str, Any]) -> None:
    """Check that the files in `folder` are those that `state`, its `aroma_state.json`, was written with.

    Raises:
        CheckpointError: A file is missing, truncated, edited, or of another moment; it is named.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if (
        weights.name not in state["files"]
        and os.path.lexists(weights)
        and components_digest(read_tensors(own_file(folder, weights.name))) != state["components"]
    ):
        raise CheckpointError(
            f"{weights}: its components are not those that {STATE_FILE} was written with; it was edited, or a save "
            "was interrupted; use another checkpoint"
        )
    require_files(folder, state)
