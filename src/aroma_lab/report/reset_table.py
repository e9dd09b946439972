"""Table 4: what resetting the optimizer at a merge does to ranks and scores."""

from __future__ import annotations

from aroma.errors import bad_value

from ..specs import adapter_keys
from .formats import decimals, spread_text
from .main_table import score_cells, task_column
from .notes import common_notes
from .protocol import protocol, seeds_sentence
from .records import Records
from .stats import Spread
from .table import Cell, Column, Table, text_cell

_MEANING = {
    "prune": "prune: most entries of Adam's moments are set to zero (the paper's)",
    "zero": "zero: the whole state is forgotten",
    "none": "none: nothing is reset",
}


def reset_table(records: Records) -> Table:
    """Return the table of AROMA's runs by their `reset`.

    Raises:
        ConfigError: No run of AROMA has finished.
    """
    methods = records.methods_of_kind("aroma")
    if not methods:
        raise bad_value("--kind", "reset", f"no run of kind aroma has finished in {records.folder}; run some first")
    resets = {method: _reset_of(records, method) for method in methods}
    columns = [Column("method", ("method",), is_text=True), Column("reset", ("reset",), is_text=True)]
    cells = [[text_cell(method) for method in methods], [text_cell(resets[method]) for method in methods]]
    for task in records.tasks:
        columns.append(task_column(records, task))
        cells.append(score_cells(records, task, methods))
        for key, title in (("average_rank", "average rank"), ("effective_rank", "effective rank")):
            columns.append(Column(f"{task}, {title}", (f"{task}_{key}_mean", f"{task}_{key}_std")))
            cells.append([_rank_cell(records, method, task, key) for method in methods])
    meaning = "; ".join(
        _MEANING[kind] for kind in _MEANING if any(kind in reset.split("/") for reset in resets.values())
    )
    return Table(
        name="reset",
        caption=(
            f"What a merge does to the optimizer state of the next component. {meaning}. {seeds_sentence(records)} "
            f"Scores in points (100 × metric); ranks are means over the adapted matrices at the end. "
            f"{protocol(records)}"
        ),
        columns=columns,
        rows=list(zip(*cells, strict=True)),
        best="best mean of a column, among the methods with the most seeds in it",
        notes=common_notes(records),
    )


def _reset_of(records: Records, method: str) -> str:
    return "/".join(
        dict.fromkeys(str(run.options.get("reset", adapter_keys()["reset"].default)) for run in records.of(method))
    )


def _rank_cell(records: Records, method: str, task: str, key: str) -> Cell:
    values = [run.result.get(key) for run in records.of(method, task)]
    spread = Spread.of([float(value) for value in values if value is not None])
    text = spread_text(spread, decimals, len(records.seeds))
    return Cell(text, (spread.mean, spread.std) if spread else (None, None))
