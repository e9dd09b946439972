"""Tables as they are put together and written: columns, numbers as text, and text, Markdown, LaTeX or CSV."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from .statistics import CONFIDENCE

EMPTY = "–"
"""Text of a cell without value."""
SUFFIXES: Mapping[str, str] = {".txt": "text", ".md": "markdown", ".tex": "latex", ".csv": "csv"}
"""The format that a file's name asks for."""
_BLANK = "\0"
_WIDTH = 100
"""Characters of a line of caption or notes in plain text."""


@dataclass(frozen=True)
class Table:
    """A table before it has a format.

    Args:
        name: Short name, for the label of a LaTeX table.
        caption: What the numbers are and how they came about.
        values: The raw numbers, as CSV has them.
        shown: What a person reads: the same rows, as texts.
        best: Cells of `shown` that are emphasized, as (row, column) positions.
        notes: What else a reader has to know, an item for each matter.
    """

    name: str
    caption: str
    values: pd.DataFrame
    shown: pd.DataFrame
    best: frozenset[tuple[int, int]] = frozenset()
    notes: Sequence[str] = field(default_factory=tuple)

    def emphasized(self, emphasize: Callable[[str], str], escape: Callable[[str], str]) -> pd.DataFrame:
        """Return what is shown with all texts escaped, and the best ones emphasized."""
        cells = self.shown.map(escape).to_numpy(dtype=object)
        for row, column in self.best:
            cells[row, column] = emphasize(cells[row, column])
        return pd.DataFrame(cells, columns=[escape(str(title)) for title in self.shown.columns])

    def caption_with(self, emphasis: str) -> str:
        """Return the caption, and what the emphasis means."""
        meaning = f" {emphasis}: best mean of a column, among the methods with the most seeds in it."
        return self.caption + (meaning if self.best else "")

    def sides(self, left: str, right: str) -> list[str]:
        """Return the alignment of the columns: words, which are their own raw values, to the left."""
        words = {title for title in self.values if pd.api.types.is_string_dtype(self.values[title])}
        return [left if title in words else right for title in self.shown.columns]


class Columns:
    """Columns of a table as they are added, each with its raw values and with what is shown of them.

    Args:
        methods: The method of each row.
        planned: Seeds that every cell should have.
    """

    def __init__(self, methods: Sequence[str], planned: int) -> None:
        self.methods, self._planned = methods, planned
        self._values: dict[str, Any] = {}
        self._shown: dict[str, list[str]] = {}
        self._best: set[tuple[int, int]] = set()
        self.words("method", list(methods))

    def add(self, title: str, texts: Sequence[str], **values: Any) -> None:
        """Add a column: what is shown, and the raw values by their heads in CSV."""
        self._values |= {key: list(column) for key, column in values.items()}
        self._shown[title] = list(texts)

    def words(self, title: str, texts: Sequence[str]) -> None:
        """Add a column of words."""
        self.add(title, texts, **{title: texts})

    def raw(self, key: str, values: Any) -> None:
        """Add a column that only CSV has."""
        self._values[key] = list(values)

    def numbers(self, title: str, key: str, values: Sequence[float], words: Callable[[float], str]) -> None:
        """Add a column of numbers, some of which may be NaN."""
        self.add(title, [optional(value, words) for value in values], **{key: values})

    def spread(
        self,
        title: str,
        prefix: str,
        found: pd.DataFrame,
        words: Callable[[float], str],
        keys: Sequence[str] = ("mean", "std", "seeds"),
        mark_best: bool = False,
    ) -> None:
        """Add a column of means and deviations, as `statistics.spread` returns them."""
        heads = [f"{prefix}_{key}" if key else prefix for key in keys]
        cells = found[["mean", "std", "count"]].itertuples(index=False, name=None)
        texts = [mean_and_deviation(mean, std, count, words, self._planned) for mean, std, count in cells]
        self.add(title, texts, **dict(zip(heads, (found["mean"], found["std"], found["count"]), strict=False)))
        if mark_best:
            self._mark_best(title, found)

    def _mark_best(self, title: str, found: pd.DataFrame) -> None:
        """Mark the largest mean, ties as printed included.

        Only methods with the most seeds compete: a mean over the seeds that survived is not comparable with one over
        all.
        """
        means = found["mean"].where(found["count"] == found["count"].max()).to_numpy()
        if np.isfinite(means).sum() < 2:
            return
        printed = [words.split()[0] for words in self._shown[title]]
        winner, column = printed[int(np.nanargmax(means))], list(self._shown).index(title)
        self._best |= {(row, column) for row, mean in enumerate(means) if np.isfinite(mean) and printed[row] == winner}

    def difference(self, title: str, prefix: str, found: pd.DataFrame, planned: int) -> None:
        """Add a column of differences, as `statistics.paired_differences` returns them."""
        heads = ("difference", "difference_low", "difference_high", "difference_pairs")
        values = (found["difference"], found["low"], found["high"], found["pairs"].astype("Int64"))
        texts = [difference_text(row, planned) for row in found.itertuples()]
        by_head = {prefix + head: column for head, column in zip(heads, values, strict=True)}
        self.add(f"{title} [{CONFIDENCE:.0%}]", texts, **by_head)

    def table(self, name: str, caption: str, notes: Sequence[str]) -> Table:
        """Return the table."""
        values, shown = pd.DataFrame(self._values), pd.DataFrame(self._shown, dtype=object)
        return Table(name, caption, values, shown, frozenset(self._best), list(dict.fromkeys(notes)))


def text(table: Table) -> str:
    """Return plain text: the caption, the aligned table with a `*` at the best, the notes."""
    # In columns that have a star the other numbers get blanks, as marks that tabulate does not strip.
    starred = {column for _, column in table.best}
    cells = table.emphasized(lambda words: f"{words} *", str)
    for column in starred:
        plain_rows = [row for row in range(len(cells)) if (row, column) not in table.best]
        cells.iloc[plain_rows, column] += _BLANK * 2
    body = _tabulate(cells, "simple", table.sides("left", "right")).replace(_BLANK, " ")
    lines = [line.rstrip() for line in body.splitlines()]
    notes = [textwrap.fill(note, _WIDTH, subsequent_indent="  ", break_long_words=False) for note in table.notes]
    return _join(textwrap.fill(table.caption_with("*"), _WIDTH), "\n".join(lines), "\n".join(notes))


def markdown(table: Table) -> str:
    """Return Markdown: the table with the best in bold, below it the caption and the notes."""
    cells = table.emphasized(lambda words: f"**{words}**", _escape_markdown)
    body = _tabulate(cells, "pipe", table.sides("left", "right"))
    notes = "\n".join(f"- {_escape_markdown(note)}" for note in table.notes)
    return _join(body, _escape_markdown(table.caption_with("Bold")), notes)


def latex(table: Table) -> str:
    """Return a LaTeX table with the best in bold and the notes below it, made as wide as the text if it is wider.

    It needs the packages booktabs and graphicx.
    """
    cells = table.emphasized(lambda words: rf"\textbf{{{words}}}", _escape_latex)
    sides = table.sides("l", "r")
    body = cells.to_latex(index=False, escape=False, column_format="".join(sides)).strip()
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
"""How a table can be written."""


def points(score: float) -> str:
    """Return a score in points, 0.8512 as `85.12`."""
    return decimals(100 * score)


def decimals(value: float) -> str:
    """Return a number with two decimals and a true minus sign."""
    return f"{value:.2f}".replace("-", "−")


def signed_points(difference: float) -> str:
    """Return a difference of scores in points with its sign; what rounds to zero has none."""
    words = f"{100 * difference:+.2f}"
    return words[1:] if float(words) == 0 else words.replace("-", "−")


def plain(value: float) -> str:
    """Return a number with as many digits as it needs, thousands grouped: 110, 112.5, 1,725, 0.0005."""
    return f"{value:,.10g}".replace("-", "−")


def amount(count: float) -> str:
    """Return a number of parameters with three digits: 0, 514, 9.22K, 171K, 1.34M."""
    for size, unit in ((1, ""), (1e3, "K"), (1e6, "M"), (1e9, "B")):
        words = f"{count / size:.3g}"
        if "e" not in words and float(words) < 1000:
            return words + unit
    return f"{count:.3g}"


def optional(value: float, words: Callable[[float], str]) -> str:
    """Return a number as text, or the text of an empty cell for NaN."""
    return EMPTY if math.isnan(value) else words(value)


def mean_and_deviation(mean: float, std: float, count: int, words: Callable[[float], str], planned: int) -> str:
    """Return mean ± deviation, and how many of the planned seeds there are if some are missing."""
    shown = optional(mean, words) + ("" if math.isnan(std) else f" ± {words(std)}")
    return shown if count == planned else f"{shown} ({count} of {planned})"


def difference_text(row: Any, planned: int) -> str:
    """Return a difference with its interval, and how many of the planned pairs there are if some are missing."""
    if np.isnan(row.difference):
        return EMPTY
    interval = f"{signed_points(row.low)}, {signed_points(row.high)}" if np.isfinite(row.low) else "no interval"
    pairs = "" if row.pairs == planned else f" ({row.pairs:.0f} of {counted(planned, 'pair')})"
    return f"{signed_points(row.difference)} [{interval}]{pairs}"


def span(values: Sequence[float], words: Callable[[float], str] = plain) -> str:
    """Return the one text of all `values`, or those of the smallest and the largest: `3`, `500–600`."""
    low, high = words(min(values)), words(max(values))
    return low if low == high else f"{low}–{high}"


def listing(items: Sequence[str]) -> str:
    """Return `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1]))) if items else ""


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


def _join(*parts: str) -> str:
    return "\n\n".join(filter(None, parts)) + "\n"


_MARKDOWN = {ord(character): f"\\{character}" for character in "\\|*_<>`"}
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"},
        **{"<": r"\textless{}", ">": r"\textgreater{}"},
        # Behind \\ a bracket would be read as its argument, and a star as part of it.
        **{"[": "{[}", "]": "{]}", "*": "{*}"},
        **{"±": r"$\pm$", "×": r"$\times$", "÷": r"$\div$", "−": "$-$", "Δ": r"$\Delta$", "ε": r"$\varepsilon$"},
        **{"≤": r"$\leq$", "≥": r"$\geq$", "→": r"$\to$", "·": r"$\cdot$", "‖": r"$\Vert$"},
        **{"–": r"\textendash{}", "…": r"\dots{}"},
    }
)
"""What pandas's own escaping leaves out are the signs beyond ASCII."""


def _escape_markdown(words: str) -> str:
    return words.translate(_MARKDOWN)


def _escape_latex(words: str) -> str:
    # Two hyphens, as of an option, would become a dash.
    return re.sub("-(?=-)", "-{}", words.translate(_LATEX))
