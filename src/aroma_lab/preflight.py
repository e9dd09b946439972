"""Checks before PyTorch is loaded, so that a mistyped name is an error within a second.

Everything is checked again, and whole, where it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub import hf_hub_download

from aroma.errors import bad_value
from aroma.files import require_adapter_folder

from .language.data import examples_of, questions_of
from .language.gguf_source import PACKAGED as PACKAGED_LANGUAGE_MODEL
from .specs import MADE, MADE_KINDS, Recipe
from .tasks.articles import BBC_NEWS
from .tasks.sources import Located, require_data_file

PACKAGED = ("minilm", PACKAGED_LANGUAGE_MODEL, MADE)
"""Models that come with pip."""


def check_sources(recipe: Recipe) -> None:
    """Raise AromaError if a file, a column of it, or the model of a recipe is missing."""
    from .run.recipe import task_of
    from .tasks.data import layout_of, read_splits, source_of, with_columns

    data = task_of(recipe)
    if data.kind not in MADE_KINDS and (source_of(data).folder is not None or data.source == BBC_NEWS):
        readers: dict[str | None, Callable[[list[Located]], object]] = {
            "causal_lm": partial(examples_of, text=data.text),
            "commonsense": questions_of,
        }
        read_splits(data, readers.get(data.kind) or partial(with_columns, layout=layout_of(data)))
    if recipe.model.gguf_file is None:
        require_model("model.name", recipe.model.name or "")


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
