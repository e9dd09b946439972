"""What a whole run found, as JSON holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .accounting import ADALORA, AROMA, LORA, PAPER_RATIOS, Epoch, Means, Saving
from .machine import bench_provenance
from .recorder import TRAJECTORY_FILE
from .run_settings import RunSettings

if TYPE_CHECKING:
    from .run_lineup import Lineup

RESULT_FILE = "result.json"
"""Name of the file in which a whole run leaves what it found."""


@dataclass(frozen=True)
class RunResult:
    """What a whole run found.

    Args:
        settings: What was measured.
        is_replay: Whether AROMA followed a trajectory; if not, it trained for real.
        labels: Names of the methods for tables and pictures.
        modules: Number of modules that could grow.
        planned_steps: Optimizer steps that the run was to have.
        steps_per_epoch: Optimizer steps of an epoch.
        epochs: The epochs; the last may be cut short.
        provenance: Versions, revision, machine, threads.
    """

    settings: RunSettings
    is_replay: bool
    labels: Mapping[str, str]
    modules: int
    planned_steps: int
    steps_per_epoch: int
    epochs: Sequence[Epoch]
    provenance: Mapping[str, Any]

    @classmethod
    def of(cls, settings: RunSettings, lineup: Lineup, epochs: Sequence[Epoch]) -> RunResult:
        """Return what has been found after `epochs`."""
        steps = sum(epoch.steps for epoch in epochs)
        return cls(
            settings=settings,
            is_replay=lineup.is_replay,
            labels={arm.name: arm.label for arm in lineup.arms},
            modules=len(lineup.trajectory(steps).modules),
            planned_steps=lineup.steps,
            steps_per_epoch=lineup.batches.steps_per_epoch,
            epochs=tuple(epochs),
            provenance=bench_provenance(settings.device),
        )

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return sum(epoch.steps for epoch in self.epochs)

    @property
    def means(self) -> Means:
        """The average epoch."""
        return Means.of(self.epochs, self.steps_per_epoch)


def result_record(result: RunResult, complete: bool) -> dict[str, Any]:
    """Return the content of `result.json`.

    Args:
        result: What was found.
        complete: Whether the run is over, or this is what there is so far.
    """
    means = result.means
    return {
        "complete": complete,
        "mode": "replay" if result.is_replay else "training",
        "notes": notes(result),
        "settings": dataclasses.asdict(result.settings),
        "methods": dict(result.labels),
        "modules": result.modules,
        "steps": result.steps,
        "planned_steps": result.planned_steps,
        "measured_steps": sum(epoch.measured_steps for epoch in result.epochs),
        "steps_per_epoch": result.steps_per_epoch,
        "mean_epoch": {
            "seconds": dict(means.seconds),
            "trainable": dict(means.trainable),
            **_comparison(means.seconds),
        },
        "paper": {"table": 5, "aroma_over": dict(PAPER_RATIOS)},
        "epochs": [dataclasses.asdict(epoch) | _comparison(epoch.seconds) for epoch in result.epochs],
        "trajectory": TRAJECTORY_FILE,
        **result.provenance,
    }


def notes(result: RunResult) -> list[str]:
    """Return what a reader of the numbers has to know, an entry a matter."""
    settings, epochs = result.settings, result.steps / result.steps_per_epoch
    found = [
        "A step is forward, backward, optimizer, what the method does after it, and clearing; loading of data is not "
        "in it.",
        f"{result.steps} steps, {epochs:.2f} epochs; the average epoch is their mean, scaled to a whole epoch.",
    ]
    if settings.every > 1:
        found.append(
            f"Seconds are estimates: one step of {settings.every}, drawn at random, was run and timed and stands for "
            "all; AROMA's merges are timed one by one. AdaLoRA's budget shrinks over the steps that were run."
        )
    if settings.recipe is None:
        found.append("Tokens and weights are random, and every example has full length.")
    if not result.is_replay:
        found.append("AROMA decided for itself; LoRA and AdaLoRA trained with its recipe's loop.")
    return found


def _comparison(seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return quotients and saving that the seconds of the methods come to."""
    saving = Saving.of(seconds)
    return {
        "aroma_over": {name: seconds[AROMA] / seconds[name] for name in (LORA, ADALORA)},
        "saving_seconds": saving.total,
        "saving_of_finished_seconds": saving.finished,
        "share_of_finished": saving.share,
    }
