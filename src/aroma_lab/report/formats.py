"""Tables as they are put together, and written by pandas: as Markdown, LaTeX or CSV."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

EMPTY = "–"
"""Text of a cell without value."""


class Table:
    """A table as columns are added, each with its raw values for CSV and with the texts that a person reads.

    Args:
        methods: The method of each row.
        planned: Seeds that every cell should have.

    Attributes:
        values: The raw values by head in CSV.
        shown: The texts by title.
        best: Cells of `shown` that are emphasized, as title and row.
        caption: What the numbers are and how they came about.
        notes: What else a reader has to know, an item for each matter.
    """

    def __init__(self, methods: Sequence[str], planned: int) -> None:
        self.methods, self.planned = methods, planned
        self.values: dict[str, Any] = {}
        self.shown: dict[str, list[str]] = {}
        self.best: set[tuple[str, int]] = set()
        self.caption = ""
        self.notes: list[str] = []
        self.add("method", methods, method=methods)

    def add(self, title: str, texts: Sequence[str], **values: Any) -> None:
        """Add a column: the text shown, and the raw values by their heads in CSV."""
        self.values |= {key: list(column) for key, column in values.items()}
        self.shown[title] = list(texts)

    def numbers(self, title: str, key: str, values: Sequence[float], words: Callable[[float], str]) -> None:
        """Add a column of numbers, some of which may be NaN."""
        self.add(title, [EMPTY if math.isnan(value) else words(value) for value in values], **{key: values})

    def spread(
        self, title: str, heads: Sequence[str], found: pd.DataFrame, words: Callable[[float], str], mark: bool = False
    ) -> None:
        """Add a column of means and deviations, as `statistics.spread` returns them.

        With `mark` the largest mean is emphasized, ties as printed included. Only methods with the most seeds compete:
        a mean over the seeds that survived is not comparable with one over all.
        """
        texts = []
        for mean, std, count in found[["mean", "std", "count"]].itertuples(index=False, name=None):
            shown = EMPTY if math.isnan(mean) else words(mean)
            shown += "" if math.isnan(std) else f" ± {words(std)}"
            texts.append(shown if count == self.planned else f"{shown} ({count} of {self.planned})")
        self.add(title, texts, **dict(zip(heads, (found["mean"], found["std"], found["count"]), strict=False)))
        means = found["mean"].where(found["count"] == found["count"].max()).to_numpy()
        if mark and np.isfinite(means).sum() > 1:
            winner = words(np.nanmax(means))
            self.best |= {(title, row) for row, mean in enumerate(means) if words(mean) == winner}

    def difference(self, title: str, found: pd.DataFrame) -> None:
        """Add a column of differences, of which `found` has `difference`, its standard `error`, and the `pairs`."""
        texts = [
            EMPTY
            if math.isnan(mean)
            else f"{100 * mean:+.2f}".replace("-", "−") + ("" if math.isnan(error) else f" ± {points(error)}")
            for mean, error in zip(found.difference, found.error, strict=True)
        ]
        self.add(title, texts, **found[["difference", "error", "pairs"]])

    def written(self, suffix: str) -> str:
        """Return the table as Markdown (`.md`), or without caption and notes as LaTeX (`.tex`, booktabs) or CSV."""
        if suffix == ".csv":
            return str(pd.DataFrame(self.values).to_csv(index=False))
        if suffix == ".tex":
            return str(pd.DataFrame(self.shown).to_latex(index=False, escape=True)).replace("−", "$-$")
        cells = pd.DataFrame({_escape(title): list(map(_escape, texts)) for title, texts in self.shown.items()})
        for title, row in self.best:
            cells.loc[row, _escape(title)] = f"**{cells.loc[row, _escape(title)]}**"
        meaning = " Bold: best mean of a column, among the methods with the most seeds in it." if self.best else ""
        # Words, which are their own raw values, to the left.
        sides = ["left" if self.values.get(title) == texts else "right" for title, texts in self.shown.items()]
        body = cells.to_markdown(index=False, tablefmt="pipe", colalign=sides, disable_numparse=True)
        notes = "\n".join(f"- {_escape(note)}" for note in self.notes)
        return "\n\n".join(filter(None, [body, _escape(self.caption + meaning), notes])) + "\n"


def points(score: float) -> str:
    """Return a score in points, 0.8512 as `85.12`."""
    return decimals(100 * score)


def decimals(value: float, digits: int = 2) -> str:
    """Return a number with so many decimals and a true minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def span(values: Sequence[float]) -> str:
    """Return the one text of all `values`, or those of the smallest and the largest: `3`, `500–600`."""
    return "–".join(dict.fromkeys(f"{value:,.10g}" for value in (min(values), max(values))))


def listing(items: Sequence[str]) -> str:
    """Return `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


def counted(number: int, noun: str) -> str:
    """Return `1 run`, `3 runs`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _escape(words: str) -> str:
    return re.sub(r"([\\|*_<>`])", r"\\\1", words)
