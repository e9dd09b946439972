"""Table 5: what an epoch of training takes, and the paper's ratios beside ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from .formats import decimals, spread_text
from .notes import common_notes, stopped_early
from .protocol import protocol, seeds_sentence
from .records import Records, Run
from .stats import Spread
from .table import Cell, Column, Table, number_cell, text_cell

Seconds = Mapping[str, Spread]
"""Seconds of an epoch by task."""

LORA, ADALORA = "lora", "adalora"
"""Reference methods, by their label in the paper."""

PAPER_RATIOS: Mapping[str, float] = {LORA: 0.76, ADALORA: 0.285}
"""The paper's claim: AROMA's time per epoch as a share of each method's; averages of its Table 5."""


def time_table(records: Records, baseline: str | None) -> Table:
    """Return the table of seconds an epoch.

    Args:
        records: The runs.
        baseline: Method whose time the others' are divided by; None: none.
    """
    seconds = {method: _seconds(records, method) for method in records.methods}
    columns = [Column("method", ("method",), is_text=True)]
    cells = [[text_cell(method) for method in records.methods]]
    for task in records.tasks:
        columns.append(Column(f"{task}, s", (f"{task}_seconds_mean", f"{task}_seconds_std", f"{task}_seeds")))
        cells.append([_seconds_cell(seconds[method].get(task), len(records.seeds)) for method in records.methods])
    if len(records.tasks) > 1:
        columns.append(Column("average, s", ("average_seconds",)))
        cells.append([number_cell(_average(seconds[method], records.tasks), decimals) for method in records.methods])
    for other, paper_key in _compared(records, baseline).items():
        columns.append(Column(f"÷ {other}", (f"over_{other}",)))
        cells.append([number_cell(_ratio(seconds[method], seconds[other]), _ratio_text) for method in records.methods])
        if paper_key is not None:
            columns.append(Column("paper", (f"paper_over_{other}",)))
            cells.append([_paper_cell(records, method, paper_key) for method in records.methods])
    return Table(
        name="time",
        caption=_caption(records),
        columns=columns,
        rows=list(zip(*cells, strict=True)),
        notes=[*_side_by_side(records), *stopped_early(records), *common_notes(records)],
    )


def epoch_seconds(run: Run) -> float | None:
    """Return the mean training time of a whole epoch, in seconds; None where no step was timed.

    The last epoch of a run with a given number of steps is seldom whole, so it is the time of all steps, scaled to
    the steps of an epoch.
    """
    batch, accumulation = run.training["batch_size"], run.training.get("gradient_accumulation_steps", 1)
    steps_per_epoch = math.ceil(math.ceil(run.result["examples"]["train"] / batch) / accumulation)
    times, steps = run.result["epoch_seconds"], run.result["steps"]
    return sum(times) / steps * steps_per_epoch if times and steps else None


def _seconds(records: Records, method: str) -> dict[str, Spread]:
    found = {}
    for task in records.tasks:
        times = [epoch_seconds(run) for run in records.of(method, task)]
        spread = Spread.of([value for value in times if value is not None])
        if spread is not None:
            found[task] = spread
    return found


def _compared(records: Records, baseline: str | None) -> dict[str, str | None]:
    """Return the methods whose time others' are divided by, with the paper's name for them, None if it has none."""
    compared: dict[str, str | None] = {}
    if baseline is not None:
        compared[baseline] = LORA if baseline in records.methods_of_kind("lora") else None
    for method in _adalora(records, baseline):
        compared[method] = ADALORA
    return compared


def _adalora(records: Records, baseline: str | None) -> list[str]:
    """Return the AdaLoRA that ends with the baseline's rank, else the first one; in a list, empty without any."""
    methods = records.methods_of_kind("adalora")
    ranks = {method: records.of(method)[0].options.get("target_r") for method in methods}
    wanted = {run.options.get("r") for run in records.of(baseline)} if baseline is not None else set()
    return ([method for method in methods if ranks[method] in wanted] or methods)[:1]


def _seconds_cell(spread: Spread | None, planned: int) -> Cell:
    text = spread_text(spread, decimals, planned)
    return Cell(text, (spread.mean, spread.std, spread.count) if spread else (None, None, 0))


def _average(seconds: Seconds, tasks: list[str]) -> float | None:
    return statistics.fmean(seconds[task].mean for task in tasks) if all(task in seconds for task in tasks) else None


def _ratio(seconds: Seconds, others: Seconds) -> float | None:
    """Return the quotient of the average times, over the tasks that both have."""
    common = [task for task in seconds if task in others]
    if not common:
        return None
    return sum(seconds[task].mean for task in common) / sum(others[task].mean for task in common)


def _ratio_text(ratio: float) -> str:
    return f"{ratio:.3f}"


def _paper_cell(records: Records, method: str, paper_key: str) -> Cell:
    is_aroma = method in records.methods_of_kind("aroma")
    return number_cell(PAPER_RATIOS[paper_key] if is_aroma else None, lambda ratio: f"{ratio:g}")


def _caption(records: Records) -> str:
    return (
        "Seconds of training an epoch, evaluation not counted: the time of all steps that were taken, scaled to the "
        f"steps of an epoch. {seeds_sentence(records)} ÷: quotient of the averages over the tasks that both methods "
        "have; paper: the same quotient of AROMA in the paper's Table 5 (RoBERTa-base, six GLUE tasks, a V100). "
        f"{protocol(records)}"
    )


def _side_by_side(records: Records) -> list[str]:
    processes = records.grid.get("processes")
    if not isinstance(processes, int) or processes < 2:
        return []
    return [
        f"The grid asks for {processes} processes at a time, which disturb each other's times; `aroma bench run` "
        "measures the methods in turns."
    ]
