"""The rank trajectory of a run: after which step which module kept a component, and which finished."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from aroma.errors import AromaError, DataError, bad_value


@dataclass(frozen=True)
class Change:
    """What became of one module's component in training at the end of one inner loop.

    Args:
        step: Optimizer step after which it happened, counted from 1.
        module: Name of the module.
        merged: The component became a finished one.
        frozen: The module trains no further component.
    """

    step: int
    module: str
    merged: bool
    frozen: bool


@dataclass(frozen=True)
class Trajectory:
    """How the ranks of a run grew, without its weights; checked when it is made.

    Args:
        modules: Names of the growing modules, in module order.
        component_rank: Rank r of one component.
        steps: Optimizer steps of the run.
        checks: Steps after which an inner check was made, ascending.
        changes: What became of the components, by step and then in module order.

    Raises:
        DataError: The parts contradict each other.
    """

    modules: tuple[str, ...]
    component_rank: int
    steps: int
    checks: tuple[int, ...] = ()
    changes: tuple[Change, ...] = ()

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_order(self)
        _check_changes(self)

    # What a replay asks ----------------------------------------------------------------------------------------------

    def changes_at(self, step: int) -> Sequence[Change]:
        """Return what happens after optimizer step `step`, in module order."""
        return self._changes_by_step.get(step, ())

    def is_check(self, step: int) -> bool:
        """Whether an inner check is made after optimizer step `step`."""
        return step in self._check_steps

    # What is known of a moment ---------------------------------------------------------------------------------------

    def ranks(self, step: int) -> dict[str, int]:
        """Return the rank of every module's finished components after optimizer step `step`."""
        ranks = dict.fromkeys(self.modules, 0)
        for change in self.changes:
            if change.step <= step and change.merged:
                ranks[change.module] += self.component_rank
        return ranks

    def frozen(self, step: int) -> frozenset[str]:
        """Return the modules that have finished after optimizer step `step`."""
        return frozenset(change.module for change in self.changes if change.step <= step and change.frozen)

    # Other forms of it -----------------------------------------------------------------------------------------------

    def renamed(self, names: Mapping[str, str]) -> Trajectory:
        """Return the trajectory under other module names.

        Args:
            names: The new name by the old one, for every module.
        """
        changes = tuple(dataclasses.replace(change, module=names[change.module]) for change in self.changes)
        return dataclasses.replace(self, modules=tuple(names[name] for name in self.modules), changes=changes)

    def as_dict(self) -> dict[str, Any]:
        """Return the trajectory as a JSON-able dict. A change is `[step, index in modules, merged, frozen]`."""
        index = {name: number for number, name in enumerate(self.modules)}
        return {
            "modules": list(self.modules),
            "component_rank": self.component_rank,
            "steps": self.steps,
            "checks": list(self.checks),
            "changes": [[change.step, index[change.module], change.merged, change.frozen] for change in self.changes],
        }

    @classmethod
    def from_dict(cls, content: Any) -> Trajectory:
        """Return the trajectory that `as_dict` gave.

        Raises:
            DataError: It is not in that form, or its parts contradict each other.
        """
        try:
            modules = tuple(content["modules"])
            changes = [
                Change(step, modules[index], merged, frozen) for step, index, merged, frozen in content["changes"]
            ]
            return cls(modules, content["component_rank"], content["steps"], tuple(content["checks"]), tuple(changes))
        except AromaError:
            raise
        except (KeyError, TypeError, ValueError, IndexError) as error:
            remedy = (
                f"it is not a trajectory as AROMA writes it ({type(error).__name__}: {error}); give a run's folder"
            )
            raise DataError(f"trajectory: {remedy}") from error

    @cached_property
    def _changes_by_step(self) -> dict[int, list[Change]]:
        by_step: dict[int, list[Change]] = {}
        for change in self.changes:
            by_step.setdefault(change.step, []).append(change)
        return by_step

    @cached_property
    def _check_steps(self) -> frozenset[int]:
        return frozenset(self.checks)


def _check_sizes(trajectory: Trajectory) -> None:
    if not trajectory.modules:
        raise bad_value("modules", [], "no module grew, so there is nothing to replay; give another run", DataError)
    if len(set(trajectory.modules)) < len(trajectory.modules):
        raise bad_value("modules", list(trajectory.modules), "a name stands there twice; mend it", DataError)
    for name in ("component_rank", "steps"):
        if getattr(trajectory, name) < 1:
            raise bad_value(name, getattr(trajectory, name), "it is 1 or more in every run; mend it", DataError)


def _check_order(trajectory: Trajectory) -> None:
    changed = [change.step for change in trajectory.changes]
    for name, steps in (("checks", list(trajectory.checks)), ("changes", changed)):
        if steps != sorted(steps):
            raise bad_value(name, steps, "their steps do not ascend; mend it", DataError)
        if steps and not 1 <= steps[0] <= steps[-1] <= trajectory.steps:
            outside = steps[0] if steps[0] < 1 else steps[-1]
            raise bad_value(name, outside, f"not one of the run's steps, 1 to {trajectory.steps}; mend it", DataError)


def _check_changes(trajectory: Trajectory) -> None:
    known, over, seen = set(trajectory.modules), set(), set()
    for change in trajectory.changes:
        where = f"changes (step {change.step})"
        if change.module not in known:
            raise bad_value(where, change.module, "not one of the run's modules; mend it", DataError)
        if change.module in over or (change.step, change.module) in seen:
            raise bad_value(where, change.module, "the module changes twice, or after it has finished", DataError)
        if not (change.merged or change.frozen):
            raise bad_value(where, change.module, "its component is neither kept nor is it finished", DataError)
        seen.add((change.step, change.module))
        if change.frozen:
            over.add(change.module)
