"""`aroma_task.json` of a language model's adapter: how its prompts are made, and which model it belongs to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from aroma.errors import CheckpointError, ConfigError
from aroma.files import read_json, write_json

from ..settings import typed
from ..specs import ModelSpec
from ..tasks.task import TASK_FILE, load_task
from .gguf_source import PACKAGED
from .spec import LanguageSpec

LANGUAGE_KIND: Literal["causal_lm"] = "causal_lm"

_CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class LanguageTask:
    """How an adapter's prompts were made.

    Args:
        language: Template, system turn and columns.
        max_length: Most tokens of an example in training; None: not known.
        model: The pretrained model, loaded as in training.
        fingerprint: Of its weights, see `fingerprint_of`; None: not known.
        kind: Tells this task from a classifier's.
    """

    language: LanguageSpec
    max_length: int | None
    model: ModelSpec
    fingerprint: str | None = None
    kind: Literal["causal_lm"] = LANGUAGE_KIND


def save_language_task(task: LanguageTask, adapter: str | os.PathLike[str]) -> None:
    """Write the task into the folder of an adapter."""
    write_json(Path(adapter) / TASK_FILE, asdict(task))


def load_language_task(adapter: str | os.PathLike[str]) -> LanguageTask:
    """Read the task of a language model's adapter.

    For an adapter that AROMA did not train: the base model that PEFT recorded, and the prompts of default settings.

    Raises:
        CheckpointError: The folder is no adapter, or the task is another kind's, or was edited.
    """
    path = Path(adapter) / TASK_FILE
    if not path.exists():
        name = read_json(Path(adapter) / _CONFIG_FILE).get("base_model_name_or_path")
        return LanguageTask(LanguageSpec(), None, ModelSpec(name))
    content = read_json(path)
    try:
        if content["kind"] != LANGUAGE_KIND:
            raise CheckpointError(f"{path}: its kind is {content['kind']!r}, not a language model's; use `aroma eval`")
        return LanguageTask(
            language=_read(LanguageSpec, content["language"]),
            max_length=typed("max_length", content["max_length"], int | None),
            model=_read(ModelSpec, content["model"]),
            fingerprint=typed("fingerprint", content.get("fingerprint"), str | None),
        )
    except (AttributeError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path}: edited ({error}); restore the file that was saved") from error


def task_of(folder: str | os.PathLike[str]) -> LanguageTask:
    """Read the task of an adapter, or of a whole model: a merged export has that of its adapter.

    Raises:
        CheckpointError: As `load_language_task`.
    """
    if not is_bare_model(folder):
        return load_language_task(folder)
    model = ModelSpec(str(folder))
    if not (Path(folder) / TASK_FILE).exists():
        return LanguageTask(LanguageSpec(), None, model)
    return replace(load_language_task(folder), model=model, fingerprint=None)


def task_kind(folder: str | os.PathLike[str]) -> str:
    """Return what a folder is for: `"classification"`, `"regression"`, or `"causal_lm"`.

    A folder without a task is a language model's if PEFT says so, or if it holds a model and no adapter.

    Raises:
        CheckpointError: It cannot be told, or the task was edited.
    """
    path = Path(folder)
    if (path / TASK_FILE).exists():
        content = read_json(path / TASK_FILE)
        if isinstance(content, dict) and content.get("kind") == LANGUAGE_KIND:
            return LANGUAGE_KIND
    elif is_bare_model(folder) or _is_language_adapter(path):
        return LANGUAGE_KIND
    return load_task(folder).kind


def is_bare_model(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds a model without an adapter, or is the name of the one that comes with pip."""
    path = Path(folder)
    if (path / _CONFIG_FILE).exists():
        return False
    return (path / "config.json").exists() or (str(folder) == PACKAGED and not path.exists())


def _is_language_adapter(path: Path) -> bool:
    config = path / _CONFIG_FILE
    return config.exists() and read_json(config).get("task_type") == "CAUSAL_LM"


def _read(kind: type[Any], content: Mapping[str, Any]) -> Any:
    """Return a section of a recipe from its keys, each of its type."""
    hints = get_type_hints(kind)
    unknown = set(content) - set(hints)
    if unknown:
        raise KeyError(*sorted(unknown))
    return kind(**{key: typed(key, value, hints[key]) for key, value in content.items()})
