"""Recipes: YAML deltas on documented defaults; a recipe becomes a trial of AROMA, and is run as one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from aroma.errors import bad_value
from aroma.files import write_text
from aroma.outputs import new_folder

from ..settings import flatten, load_values, section_of, typed_fields, types_of
from ..specs import ADAPTER_KEYS, Recipe, TaskSpec
from .trial import Trial, TrialFiles


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
    sections: dict[str, Any] = {name: hint for name, hint in get_type_hints(Recipe).items() if is_dataclass(hint)}
    flat, types = flatten(values, (*sections, "adapter")), {"output": str}
    for section, kind in sections.items():
        types |= types_of(kind, f"{section}.")
    del types["data.name"]  # a recipe's task is named after its data
    types |= {f"adapter.{name}": kind for name, (kind, _) in ADAPTER_KEYS.items()}
    given = typed_fields(types, flat, "a recipe")
    made = {name: kind(**section_of(given, name)) for name, kind in sections.items()}
    output = {"output": given["output"]} if "output" in given else {}
    return Recipe(adapter=section_of(given, "adapter"), **made, **output)


def save_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write the resolved recipe, defaults included, atomically."""
    content = {**asdict(recipe), "adapter": _adapter_of(recipe)}
    del content["data"]["name"]
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _adapter_of(recipe: Recipe) -> dict[str, Any]:
    """Return all keys of the adapter, defaults included."""
    return {name: default for name, (_, default) in ADAPTER_KEYS.items()} | recipe.adapter


def task_of(recipe: Recipe) -> TaskSpec:
    """Return the task of a recipe, named for tables after its configuration, its source, or its training file."""
    data = recipe.data
    path = data.source or Path((data.train or "").partition("+")[0]).stem
    name = re.sub(r"[^\w.-]", "-", data.config or Path(path).name).strip(".-") or "data"
    return replace(data, name=name, reported=data.reported or {})


def trial_of(recipe: Recipe) -> Trial:
    """Return the one trial that a recipe is; components are drawn by its seed unless the adapter has its own."""
    task, seed = task_of(recipe), recipe.training.seed
    options = _adapter_of(recipe)
    if options["component_seed"] is None:
        options["component_seed"] = seed
    return Trial(
        name=f"{task.name}/aroma/seed-{seed}",
        model=recipe.model.name or "",
        task=task,
        method="aroma",
        kind="aroma",
        options=options,
        training=recipe.training,
        dtype=recipe.model.dtype,
        quantization=recipe.model.quantization,
        gguf_file=recipe.model.gguf_file,
    )


def check_output(recipe: Recipe, resume: bool) -> None:
    """Raise AromaError unless a run can be put into `recipe.output`, or resumed there; nothing is left there."""
    files = TrialFiles(Path(recipe.output))
    if resume and files.result.exists():
        raise bad_value("output", recipe.output, "the run there is finished; for another run, give another output")
    holds_run = os.path.exists(files.trial)  # False, too, where a path is too long to be asked for
    if not (resume and holds_run):
        remedy = "give another, or --resume this run" if holds_run else "give another"
        new_folder("output", files.root, "it holds no run to resume; give another" if resume else remedy)


def run_recipe(
    recipe: Recipe, *, progress: bool = True, on_note: Callable[[str], None] = lambda note: None
) -> dict[str, Any]:
    """Train what a recipe says, and leave adapter, result and all that it came from in `recipe.output`.

    A run that was interrupted there goes on. Under torchrun every process calls this; see `run_trial`, also for what
    is returned and raised.

    Args:
        progress: Whether a progress bar is shown.
        on_note: Called, before the training, with what became of examples that did not fit.
    """
    from .run import run_trial

    files = TrialFiles(Path(recipe.output))

    def start(job: Any) -> None:
        if not files.recipe.exists():
            save_recipe(recipe, files.recipe)
        for note in job.notes:
            on_note(note)

    return run_trial(trial_of(recipe), files.root, progress=progress, keep_checkpoints=True, on_start=start)
