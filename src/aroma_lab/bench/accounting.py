"""From timed steps to seconds an epoch, and to the share of a saving that finished modules bring."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LORA, ADALORA, AROMA, UNFROZEN = "lora", "adalora", "aroma", "aroma-unfrozen"
"""The arms of a whole run; the last follows AROMA's ranks, but none of its modules ever finishes."""

PAPER_RATIOS: Mapping[str, float] = {LORA: 0.76, ADALORA: 0.285}
"""The paper's claim: AROMA's time per epoch as a share of each method's, averages of its Table 5."""


@dataclass(frozen=True)
class ArmEpoch:
    """One epoch of one method.

    Args:
        seconds: Time of all its steps; an estimate where not every step was measured.
        median_step_seconds: Median time of a measured step.
        trainable: Trainable adapter parameters, averaged over the steps.
        total_rank: Sum of the ranks after the last step.
        finished: Finished modules after the last step.
    """

    seconds: float
    median_step_seconds: float
    trainable: float
    total_rank: int
    finished: int


@dataclass(frozen=True)
class Epoch:
    """One pass over the examples, or what of it the run took.

    Args:
        number: Counted from 1.
        steps: Optimizer steps.
        measured_steps: Those of them that were run and timed.
        arms: What each method took, by name.
    """

    number: int
    steps: int
    measured_steps: int
    arms: Mapping[str, ArmEpoch]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every method."""
        return {name: arm.seconds for name, arm in self.arms.items()}


@dataclass(frozen=True)
class Saving:
    """What AROMA saves against LoRA, and how much of it comes from modules that have finished.

    Args:
        total: Seconds by which AROMA is faster than LoRA; negative if it is slower.
        finished: Seconds by which it is faster than with a pair in training in every finished module.
    """

    total: float
    finished: float

    @classmethod
    def of(cls, seconds: Mapping[str, float]) -> Saving:
        """Return the saving that the seconds of the methods, by name, come to."""
        return cls(seconds[LORA] - seconds[AROMA], seconds[UNFROZEN] - seconds[AROMA])

    @property
    def share(self) -> float | None:
        """`finished` / `total`; above 1 where AROMA without finished modules is slower than LoRA.

        None where AROMA saves nothing in all.
        """
        return self.finished / self.total if self.total > 0 else None


@dataclass(frozen=True)
class Means:
    """A whole run, an epoch on average; epochs that the run cut short count by their steps.

    Args:
        seconds: Seconds of an epoch, by method.
        trainable: Trainable adapter parameters, averaged over all steps, by method.
    """

    seconds: Mapping[str, float]
    trainable: Mapping[str, float]

    @classmethod
    def of(cls, epochs: Sequence[Epoch], steps_per_epoch: int) -> Means:
        """Return the means of `epochs`, for epochs of `steps_per_epoch` optimizer steps."""
        steps = sum(epoch.steps for epoch in epochs)
        names = list(epochs[0].arms)
        return cls(
            {name: sum(epoch.arms[name].seconds for epoch in epochs) / steps * steps_per_epoch for name in names},
            {name: sum(epoch.arms[name].trainable * epoch.steps for epoch in epochs) / steps for name in names},
        )


@dataclass
class ArmLedger:
    """Adds up one epoch of one method.

    Args:
        seconds: So far.
        step_seconds: Of the measured steps.
        trainable: Sum over steps of the trainable adapter parameters.
        steps: Steps of which `trainable` is known.
    """

    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    trainable: int = 0
    steps: int = 0

    def measured(self, seconds: float, stands_for: int) -> None:
        """Count a step that took `seconds` and stands for so many steps, itself included."""
        self.seconds += seconds * stands_for
        self.step_seconds.append(seconds)

    def extra(self, seconds: float) -> None:
        """Count what was timed at every step, and so stands for itself alone."""
        self.seconds += seconds

    def had(self, trainable: int) -> None:
        """Count the trainable adapter parameters of one step, measured or not."""
        self.trainable += trainable
        self.steps += 1

    def close(self, total_rank: int, finished: int) -> ArmEpoch:
        """Return the epoch, given the ranks and finished modules that it ended with."""
        median = statistics.median(self.step_seconds)
        return ArmEpoch(self.seconds, median, self.trainable / self.steps, total_rank, finished)
