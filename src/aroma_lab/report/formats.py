"""Tables as they are put together, and written by pandas: as Markdown, LaTeX or CSV."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
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
        """Add a column: what is shown, and the raw values by their heads in CSV."""
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

    def difference(self, title: str, prefix: str, found: pd.DataFrame) -> None:
        """Add a column of mean differences and their standard errors, which are columns of `found`."""
        values = found[[f"{prefix}difference", f"{prefix}error", *([] if prefix else ["pairs"])]]
        texts = [
            EMPTY if math.isnan(mean) else signed_points(mean) + ("" if math.isnan(error) else f" ± {points(error)}")
            for mean, error in values.to_numpy()[:, :2].astype(float)
        ]
        self.add(title, texts, **values)

    def written(self, suffix: str) -> str:
        """Return the table as a file of this suffix has it: `.md`, `.tex` (with the package booktabs) or `.csv`."""
        if suffix == ".csv":
            return str(pd.DataFrame(self.values).to_csv(index=False))
        is_latex = suffix == ".tex"
        escape = _escape_latex if is_latex else partial(re.sub, r"([\\|*_<>`])", r"\\\1")
        bold = (r"\textbf{{{}}}" if is_latex else "**{}**").format
        cells = pd.DataFrame({escape(title): list(map(escape, texts)) for title, texts in self.shown.items()})
        for title, row in self.best:
            cells.loc[row, escape(title)] = bold(cells.loc[row, escape(title)])
        meaning = " Bold: best mean of a column, among the methods with the most seeds in it." if self.best else ""
        caption, *notes = map(escape, [self.caption + meaning, *self.notes])
        # Words, which are their own raw values, to the left.
        sides = ["left" if self.values.get(title) == texts else "right" for title, texts in self.shown.items()]
        if not is_latex:
            body = cells.to_markdown(index=False, tablefmt="pipe", colalign=sides, disable_numparse=True)
            return "\n\n".join(filter(None, [body, caption, "\n".join(f"- {note}" for note in notes)])) + "\n"
        columns = "".join(side[0] for side in sides)
        body = cells.to_latex(index=False, escape=False, column_format=columns, caption=caption, position="tb")
        footnotes = "".join(f"\\par\\raggedright\\footnotesize {note}\n" for note in notes)
        return str(body).replace("\\end{table}", f"{footnotes}\\end{{table}}")


def points(score: float) -> str:
    """Return a score in points, 0.8512 as `85.12`."""
    return decimals(100 * score)


def decimals(value: float, digits: int = 2) -> str:
    """Return a number with so many decimals and a true minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def signed_points(difference: float) -> str:
    """Return a difference of scores in points with its sign; what rounds to zero has none."""
    words = f"{100 * difference:+.2f}"
    return words[1:] if float(words) == 0 else words.replace("-", "−")


def plain(value: float) -> str:
    """Return a number with as many digits as it needs, thousands grouped: 110, 112.5, 1,725, 0.0005."""
    return f"{value:,.10g}".replace("-", "−")


def span(values: Sequence[float]) -> str:
    """Return the one text of all `values`, or those of the smallest and the largest: `3`, `500–600`."""
    return "–".join(dict.fromkeys((plain(min(values)), plain(max(values)))))


def listing(items: Sequence[str]) -> str:
    """Return `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


def counted(number: int, noun: str) -> str:
    """Return `1 run`, `3 runs`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"},
        **{"<": r"\textless{}", ">": r"\textgreater{}", "−": "$-$", "Δ": r"$\Delta$", "ε": r"$\varepsilon$"},
        # Behind \\ a bracket would be read as its argument, and a star as part of it.
        **{"[": "{[}", "]": "{]}", "*": "{*}"},
    }
)


def _escape_latex(words: str) -> str:
    return words.translate(_LATEX)
