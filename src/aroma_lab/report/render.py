"""A table as plain text, Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence

from .table import Cell, Column, Table, Value

_WIDTH = 100
"""Characters of a line of caption or notes in plain text."""


def render(table: Table, form: str) -> str:
    """Return the table in one of `FORMATS`, ending with a line break."""
    return FORMATS[form](table)


def text(table: Table) -> str:
    """Return plain text: the caption, the aligned table with a `*` at the best, the notes."""
    columns = _shown(table)
    rows = list(zip(*map(_starred, zip(*_shown_rows(table), strict=True)), strict=True))
    heads = [column.title for column in columns]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [_aligned(cells, columns, widths) for cells in [heads, *rows]]
    rule = "-" * max(map(len, lines))
    notes = [*([f"* {table.best}."] if _has_best(table) else []), *_one_line(table.notes)]
    parts = [
        textwrap.fill(table.caption, _WIDTH),
        "\n".join([lines[0], rule, *lines[1:]]),
        "\n".join(textwrap.fill(note, _WIDTH, subsequent_indent="  ", break_long_words=False) for note in notes),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def markdown(table: Table) -> str:
    """Return Markdown: the table with the best in bold, below it the caption and the notes."""
    columns = _shown(table)

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rows = [[_bold_markdown(cell) for cell in row] for row in _shown_rows(table)]
    lines = [
        line([_escape_markdown(column.title) for column in columns]),
        f"|{'|'.join('---' if column.is_text else '--:' for column in columns)}|",
        *map(line, rows),
    ]
    notes = [f"- {_escape_markdown(note)}" for note in _one_line(table.notes)]
    caption = _escape_markdown(_caption(table, "Bold"))
    return "\n\n".join(filter(None, ["\n".join(lines), caption, "\n".join(notes)])) + "\n"


def latex(table: Table) -> str:
    """Return a LaTeX table, the best in bold, the notes below it; one wider than the text is made as wide.

    It needs the packages booktabs and graphicx.
    """
    columns = _shown(table)
    sides = ["l" if column.is_text else "r" for column in columns]
    heads = [_stacked_latex(column.title, side) for column, side in zip(columns, sides, strict=True)]
    rows = [[_bold_latex(cell) for cell in row] for row in _shown_rows(table)]
    lines = [
        r"\begin{table}",
        r"\centering",
        r"\small",
        rf"\caption{{{_escape_latex(_caption(table, 'Bold'))}}}",
        rf"\label{{tab:{table.name}}}",
        r"\medskip",
        rf"\setlength{{\tabcolsep}}{{4pt}}\sbox0{{\begin{{tabular}}{{{''.join(sides)}}}",
        r"\toprule",
        rf"{' & '.join(heads)} \\",
        r"\midrule",
        *(rf"{' & '.join(row)} \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}}",
        r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
        r"\par\medskip",
        *(rf"\par\raggedright\footnotesize {_escape_latex(note)}" for note in _one_line(table.notes)),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def raw(table: Table) -> str:
    """Return CSV: raw numbers at full precision, scores as they are measured, empty where there is none."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([key for column in table.columns for key in column.keys])
    for row in table.rows:
        writer.writerow([_raw(value) for cell in row for value in cell.values])
    return stream.getvalue()


FORMATS: Mapping[str, Callable[[Table], str]] = {"text": text, "markdown": markdown, "latex": latex, "csv": raw}
"""What a table can be written as."""
SUFFIXES: Mapping[str, str] = {".txt": "text", ".md": "markdown", ".tex": "latex", ".csv": "csv"}
"""Which format a file's name asks for."""

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


def _shown(table: Table) -> list[Column]:
    return [column for column in table.columns if not column.is_raw]


def _shown_rows(table: Table) -> list[list[Cell]]:
    return [[cell for column, cell in zip(table.columns, row, strict=True) if not column.is_raw] for row in table.rows]


def _aligned(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    padded = [
        cell.ljust(width) if column.is_text else cell.rjust(width)
        for cell, column, width in zip(cells, columns, widths, strict=True)
    ]
    return "  ".join(padded).rstrip()


def _starred(column: Sequence[Cell]) -> list[str]:
    """Return the texts of a column, a star behind the best and room for one behind the others."""
    if not any(cell.is_best for cell in column):
        return [cell.text for cell in column]
    return [cell.text + (" *" if cell.is_best else "  ") for cell in column]


def _has_best(table: Table) -> bool:
    return any(cell.is_best for row in table.rows for cell in row)


def _caption(table: Table, emphasis: str) -> str:
    return f"{table.caption} {emphasis}: {table.best}." if _has_best(table) else table.caption


def _one_line(notes: Sequence[str]) -> list[str]:
    return [" ".join(note.split()) for note in notes]


def _bold_markdown(cell: Cell) -> str:
    return f"**{_escape_markdown(cell.text)}**" if cell.is_best else _escape_markdown(cell.text)


def _escape_markdown(words: str) -> str:
    return words.translate({ord(character): f"\\{character}" for character in "\\|*_<>`"})


def _stacked_latex(head: str, side: str) -> str:
    """Return a head in two lines as equal as can be: most are wider than what is below them."""
    words = head.split()
    halves = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words))]
    if not halves:
        return _escape_latex(head)
    first, second = min(halves, key=lambda pair: max(map(len, pair)))
    return rf"\shortstack[{side}]{{{_escape_latex(first)}\\{_escape_latex(second)}}}"


def _bold_latex(cell: Cell) -> str:
    return rf"\textbf{{{_escape_latex(cell.text)}}}" if cell.is_best else _escape_latex(cell.text)


def _escape_latex(words: str) -> str:
    # Two hyphens, as of an option, would become a dash.
    return re.sub("-(?=-)", "-{}", words.translate(_LATEX))


def _raw(value: Value) -> str | float | int:
    return "" if value is None else value
