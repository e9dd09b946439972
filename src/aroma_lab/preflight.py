"""What is seen to be missing before PyTorch is loaded, so that a mistyped name is told within a second.

Everything is checked again, and whole, where it is read.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

from aroma.errors import bad_value
from aroma.files import require_adapter_folder

from .language.data import joined_files
from .language.gguf_source import PACKAGED as PACKAGED_LANGUAGE_MODEL
from .specs import MADE_KEYS, Recipe
from .tasks.sources import check_columns, require_data_file
from .tasks.spec import Layout

PACKAGED = ("minilm", PACKAGED_LANGUAGE_MODEL)
"""Models that come with pip."""

_SECONDS = 5.0
"""Within which the hub says whether it has a model."""


def check_sources(recipe: Recipe) -> None:
    """Raise if a file, a column of it, or the model of a recipe is missing.

    Raises:
        DataError: No such file, an unknown suffix, or a missing column.
        ConfigError: No such model.
    """
    data = recipe.data
    speaks = data.task == "causal_lm"
    if data.name is None:
        for split in ("train", "validation", "test"):
            source = getattr(data, split)
            if source is None:
                continue
            for path in joined_files(source) if speaks else [source]:
                if speaks or data.task in MADE_KEYS:
                    require_data_file(f"data.{split}", path)
                else:
                    check_columns(f"data.{split}", path, Layout(data.text, data.text_pair, data.label).columns())
    if recipe.model.name is not None:
        require_model("model.name", recipe.model.name)


def require_saved(adapter: str, *data: str) -> None:
    """Raise unless the folder of an adapter or model, and files of data, are there.

    Raises:
        CheckpointError: No such folder.
        DataError: No such file.
    """
    if adapter not in PACKAGED:
        require_adapter_folder(adapter)
    for path in data:
        require_data_file("data", path)


def require_model(field: str, name: str, shapes: Iterable[str] = ()) -> None:
    """Raise unless `name` is a folder, or a model that the hub or its cache has.

    Args:
        field: What named it, for errors.
        name: A folder or hub name.
        shapes: Names of other things that might have been meant; errors name the nearest.

    Raises:
        ConfigError: There is no such model, or the hub cannot be reached, which takes some seconds at most.
    """
    if Path(name).is_dir() or name in PACKAGED:
        return
    near = difflib.get_close_matches(name, [*shapes], n=1)
    hint = f"; the nearest shape is {near[0]!r}" if near else ""
    neither = f"neither a shape ({', '.join(shapes)}) nor" if shapes else "neither"
    if name.startswith((os.sep, ".", "~")) or name.count("/") > 1:
        raise bad_value(field, name, f"no such folder; give a folder that holds config.json, or a hub name{hint}")
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        if constants.HF_HUB_OFFLINE:
            remedy = f"{neither} a folder nor in the hub's cache, and HF_HUB_OFFLINE is set; give a folder{hint}"
            raise bad_value(field, name, remedy)
        HfApi().model_info(name, timeout=_SECONDS)
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise bad_value(
            field, name, f"{neither} a folder here nor a model on the hub; check its name{hint}"
        ) from error
    except (errors.HTTPError, ConnectionError) as error:  # type: ignore[attr-defined]
        remedy = (
            f"{neither} a folder here, and the hub cannot be asked ({error}); check the name, and the network{hint}"
        )
        raise bad_value(field, name, remedy) from error
