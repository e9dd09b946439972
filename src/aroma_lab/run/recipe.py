"""Recipes: YAML deltas on documented defaults. A recipe is a trial of AROMA, and is run as one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import hf_hub_download

from aroma.errors import bad_value
from aroma.files import write_text
from aroma.outputs import new_folder

from ..language.data import examples_of, questions_of
from ..language.gguf_source import PACKAGED
from ..settings import flatten, load_values, section_of, typed_fields, types_of
from ..specs import ADAPTER_KEYS, MADE, MADE_KINDS, ModelSpec, TaskSpec, TrainSpec
from ..tasks.articles import BBC_NEWS
from ..tasks.data import layout_of, read_splits, source_of, with_columns
from .trial import Trial, TrialFiles

_SECTIONS: dict[str, Any] = {"model": ModelSpec, "data": TaskSpec, "training": TrainSpec}


class Recipe(NamedTuple):
    """A trial of AROMA, and the folder that it leaves: new or empty, or with this very run when it is resumed."""

    trial: Trial
    output: str


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides, such as `"training.batch_size=16"`, which are stronger.

    Raises:
        ConfigError: No such file, no YAML, or as `make_recipe`.
    """
    return make_recipe(load_values("recipe", path, overrides))


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe with `values`, nested or by dotted key (`"training.batch_size"`), over the defaults.

    Raises:
        ConfigError: An unknown key (the nearest is named), or a value of a wrong type or out of range.
    """
    types = {"output": str} | {f"adapter.{name}": kind for name, (kind, _) in ADAPTER_KEYS.items()}
    for section, kind in _SECTIONS.items():
        types |= types_of(kind, f"{section}.")
    del types["data.name"]  # a recipe's task is named after its data
    given = typed_fields(types, flatten(values, (*_SECTIONS, "adapter")), "a recipe")
    model, data, training = (kind(**section_of(given, name)) for name, kind in _SECTIONS.items())
    _require_model_and_data(model, data)
    path = data.source or Path((data.train or "").partition("+")[0]).stem
    label = re.sub(r"[^\w.-]", "-", data.config or Path(path).name).strip(".-") or "data"
    trial = Trial(
        name=f"{label}/aroma/seed-{training.seed}",
        model=model.name,
        task=replace(data, name=label, reported=data.reported or {}),
        method="aroma",
        kind="aroma",
        options={name: default for name, (_, default) in ADAPTER_KEYS.items()} | section_of(given, "adapter"),
        training=training,
        dtype=model.dtype,
        quantization=model.quantization,
        gguf_file=model.gguf_file,
    )
    return Recipe(trial, given.get("output", "runs/aroma"))


def _require_model_and_data(model: ModelSpec, data: TaskSpec) -> None:
    if not model.name:
        raise bad_value("model.name", model.name, "give a hub name or a local model folder")
    if model.dtype == "float16":
        remedy = "without a scaler small gradients vanish in it; take bfloat16 or float32"
        raise bad_value("model.dtype", "float16", remedy)
    if data.source is None and data.train is None and data.kind not in MADE_KINDS:
        remedy = "give a CSV, TSV, JSONL or Parquet file, or data.source, a folder or a hub data set"
        raise bad_value("data.train", None, remedy)


def save_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write the resolved recipe, defaults included, atomically."""
    values = asdict(recipe.trial)
    del values["task"]["name"]
    model = {"name": values["model"], **{key: values[key] for key in ("gguf_file", "dtype", "quantization")}}
    sections = {"model": model, "data": values["task"], "adapter": values["options"], "training": values["training"]}
    write_text(path, yaml.safe_dump({**sections, "output": recipe.output}, sort_keys=False, allow_unicode=True))


def check_output(recipe: Recipe, resume: bool) -> None:
    """Raise AromaError unless a run can be put into `recipe.output`, or resumed there; nothing is left there."""
    files = TrialFiles(Path(recipe.output))
    if resume and files.result.exists():
        raise bad_value("output", recipe.output, "the run there is finished; for another run, give another output")
    holds_run = os.path.exists(files.trial)  # False, too, where a path is too long to be asked for
    if not (resume and holds_run):
        remedy = "give another, or --resume this run" if holds_run else "give another"
        new_folder("output", files.root, "it holds no run to resume; give another" if resume else remedy)


def check_sources(trial: Trial) -> None:
    """Raise AromaError if a file, a column of it, or the model is missing, before PyTorch is loaded.

    So a mistyped name is an error within a second. Everything is checked again, and whole, where it is read.
    """
    data, name = trial.task, trial.model
    if data.kind not in MADE_KINDS and (source_of(data).folder is not None or data.source == BBC_NEWS):
        readers: dict[str | None, Callable[..., object]] = {
            "causal_lm": partial(examples_of, text=data.text),
            "commonsense": questions_of,
        }
        read_splits(data, readers.get(data.kind) or partial(with_columns, layout=layout_of(data)))
    if trial.gguf_file is not None or Path(name).is_dir() or name in ("minilm", PACKAGED, MADE):
        return
    try:
        hf_hub_download(name, "config.json", etag_timeout=5)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        remedy = f"no such folder, nor a model that the hub or its cache shows ({said:.300}); check its name"
        raise bad_value("model.name", name, remedy) from error
