"""What takes part in a whole run: the methods, the batches they share, and the plan that the ranks follow."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import set_seed

from aroma.errors import bad_value
from aroma.tuner import aroma_layers

from ..methods import Aroma
from ..run.recipe_run import check_schedule, planned_steps
from ..specs import Recipe, TrainSpec
from ..tasks.classification import check_positions, load_tokenizer
from ..tasks.data import load_splits
from ..tasks.model import adapter_config, load_classifier
from .recorder import TrajectoryRecorder, read_trajectory
from .replay import fit_modules
from .run_arm import Arm
from .run_arms import TIMED_TRAINING, aroma_of, deciding_arm, reference_arms, replaying_arm
from .run_data import Batches, RandomBatches, RecipeBatches
from .run_settings import RunSettings, refuse_language
from .sampling import draw_steps
from .shapes import make_model
from .trajectory import Trajectory


@dataclass(frozen=True)
class Lineup:
    """What takes part in a whole run.

    Args:
        arms: The methods. The arm that follows AROMA stands behind it.
        batches: Their data.
        steps: Optimizer steps to go.
        drawn: How many steps each measured step stands for, by its number.
        plan: The ranks: of a trajectory, or as a controller decides on the way.
        early_stop: Whether the run ends when every module has finished.
    """

    arms: list[Arm]
    batches: Batches
    steps: int
    drawn: dict[int, int]
    plan: Trajectory | TrajectoryRecorder
    early_stop: bool = False

    @property
    def is_replay(self) -> bool:
        """Whether the ranks were known beforehand."""
        return isinstance(self.plan, Trajectory)

    def trajectory(self, steps: int) -> Trajectory:
        """Return the ranks of the whole trajectory, or of the `steps` that the controller has seen."""
        return self.plan if isinstance(self.plan, Trajectory) else self.plan.trajectory(steps)


@dataclass(frozen=True)
class _Ground:
    """Model and data, before any adapter.

    Args:
        base: The pretrained model.
        batches: The data.
        training: The loop.
        method: AROMA, as it would be without a trajectory.
        planned: Optimizer steps of a training for real.
    """

    base: Any
    batches: Batches
    training: TrainSpec
    method: Aroma
    planned: int = 0


def line_up(settings: RunSettings) -> Lineup:
    """Load model and data, and make every method ready to train.

    Raises:
        ConfigError: Ranks that the model cannot follow, or settings that cannot work.
        DataError: A trajectory or data that cannot be used.
    """
    trajectory = read_trajectory(settings.trajectory) if settings.trajectory is not None else None
    if trajectory is not None and settings.steps is not None and settings.steps > trajectory.steps:
        raise bad_value("--steps", settings.steps, f"the trajectory has {trajectory.steps} steps; give no more")
    ground = _random_ground(settings) if settings.recipe is None else _recipe_ground(settings, settings.recipe)
    return _for_real(settings, ground) if trajectory is None else _replay(settings, ground, trajectory)


def _random_ground(settings: RunSettings) -> _Ground:
    assert settings.examples is not None, "RunSettings checks it"
    base = make_model(settings.shape)
    batches = RandomBatches(base, settings.shape, settings.examples)
    training = dataclasses.replace(TIMED_TRAINING, seed=settings.seed)
    return _Ground(base, batches, training, Aroma(dropout=settings.dropout))


def _recipe_ground(settings: RunSettings, recipe: Recipe) -> _Ground:
    refuse_language(recipe)
    assert recipe.model.name is not None, "Recipe checks it"
    config = adapter_config(recipe.adapter, recipe.training)
    splits = load_splits(recipe.data)
    planned = planned_steps(recipe.training, len(splits.train))
    if settings.trajectory is None:
        check_schedule(recipe.training, config, planned)
    tokenizer = load_tokenizer(recipe.model.name, recipe.data.max_length)
    check_positions(recipe.model.name, recipe.data.max_length)
    set_seed(recipe.training.seed)
    base = load_classifier(recipe.model.name, splits.label_names, tokenizer.pad_token_id).to(settings.device).train()
    batches = RecipeBatches(recipe, splits, tokenizer, settings.device)
    return _Ground(base, batches, recipe.training, aroma_of(recipe), planned)


def _replay(settings: RunSettings, ground: _Ground, recorded: Trajectory) -> Lineup:
    trajectory = recorded.renamed(fit_modules(recorded, ground.base))
    method = dataclasses.replace(
        ground.method,
        r=trajectory.component_rank,
        options=ground.method.options
        | {"r": trajectory.component_rank, "target_modules": list(trajectory.modules), "exclude_modules": None},
    )
    steps = settings.steps or trajectory.steps
    drawn = draw_steps(steps, ground.batches.steps_per_epoch, settings.every, settings.seed)
    arms = [
        *reference_arms(ground.base, trajectory.modules, method.dropout, ground.training, len(drawn)),
        replaying_arm(ground.base, method, trajectory, ground.training, steps, freezes=True),
        replaying_arm(ground.base, method, trajectory, ground.training, steps, freezes=False),
    ]
    return Lineup(arms, ground.batches, steps, drawn, trajectory)


def _for_real(settings: RunSettings, ground: _Ground) -> Lineup:
    training, planned = ground.training, ground.planned
    aroma, recorder = deciding_arm(ground.base, ground.method, training, planned)
    targets = list(aroma_layers(aroma.model))
    arms = [
        *reference_arms(ground.base, targets, ground.method.dropout, training, planned),
        aroma,
        replaying_arm(ground.base, ground.method, recorder, training, planned, freezes=False),
    ]
    steps = min(settings.steps or planned, planned)
    drawn = draw_steps(steps, ground.batches.steps_per_epoch, every=1, seed=settings.seed)
    return Lineup(arms, ground.batches, steps, drawn, recorder, training.early_stop)
