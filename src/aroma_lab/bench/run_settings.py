"""What a whole run is measured on: ranks from where, data from where, and how much of it is timed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aroma.errors import bad_value
from aroma.files import read_json

from ..run.recipe import load_recipe
from ..run.run_folder import RunFolder
from ..specs import Recipe
from .settings import BenchSettings


@dataclass(frozen=True)
class RunSettings:
    """Settings of one whole run; together with the machine they decide its numbers.

    Args:
        trajectory: Folder of the run whose ranks are replayed; None: AROMA trains for real and decides for itself.
        recipe: Model, data and training; None: random tokens in a model of random weights.
        model: Named shape, local folder or hub name, where there is no recipe.
        examples: Examples of an epoch, where there is no recipe.
        batch_size: Examples of an optimizer step, where there is no recipe.
        length: Tokens of an example, where there is no recipe.
        steps: Optimizer steps to go; None: all of the trajectory or of the recipe.
        every: One step of so many, drawn at random, is run and timed.
        dropout: Dropout of every adapter, where there is no recipe.
        seed: Of weights and tokens, where there is no recipe, and of the drawn steps.
        device: `"cpu"` or `"cuda"`.
        threads: CPU threads; None for PyTorch's own choice.

    Raises:
        ConfigError: A value that cannot work, or one that is missing.
    """

    trajectory: str | None = None
    recipe: Recipe | None = None
    model: str | None = None
    examples: int | None = None
    batch_size: int | None = None
    length: int | None = None
    steps: int | None = None
    every: int = 1
    dropout: float = 0.0
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("examples", "steps", "every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise bad_value(name, value, "give 1 or more")
        if not 0 <= self.dropout < 1:
            raise bad_value("dropout", self.dropout, "give a probability in [0, 1)")
        if self.recipe is None:
            self._check_without_recipe()
        else:
            self._check_with_recipe()

    @property
    def shape(self) -> BenchSettings:
        """Model and batch as the other benchmarks describe them; without a recipe only."""
        assert self.model is not None, "checked when the settings were made"
        assert self.batch_size is not None, "the same"
        assert self.length is not None, "the same"
        return BenchSettings(
            model=self.model,
            batch_size=self.batch_size,
            length=self.length,
            device=self.device,
            threads=self.threads,
            seed=self.seed,
        )

    def _check_without_recipe(self) -> None:
        if self.trajectory is None:
            raise bad_value(
                "--trajectory",
                None,
                "give the folder of a run whose ranks are replayed, or a recipe to train for real: on random tokens "
                "the ranks that AROMA finds would mean nothing",
            )
        for name in ("model", "examples", "batch_size", "length"):
            if getattr(self, name) is None:
                flag = f"--{name.replace('_', '-')}"
                raise bad_value(flag, None, f"the trajectory's folder has no recipe that tells it; give {flag}")
        self.shape  # noqa: B018  # checks the rest

    def _check_with_recipe(self) -> None:
        for name in ("model", "examples", "batch_size", "length"):
            if getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise bad_value(flag, getattr(self, name), "the recipe says it; leave it out, or override a key of it")
        if self.every > 1 and self.trajectory is None:
            raise bad_value(
                "--every",
                self.every,
                "a training for real needs every step; do it once, then give its folder as --trajectory",
            )


def refuse_language(recipe: Recipe) -> None:
    """Raise for a language model's recipe.

    Raises:
        ConfigError: It is one.
    """
    if recipe.data.task == "causal_lm":
        remedy = "runs of classifiers and regressions are measured, not of language models; give another recipe"
        raise bad_value("data.task", recipe.data.task, remedy)


def facts_of_run(folder: str) -> dict[str, Any]:
    """Return what the folder of a run tells of its model and data: keywords of `RunSettings`, as far as known."""
    run = RunFolder(Path(folder))
    if not run.recipe.is_file():
        return {}
    recipe = load_recipe(run.recipe)
    refuse_language(recipe)
    facts: dict[str, Any] = {
        "model": recipe.model.name,
        "batch_size": recipe.training.batch_size * recipe.training.gradient_accumulation_steps,
        "length": recipe.data.max_length,
    }
    if run.result.is_file():
        facts["examples"] = read_json(run.result).get("examples", {}).get("train")
    return facts
