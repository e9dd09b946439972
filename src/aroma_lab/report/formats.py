"""Tables as they are put together and written: columns, numbers as text, and text, Markdown, LaTeX or CSV."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from aroma.report.page import amount as amount

from .statistics import CONFIDENCE

EMPTY = "–"
"""Text of a cell without value."""
SUFFIXES: Mapping[str, str] = {".txt": "text", ".md": "markdown", ".tex": "latex", ".csv": "csv"}
"""The format that a file's name asks for."""


class Table:
    """A table as columns are added, each with its raw values for CSV and with the texts that a person reads.

    Args:
        methods: The method of each row.
        planned: Seeds that every cell should have.

    Attributes:
        name: Its kind, for the label of a LaTeX table.
        best: Cells of `shown` that are emphasized, as (row, column) positions.
        caption: What the numbers are and how they came about.
        notes: What else a reader has to know, an item for each matter.
    """

    def __init__(self, methods: Sequence[str], planned: int) -> None:
        self.methods, self._planned = methods, planned
        self._values: dict[str, Any] = {}
        self._shown: dict[str, Sequence[str]] = {}
        self.best: set[tuple[int, int]] = set()
        self.name = self.caption = ""
        self.notes: Sequence[str] = ()
        self.add("method", methods, method=methods)

    @property
    def values(self) -> pd.DataFrame:
        """The raw values, as CSV has them."""
        return pd.DataFrame(self._values)

    @property
    def shown(self) -> pd.DataFrame:
        """The same rows as texts."""
        return pd.DataFrame(self._shown, dtype=object)

    def add(self, title: str, texts: Sequence[str], **values: Any) -> None:
        """Add a column: what is shown, and the raw values by their heads in CSV."""
        self._values |= {key: list(column) for key, column in values.items()}
        self._shown[title] = list(texts)

    def raw(self, key: str, values: Any) -> None:
        """Add a column that only CSV has."""
        self._values[key] = list(values)

    def numbers(self, title: str, key: str, values: Sequence[float], words: Callable[[float], str]) -> None:
        """Add a column of numbers, some of which may be NaN."""
        self.add(title, [EMPTY if math.isnan(value) else words(value) for value in values], **{key: values})

    def spread(
        self,
        title: str,
        heads: Sequence[str],
        found: pd.DataFrame,
        words: Callable[[float], str],
        mark_best: bool = False,
    ) -> None:
        """Add a column of means and deviations, as `statistics.spread` returns them.

        With `mark_best` the largest mean is marked, ties as printed included. Only methods with the most seeds
        compete: a mean over the seeds that survived is not comparable with one over all.
        """
        texts = []
        for mean, std, count in found[["mean", "std", "count"]].itertuples(index=False, name=None):
            shown = EMPTY if math.isnan(mean) else words(mean)
            shown += "" if math.isnan(std) else f" ± {words(std)}"
            texts.append(shown if count == self._planned else f"{shown} ({count} of {self._planned})")
        values = dict(zip(heads, (found["mean"], found["std"], found["count"]), strict=False))
        self.add(title, texts, **values)
        means = found["mean"].where(found["count"] == found["count"].max()).to_numpy()
        if mark_best and np.isfinite(means).sum() > 1:
            winner = words(np.nanmax(means))
            column = len(self._shown) - 1
            self.best |= {(row, column) for row, mean in enumerate(means) if words(mean) == winner}

    def difference(self, title: str, prefix: str, found: pd.DataFrame, planned: int) -> None:
        """Add a column of differences, as `statistics.paired_differences` returns them, of so many planned pairs."""
        texts = []
        row: Any
        for row in found.itertuples():
            has_interval = not math.isnan(row.low)
            interval = f"{signed_points(row.low)}, {signed_points(row.high)}" if has_interval else "no interval"
            pairs = "" if row.pairs == planned else f" ({row.pairs:.0f} of {counted(planned, 'pair')})"
            shown = f"{signed_points(row.difference)} [{interval}]{pairs}"
            texts.append(EMPTY if math.isnan(row.difference) else shown)
        values = {"difference": found.difference, "difference_low": found.low, "difference_high": found.high}
        values["difference_pairs"] = found.pairs.astype("Int64")
        self.add(f"{title} [{CONFIDENCE:.0%}]", texts, **{prefix + head: column for head, column in values.items()})

    def cells(self, emphasize: Callable[[str], str], escape: Callable[[str], str] = str) -> pd.DataFrame:
        """Return what is shown with all texts escaped, and the best ones emphasized."""
        cells = {escape(title): list(map(escape, texts)) for title, texts in self._shown.items()}
        columns = list(cells.values())
        for row, column in self.best:
            columns[column][row] = emphasize(columns[column][row])
        return pd.DataFrame(cells)

    def caption_with(self, emphasis: str) -> str:
        """Return the caption, and what the emphasis means."""
        meaning = f" {emphasis}: best mean of a column, among the methods with the most seeds in it."
        return self.caption + (meaning if self.best else "")

    def sides(self, left: str, right: str) -> list[str]:
        """Return the alignment of the columns: words, which are their own raw values, to the left."""
        return [left if self._values.get(title) == texts else right for title, texts in self._shown.items()]


def text(table: Table) -> str:
    """Return plain text: the caption, the aligned table with a `*` before the best, the notes."""
    body = _tabulate(table.cells(lambda words: f"*{words}"), "simple", table.sides("left", "right"))
    paragraphs = [textwrap.fill(table.caption_with("*"), 100, break_long_words=False)]
    notes = [textwrap.fill(note, 100, subsequent_indent="  ", break_long_words=False) for note in table.notes]
    return "\n\n".join(filter(None, [*paragraphs, body, "\n".join(notes)])) + "\n"


def markdown(table: Table) -> str:
    """Return a Markdown table with the best in bold, the caption and the notes below it."""
    cells = table.cells(lambda words: f"**{words}**", _escape_markdown)
    caption, *notes = map(_escape_markdown, (table.caption_with("Bold"), *table.notes))
    body = _tabulate(cells, "pipe", table.sides("left", "right"))
    return "\n\n".join(filter(None, [body, caption, "\n".join(f"- {note}" for note in notes)])) + "\n"


def latex(table: Table) -> str:
    """Return a LaTeX table with the best in bold and the notes below it, made as wide as the text if it is wider.

    It needs the packages booktabs and graphicx.
    """
    cells = table.cells(lambda words: rf"\textbf{{{words}}}", _escape_latex)
    body = cells.to_latex(index=False, escape=False, column_format="".join(table.sides("l", "r"))).strip()
    lines = [
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{_escape_latex(table.caption_with('Bold'))}}}",
        rf"\label{{tab:{table.name}}}",
        r"\medskip\setlength{\tabcolsep}{4pt}",
        rf"\resizebox{{\ifdim\width>\linewidth\linewidth\else\width\fi}}{{!}}{{{body}}}",
        r"\par\medskip",
        *(rf"\par\raggedright\footnotesize {_escape_latex(note)}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_csv(table: Table) -> str:
    """Return the raw values as CSV."""
    return str(table.values.to_csv(index=False))


FORMATS: Mapping[str, Callable[[Table], str]] = {"text": text, "markdown": markdown, "latex": latex, "csv": to_csv}


def points(score: float) -> str:
    """Return a score in points, 0.8512 as `85.12`."""
    return decimals(100 * score)


def decimals(value: float) -> str:
    """Return a number with two decimals and a true minus sign."""
    return f"{value:.2f}".replace("-", "−")


def thousandths(value: float) -> str:
    """Return a number with three decimals and a true minus sign."""
    return f"{value:.3f}".replace("-", "−")


def signed_points(difference: float) -> str:
    """Return a difference of scores in points with its sign; what rounds to zero has none."""
    words = f"{100 * difference:+.2f}"
    return words[1:] if float(words) == 0 else words.replace("-", "−")


def plain(value: float) -> str:
    """Return a number with as many digits as it needs, thousands grouped: 110, 112.5, 1,725, 0.0005."""
    return f"{value:,.10g}".replace("-", "−")


def span(values: Sequence[float], words: Callable[[float], str] = plain) -> str:
    """Return the one text of all `values`, or those of the smallest and the largest: `3`, `500–600`."""
    return "–".join(dict.fromkeys((words(min(values)), words(max(values)))))


def listing(items: Sequence[str]) -> str:
    """Return `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


def counted(number: int, noun: str) -> str:
    """Return `1 run`, `3 runs`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def show(value: object) -> str:
    """Return a setting as a person writes it: numbers short, texts bare, null for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float | int) else str(value)


def _tabulate(cells: pd.DataFrame, form: str, sides: Sequence[str]) -> str:
    return str(cells.to_markdown(index=False, tablefmt=form, colalign=sides, disable_numparse=True))


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
"""Beyond what pandas escapes: the letters that LaTeX's UTF-8 lacks, and what to_latex's rows give a meaning."""


def _escape_markdown(words: str) -> str:
    return re.sub(r"([\\|*_<>`])", r"\\\1", words)


def _escape_latex(words: str) -> str:
    # Two hyphens, as of an option, would become a dash.
    return re.sub("-(?=-)", "-{}", words.translate(_LATEX))
