"""Checks before PyTorch is loaded, so that a mistyped name is an error within a second.

Everything is checked again, and whole, where it is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

from aroma.errors import bad_value
from aroma.files import require_adapter_folder

from .language.data import joined_files
from .language.gguf_source import PACKAGED as PACKAGED_LANGUAGE_MODEL
from .specs import Recipe
from .tasks.sources import read_file, require_data_file
from .tasks.spec import Layout

PACKAGED = ("minilm", PACKAGED_LANGUAGE_MODEL)
"""Models that come with pip."""

_SECONDS = 5.0
"""Within which the hub says whether it has a model."""


def check_sources(recipe: Recipe) -> None:
    """Raise AromaError if a file, a column of it, or the model of a recipe is missing."""
    data = recipe.data
    for split in ("train", "validation", "test") if data.name is None else ():
        where, source = f"data.{split}", getattr(data, split)
        if source is not None and data.task == "causal_lm":
            for path in joined_files(source):
                require_data_file(where, path)
        elif source is not None:
            read_file(where, source, [Layout(data.text, data.text_pair, data.label).columns()])
    if recipe.model.name is not None:
        require_model("model.name", recipe.model.name)


def require_saved(adapter: str, *data: str) -> None:
    """Raise AromaError unless the folder of an adapter or model, and files of data, are there."""
    if adapter not in PACKAGED:
        require_adapter_folder(adapter)
    for path in data:
        require_data_file("data", path)


def require_model(field: str, name: str, shapes: Iterable[str] = ()) -> None:
    """Raise ConfigError unless `name` is a folder, or a model that the hub or its cache has.

    Args:
        field: What named it, for errors.
        name: A folder or hub name.
        shapes: Names of other things that might have been meant, for errors.
    """
    if Path(name).is_dir() or name in PACKAGED:
        return
    neither = f"neither a shape ({', '.join(shapes)}) nor" if shapes else "neither"
    if name.startswith((os.sep, ".", "~")) or name.count("/") > 1:
        raise bad_value(field, name, "no such folder; give a folder that holds config.json, or a hub name")
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        if constants.HF_HUB_OFFLINE:
            remedy = f"{neither} a folder nor in the hub's cache, and HF_HUB_OFFLINE is set; give a folder"
            raise bad_value(field, name, remedy)
        HfApi().model_info(name, timeout=_SECONDS)
    except (errors.HTTPError, errors.HFValidationError, ConnectionError) as error:  # type: ignore[attr-defined]
        remedy = f"{neither} a folder here nor a model that the hub shows ({' '.join(str(error).split())})"
        raise bad_value(field, name, f"{remedy}; check its name, and the network") from error
