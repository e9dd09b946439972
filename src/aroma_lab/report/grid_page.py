"""The page of a grid: its tables of scores and ranks, and score against trained rank, in one HTML file."""

from __future__ import annotations

import base64
import html
import io
import os
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader

from aroma.errors import DataError, bad_value

from .figures import draw_figure
from .formats import Table
from .runs import read_runs
from .tables import make_table

_ASSETS = Path(__file__).parent / "assets"
_TABLES = {"main": "Scores", "ranks": "Ranks found and trained"}


def grid_page(source: str | os.PathLike[str]) -> str:
    """Return the page of a grid, as HTML.

    Args:
        source: Whatever `read_runs` takes.

    Raises:
        ConfigError: There are no runs.
        DataError: None of them has finished.
        CheckpointError: A file is damaged or edited.
    """
    runs = read_runs(source)
    if runs.reported.empty:
        remedy = "no finished run in it that is reported; wait for one, or give another folder"
        raise bad_value("RUN", str(source), remedy, DataError)
    tables = {heading: make_table(runs, kind) for kind, heading in _TABLES.items()}
    name = runs.grid.get("output") or (runs.source.parent if runs.source.is_file() else runs.source).resolve()
    return (
        Environment(loader=FileSystemLoader(_ASSETS), autoescape=True)
        .get_template("grid.html")
        .render(
            title=Path(str(name)).name,
            tables=[(heading, _body(table), table.about("Bold")) for heading, table in tables.items()],
            picture=_budget(source) if runs.reported.trained_rank.notna().any() else None,
            recipe=yaml.safe_dump(dict(runs.grid), sort_keys=False) if runs.grid else None,
        )
    )


def _body(table: Table) -> str:
    frame = table.frame("<strong>{}</strong>".format, html.escape)
    return str(frame.to_html(index=False, escape=False, border=0))


def _budget(source: str | os.PathLike[str]) -> str:
    drawn = io.BytesIO()
    draw_figure("budget", source).savefig(drawn, format="png", dpi=120)
    return base64.b64encode(drawn.getvalue()).decode()
