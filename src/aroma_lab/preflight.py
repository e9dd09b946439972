"""Checks before PyTorch is loaded, so that a mistyped name is an error within a second.

Everything is checked again, and whole, where it is read.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download

from aroma.errors import bad_value
from aroma.files import require_adapter_folder

from .language.data import joined_files
from .language.gguf_source import PACKAGED as PACKAGED_LANGUAGE_MODEL
from .specs import Recipe
from .tasks.sources import read_file, require_data_file
from .tasks.spec import Layout

PACKAGED = ("minilm", PACKAGED_LANGUAGE_MODEL)
"""Models that come with pip."""


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
    if recipe.model.name is not None and recipe.model.gguf_file is None:
        require_model("model.name", recipe.model.name)


def require_saved(adapter: str, *data: str) -> None:
    """Raise AromaError unless the folder of an adapter or model, and files of data, are there."""
    if adapter not in PACKAGED:
        require_adapter_folder(adapter)
    for path in data:
        require_data_file("data", path)


def require_model(field: str, name: str) -> None:
    """Raise ConfigError, about `field`, unless `name` is a folder, or a model that the hub or its cache has."""
    if Path(name).is_dir() or name in PACKAGED:
        return
    try:
        hf_hub_download(name, "config.json", etag_timeout=5)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        remedy = f"no such folder, nor a model that the hub or its cache shows ({said:.300}); check its name"
        raise bad_value(field, name, remedy) from error
