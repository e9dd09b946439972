"""When the inner criterion (5) fires: after how many steps of an inner loop, by kind of matrix."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aroma.errors import CheckpointError, bad_value

from ..pictures.places import places_of
from ..specs import adapter_keys
from .formats import plain
from .notes import common_notes
from .protocol import protocol
from .records import Records, Run
from .table import Cell, Column, Table, number_cell, text_cell

ALL = "all"
"""Row of all matrices of a method and a task."""


@dataclass(frozen=True)
class Loop:
    """One inner loop of one matrix.

    Args:
        kind: Kind of the matrix, as `attention.self.query`.
        outer_step: Outer step p, counted from 1.
        fired: Inner step t at which the criterion was met first; None: it never was.
    """

    kind: str
    outer_step: int
    fired: int | None


def inner_table(records: Records) -> Table:
    """Return the table of the inner criterion.

    Raises:
        ConfigError: No finished run has inner checks.
    """
    rows = [row for method in records.methods for task in records.tasks for row in _rows(records, method, task)]
    if not rows:
        raise bad_value(
            "--kind", "inner", f"no run with inner checks has finished in {records.folder}; run AROMA first"
        )
    columns = [
        Column("method", ("method",), is_text=True),
        Column("task", ("task",), is_text=True),
        Column("matrices", ("matrices",), is_text=True),
        Column("fired", ("fired",)),
        Column("never", ("never",)),
        Column("lower quartile", ("lower_quartile",)),
        Column("median", ("median",)),
        Column("upper quartile", ("upper_quartile",)),
        Column("median, first loops", ("first_median",)),
        Column("median, later loops", ("later_median",)),
        Column("predicted", ("predicted",)),
    ]
    return Table(
        name="inner",
        caption=(
            "Inner step t at which the inner criterion (5) is first met, over the inner loops of all matrices and "
            "seeds. Predicted: ΔT_in (1 + 1/ε_in), where a norm that grows linearly meets it, however much is left to "
            "learn. Fired: loops in which it was met; never: loops that ended, at T_in, without. The quartiles are of "
            f"the loops in which it fired. {protocol(records)}"
        ),
        columns=columns,
        rows=rows,
        notes=common_notes(records),
    )


def loops_of(run: Run) -> list[Loop]:
    """Return the inner loops of a run: those in which the criterion fired, and those that ended without.

    A loop that the end of the run cut off before the criterion fired tells nothing and is left out.

    Raises:
        CheckpointError: `events.jsonl` is damaged.
    """
    fired = {(outer, module): inner for outer, inner, module in run.result["inner_checks"]}
    keys = dict.fromkeys([*fired, *_ended(run)])
    kinds = _kinds(module for _, module in keys)
    return [Loop(kinds[module], outer, fired.get((outer, module))) for outer, module in keys]


def predicted_step(options: Mapping[str, Any]) -> float | None:
    """Return the inner step near which a linearly growing norm meets criterion (5); None without a tolerance."""
    tolerance = options.get("inner_tolerance", adapter_keys()["inner_tolerance"].default)
    interval = options.get("inner_check_interval", adapter_keys()["inner_check_interval"].default)
    # The norm grows from c(t − ΔT) to ct, by the share ΔT / (t − ΔT), which is less than ε once t > ΔT (1 + 1/ε).
    return round(interval * (1 + 1 / tolerance), 6) if tolerance else None


def _rows(records: Records, method: str, task: str) -> Iterator[list[Cell]]:
    runs = [run for run in records.of(method, task) if run.kind == "aroma" and predicted_step(run.options)]
    loops = [loop for run in runs for loop in loops_of(run)]
    predictions = {predicted_step(run.options) for run in runs}
    predicted = predictions.pop() if len(predictions) == 1 else None
    for kind in dict.fromkeys([ALL, *(loop.kind for loop in loops)] if runs else []):
        of_kind = [loop for loop in loops if kind in (ALL, loop.kind)]
        names = [text_cell(text) for text in (method, task, kind)]
        yield [*names, *_number_cells(of_kind), number_cell(predicted, plain)]


def _number_cells(loops: Sequence[Loop]) -> list[Cell]:
    fired = [loop.fired for loop in loops if loop.fired is not None]
    first = [loop.fired for loop in loops if loop.fired is not None and loop.outer_step == 1]
    later = [loop.fired for loop in loops if loop.fired is not None and loop.outer_step > 1]
    medians = [number_cell(statistics.median(steps) if steps else None, plain) for steps in (first, later)]
    quartiles = [number_cell(value, plain) for value in _quartiles(fired)]
    return [number_cell(len(fired), plain), number_cell(len(loops) - len(fired), plain), *quartiles, *medians]


def _quartiles(steps: Sequence[int]) -> Sequence[float | None]:
    if len(steps) < 2:
        return [steps[0] if steps else None] * 3
    return statistics.quantiles(steps, n=4, method="inclusive")


def _ended(run: Run) -> list[tuple[int, str]]:
    """Return outer step and module of every inner loop that ended with an outer check."""
    path = run.files.events
    if not path.exists():
        return []
    try:
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [(event["outer_step"], event["module"]) for event in events if event["kind"] in ("merged", "frozen")]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: truncated or edited ({error}); restore the file that was written") from error


def _kinds(modules: Iterable[str]) -> dict[str, str]:
    names = list(dict.fromkeys(modules))
    return {name: place.kind for name, place in zip(names, places_of(names), strict=True)}
