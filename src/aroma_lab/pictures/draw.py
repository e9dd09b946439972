"""From folders of runs to a figure."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aroma.errors import ConfigError, DataError, bad_value

from ..report.records import Run
from .circles import Grown, RankPanel, draw_rank_panels
from .components import cosine_panels
from .cosines import draw_cosines
from .panels import draw_curves
from .pareto import draw_pareto
from .runs import Finished, MethodRuns, by_method, find_runs, only

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Choice:
    """What a figure shows.

    Args:
        folders: Output folders of grids, or folders of runs.
        task: Name of the task; None if there is but one, or all are shown.
        methods: Labels of the methods, in the order shown; None for all.
        modules: Names of modules, or ends of them; None for the paper's.
        seed: Seed of the runs, where one run of a method is shown; None for the lowest.
    """

    folders: tuple[str | os.PathLike[str], ...]
    task: str | None = None
    methods: tuple[str, ...] | None = None
    modules: tuple[str, ...] | None = None
    seed: int | None = None


def draw_figure(kind: str, choice: Choice) -> Figure:
    """Return a figure of finished runs.

    Args:
        kind: One of `KINDS`.
        choice: What it shows.

    Raises:
        ConfigError: A choice names what is not there, or leaves open what has to be chosen.
        DataError: There are no finished runs, or too few.
        CheckpointError: A record or an adapter is missing or damaged.
    """
    if choice.modules is not None and kind not in _OF_MODULES:
        raise bad_value("--modules", " ".join(choice.modules), f"only for {' and '.join(_OF_MODULES)}")
    if choice.seed is not None and kind not in _OF_ONE_SEED:
        raise bad_value("--seed", choice.seed, f"only for {' and '.join(_OF_ONE_SEED)}; others show all seeds")
    finished = find_runs(choice.folders)
    if choice.task is not None:
        only("--task", [choice.task], finished.tasks)
        finished = finished.of_task(choice.task)
    return KINDS[kind](finished, choice)


def _curves(finished: Finished, choice: Choice) -> Figure:
    return draw_curves(_methods(_of_one_task(finished), choice), choice.modules)


def _ranks(finished: Finished, choice: Choice) -> Figure:
    shown = [_one_seed(method, choice.seed) for method in _methods(_of_one_task(finished), choice)]
    panels = [_rank_panel(run) for run in shown if run.result["ranks"]]
    if not panels:
        methods = ", ".join(run.method for run in shown)
        raise bad_value("--methods", methods, "none of them has ranks; choose methods with low-rank updates")
    return draw_rank_panels(panels)


def _rank_panel(run: Run) -> RankPanel:
    matrices = [Grown(name, rank, run.result["effective_ranks"][name]) for name, rank in run.result["ranks"].items()]
    return RankPanel(f"{run.method} on {run.task}, seed {run.seed}", matrices)


def _cosines(finished: Finished, choice: Choice) -> Figure:
    first, second = _pair(_of_one_task(finished), choice)
    return draw_cosines(cosine_panels(first, second, choice.modules), first, second)


def _pareto(finished: Finished, choice: Choice) -> Figure:
    present = {run.method for run in finished.runs}
    wanted = only("--methods", choice.methods, [label for label in finished.methods if label in present])
    tasks = {task: _groups(finished.of_task(task)) for task in finished.tasks}
    # A grid under way has methods that not every task has finished.
    shown = {task: [groups[label] for label in wanted if label in groups] for task, groups in tasks.items()}
    return draw_pareto({task: methods for task, methods in shown.items() if methods})


KINDS: dict[str, Callable[[Finished, Choice], Figure]] = {
    "curves": _curves,
    "ranks": _ranks,
    "cosines": _cosines,
    "pareto": _pareto,
}
"""The figures by name."""
_OF_MODULES = ("curves", "cosines")
_OF_ONE_SEED = ("ranks", "cosines")


def _of_one_task(finished: Finished) -> Finished:
    if len(finished.tasks) > 1:
        raise bad_value("--task", None, f"this figure shows one task; choose one of {', '.join(finished.tasks)}")
    return finished


def _methods(finished: Finished, choice: Choice) -> list[MethodRuns]:
    groups = _groups(finished)
    return [groups[label] for label in only("--methods", choice.methods, list(groups))]


def _groups(finished: Finished) -> dict[str, MethodRuns]:
    return {group.method: group for group in by_method(finished)}


def _one_seed(method: MethodRuns, seed: int | None) -> Run:
    if seed is None:
        return min(method.runs, key=lambda run: run.seed)
    for run in method.runs:
        if run.seed == seed:
            return run
    known = ", ".join(str(run.seed) for run in method.runs)
    raise bad_value("--seed", seed, f"{method.method} has no finished run of it; there are {known}")


def _pair(finished: Finished, choice: Choice) -> tuple[Run, Run]:
    """Return the two runs to compare: two methods at their lowest common seed, or the only two runs there are."""
    if choice.methods is None and choice.seed is None and len(finished.runs) == 2:
        one, other = finished.runs
        return (one, other) if _place(choice, one) <= _place(choice, other) else (other, one)
    methods = _methods(finished, choice)
    if len(methods) != 2:
        labels = ", ".join(method.method for method in methods)
        raise ConfigError(
            f"--methods: cosines compare two runs; choose two of {labels}, or give the folders of two runs"
        )
    if choice.seed is not None:
        return _one_seed(methods[0], choice.seed), _one_seed(methods[1], choice.seed)
    common = {run.seed for run in methods[0].runs} & {run.seed for run in methods[1].runs}
    if not common:
        raise DataError(
            f"--methods: {methods[0].method} and {methods[1].method} have no finished runs of the same seed; "
            "give the folders of two runs"
        )
    return _one_seed(methods[0], min(common)), _one_seed(methods[1], min(common))


def _place(choice: Choice, run: Run) -> int:
    """Return at which of the folders given a run lies, so that the first one given comes first."""
    for index, folder in enumerate(choice.folders):
        if run.folder.resolve().is_relative_to(os.path.realpath(folder)):
            return index
    return len(choice.folders)
