"""What a plain LoRA adapter does not say of the run behind it, in files and in the Trainer's state.

The state of a run is what `AromaController.state_dict()` returns: a JSON-able dict, and a few tensors. There is one
encoding of it, JSON and a safetensors blob, and two places that hold it: `aroma_state.json` with
`aroma_state.safetensors` beside an adapter, and the callback's entry in `trainer_state.json`, with the blob in base64.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load, save

from ..about import is_about
from ..distributed import is_distributed, processes_of_node
from ..errors import CheckpointError, bad_value
from ..files import file_digest, own_file, read_json, read_tensors, write_bytes, write_json
from ..folders import settle, sync
from .layout import PlainAdapter, components_digest
from .live import LiveAdapter
from .warnings import warn_uncontrolled

if TYPE_CHECKING:
    from torch import Tensor


STATE_FILE = "aroma_state.json"
STATE_TENSORS_FILE = "aroma_state.safetensors"
STATE_FORMAT = 1
WEIGHT_FILES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)

LARGEST_SIDE = 2**24
"""Rows, columns and ranks beyond it are no matrix's, so no memory is asked for on their account."""

_MOST_PROCESSES = 2**16
_DIGEST = re.compile("[0-9a-f]{64}")


# Beside an adapter ---------------------------------------------------------------------------------------------------


def write_adapter_state(
    folder: str, live: LiveAdapter, plain: PlainAdapter, written: dict[str, Any], exported: dict[str, Any] | None
) -> dict[str, Any]:
    """Write the state of the adapter that was just saved into `folder` beside it, and return it.

    Args:
        folder: Where the adapter was saved.
        live: Its live state.
        plain: What is known of its tensors.
        written: What was written into its adapter_config.json.
        exported: Its controller's `state_dict()`; None without a controller.

    Warns:
        UserWarning: The adapter has been trained, and no controller was ever attached: it did not grow.
    """
    if plain.trained and not live.ever_controlled:
        warn_uncontrolled()
    target = Path(folder)
    run, blob = _encode(exported) if exported is not None else (None, b"")
    state: dict[str, Any] = {
        "format": STATE_FORMAT,
        "config": live.method(),
        "modules": {name: {"shape": shape, "rank": plain.ranks[name]} for name, shape in plain.shapes.items()},
        "components": plain.digest,
        "files": _written_files(target, plain),
        "adapter_config": written,
        "about": live.about,
        "controller": run,
    }
    if is_distributed():
        state["processes"] = processes_of_node()
    tensors = target / STATE_TENSORS_FILE
    if blob:
        write_bytes(tensors, blob)
        state["files"][tensors.name] = file_digest(tensors)
    else:
        tensors.unlink(missing_ok=True)
    # Last, because it vouches for the other files.
    for name in state["files"]:
        sync(target / name)
    write_json(target / STATE_FILE, {**state, "checksum": checksum_of(state)})
    return state


def write_export_state(
    folder: str | os.PathLike[str],
    state: dict[str, Any],
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    ranks: Mapping[str, int],
) -> None:
    """Write the state of an export, without the run: none goes on from it.

    Args:
        folder: Holds the export.
        state: Of the adapter that was exported.
        config: What was written as adapter_config.json.
        tensors: What was written as its tensors, of any shape.
        ranks: Rank of every module.
    """
    weights = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    exported = {
        **{key: value for key, value in state.items() if key not in ("checksum", "processes")},
        "modules": {name: {**entry, "rank": ranks[name]} for name, entry in state["modules"].items()},
        "components": components_digest(tensors),
        "files": {weights.name: file_digest(weights)},
        "adapter_config": config,
        "controller": None,
    }
    write_json(Path(folder) / STATE_FILE, {**exported, "checksum": checksum_of(exported)})


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of `aroma_state.json` in `folder`.

    Raises:
        CheckpointError: It is missing, damaged, or of a newer format.
    """
    settle(folder)
    path = own_file(Path(folder), STATE_FILE)
    state = read_json(path)
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise bad_value(
            f"{path}: format", found, f"this aroma reads format {STATE_FORMAT}; upgrade aroma-peft", CheckpointError
        )
    require_checksum(state, str(path))
    _require_layout(state, path)
    return state


def _require_layout(state: dict[str, Any], path: Path) -> None:
    """Raise unless all fields are there and have their types: anybody can make a checksum fit."""
    processes, files, modules = state.get("processes", 1), state.get("files"), state.get("modules")
    expected = {
        "processes": is_whole(processes, 1, _MOST_PROCESSES),
        "components": isinstance(state.get("components"), str),
        "config": isinstance(state.get("config"), dict),
        "adapter_config": isinstance(state.get("adapter_config", {}), dict),
        "about": "about" not in state or is_about(state["about"]),
        "controller": state.get("controller") is None or _is_run(state["controller"]),
        "files": isinstance(files, dict),
        "modules": isinstance(modules, dict) and bool(modules),
    }
    # Checked one by one, so that a wrong one is named; what is no dict is named as a whole.
    for name, digest in files.items() if isinstance(files, dict) else ():
        expected[f"files.{name}"] = Path(name).name == name and bool(_DIGEST.fullmatch(str(digest)))
    for name, entry in modules.items() if isinstance(modules, dict) else ():
        expected[f"modules.{name}"] = _is_module(entry)
    for name, fits in expected.items():
        if not fits:
            holder, _, key = name.partition(".")
            value = state[holder][key] if key else state.get(name)
            raise bad_value(f"{path}: {name}", value, "no run writes that; use another checkpoint", CheckpointError)


def _is_run(run: object) -> bool:
    return isinstance(run, dict) and isinstance(run.get("config"), dict)


def _is_module(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    shape = entry.get("shape")
    fits = isinstance(shape, list) and len(shape) == 2 and all(is_whole(size, 1, LARGEST_SIDE) for size in shape)
    return fits and is_whole(entry.get("rank"), 0, LARGEST_SIDE)


def is_whole(value: object, least: int, most: int) -> bool:
    """Whether `value` is an integer from `least` to `most`; True and 1.0 are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(least <= value <= most)


def read_controller_state(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the state of the run saved in `folder`, as `AromaController.state_dict()`; None without one.

    Raises:
        CheckpointError: The adapter or its state is missing, damaged, or of different moments.
    """
    state = read_state(folder)
    if state.get("controller") is None:
        return None
    require_files(folder, state)
    # An interrupted save may have left tensors of an earlier moment, which this state does not name.
    named = STATE_TENSORS_FILE in state["files"]
    return _decode(state["controller"], (Path(folder) / STATE_TENSORS_FILE).read_bytes() if named else b"")


def require_files(folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Check that the files in `folder` are those that `state`, its `aroma_state.json`, was written with.

    Raises:
        CheckpointError: A file is missing, truncated, edited, or of another moment; it is named.
    """
    home = Path(folder)
    _require_random_states(home, state.get("processes", 1))
    weights = home / SAFETENSORS_WEIGHTS_NAME
    if (
        weights.name not in state["files"]
        and os.path.lexists(weights)
        and components_digest(read_tensors(own_file(home, weights.name))) != state["components"]
    ):
        raise CheckpointError(
            f"{weights}: its components are not those that {STATE_FILE} was written with; it was edited, or a save "
            "was interrupted; use another checkpoint"
        )
    for name, digest in state["files"].items():
        file = own_file(home, name)
        found = file_digest(file)
        if found != digest:
            if file.suffix == ".safetensors":
                read_tensors(file)  # says more clearly that it is truncated
            raise bad_value(
                f"{file}: sha256",
                found,
                f"{STATE_FILE} expects {digest}; it was edited, or a save was interrupted; use another checkpoint",
                CheckpointError,
            )


def _written_files(folder: Path, plain: PlainAdapter) -> dict[str, str]:
    """Return the digests of the weight files that hold the adapter just collected.

    PEFT writes them before the configuration. transformers (`model.add_adapter`, `model.save_pretrained`) writes them
    after it: then there is no file yet, or an older one.
    """
    files = {name: folder / name for name in WEIGHT_FILES if (folder / name).exists()}
    return {name: file_digest(file) for name, file in files.items() if _holds(file, plain.digest)}


def _holds(file: Path, digest: str) -> bool:
    return file.suffix != ".safetensors" or components_digest(read_tensors(file)) == digest


def _require_random_states(folder: Path, processes: int) -> None:
    """Raise when a process died before the Trainer had saved its random state, while another process had.

    The Trainer would resume in silence, and that rank would draw other random numbers than before.
    """
    files = [folder / f"rng_state_{rank}.pth" for rank in range(processes)]
    if processes > 1 and any(file.exists() for file in files):
        for file in files:
            # As torch.save writes; its directory comes last.
            if not (file.is_file() and zipfile.is_zipfile(file)):
                raise CheckpointError(f"{file}: missing or truncated, a save was interrupted; use another checkpoint")


# In the Trainer's state ----------------------------------------------------------------------------------------------


def pack(exported: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a run as JSON alone; the Trainer gives a resumed callback no path to its checkpoint.

    Args:
        exported: As `AromaController.state_dict()`.
    """
    run, blob = _encode(exported)
    packed = {"state": run, "tensors": base64.b64encode(blob).decode("ascii")}
    return {**packed, "checksum": checksum_of(packed)}


def unpack(packed: dict[str, Any]) -> dict[str, Any]:
    """Undo `pack`.

    Raises:
        CheckpointError: The packed state was edited.
    """
    require_checksum(packed, "trainer_state.json: stateful_callbacks.AromaCallback")
    return _decode(packed["state"], base64.b64decode(packed["tensors"]))


# The encoding --------------------------------------------------------------------------------------------------------


def _encode(exported: dict[str, Any]) -> tuple[Any, bytes]:
    """Return the JSON-able part of a run's state, and its tensors as safetensors; no bytes where there are none."""
    tensors = {name: tensor.contiguous() for name, tensor in exported["tensors"].items()}
    return exported["state"], save(tensors, metadata={"format": "pt"}) if tensors else b""


def _decode(run: Any, blob: bytes) -> dict[str, Any]:
    """Undo `_encode`."""
    return {"state": run, "tensors": load(blob) if blob else {}}


def checksum_of(state: dict[str, Any]) -> str:
    """Return the checksum that a JSON object bears under that name."""
    content = {key: value for key, value in state.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def require_checksum(state: dict[str, Any], where: str) -> None:
    """Raise unless a JSON object, from `where`, bears its own checksum.

    Raises:
        CheckpointError: It was edited.
    """
    if state.get("checksum") != checksum_of(state):
        raise bad_value(
            f"{where}: checksum",
            state.get("checksum"),
            "it does not fit the content, so the file was edited; use another checkpoint",
            CheckpointError,
        )
