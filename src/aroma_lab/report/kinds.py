"""Which tables there are."""

from __future__ import annotations

from aroma.errors import bad_value

from .inner_table import inner_table
from .main_table import main_table
from .paired_table import paired_table
from .records import Records
from .reset_table import reset_table
from .sets_table import sets_table
from .table import Table
from .time_table import time_table

KINDS = ("main", "paired", "sets", "reset", "time", "inner")
"""`main`: the paper's Table 2; `paired`: where a method beats the baseline; `sets`: Table 3; `reset`: Table 4; `time`:
Table 5; `inner`: when the inner criterion fires."""
DEFAULT_BASELINE = "lora-r8"
"""Method that others are compared with where it is among them and no other was named."""
_WITHOUT_BASELINE = ("reset", "inner")
"""Kinds that compare with no method."""


def make_table(records: Records, kind: str = "main", baseline: str | None = None, metric: str | None = None) -> Table:
    """Return a table of the runs.

    Args:
        records: The runs.
        kind: One of `KINDS`.
        baseline: Label of the method that others are compared with; None: `lora-r8` if it is there, else none. Not of
            `reset` and `inner`.
        metric: Of `sets`, the metric that is shown; None: the one that is the score.

    Raises:
        ConfigError: An unknown kind, a baseline without finished runs, no runs that such a table is of, a metric that
            they do not have, or a baseline or a metric for a kind that takes none.
        CheckpointError: A file is damaged or edited.
    """
    if kind not in KINDS:
        raise bad_value("--kind", kind, f"give one of {', '.join(KINDS)}")
    if metric is not None and kind != "sets":
        raise bad_value("--metric", metric, f"a table of kind {kind} shows the metric that is the score; leave it out")
    if baseline is not None and kind in _WITHOUT_BASELINE:
        raise bad_value("--baseline", baseline, f"a table of kind {kind} compares with no method; leave it out")
    finished = [method for method in records.methods if records.of(method)]
    if baseline is not None and baseline not in finished:
        raise bad_value("--baseline", baseline, f"no run of it has finished; give one of {', '.join(finished)}")
    if baseline is None and DEFAULT_BASELINE in finished:
        baseline = DEFAULT_BASELINE
    if kind == "main":
        return main_table(records, baseline)
    if kind == "paired":
        return paired_table(records, baseline)
    if kind == "sets":
        return sets_table(records, baseline, metric)
    if kind == "time":
        return time_table(records, baseline)
    return reset_table(records) if kind == "reset" else inner_table(records)
