"""A page as it is put together and written: one file, which loads nothing."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__

ASSETS = Path(__file__).parent / "assets"
EMPTY = "–"


class Table(NamedTuple):
    """A table of texts: the titles of its columns, and its rows, each named by its first text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Chart(NamedTuple):
    """A chart: its name in `charts.json`, what it shows in words, its data sets by name and column, and its numbers.

    `main`: the data set that the arrow keys walk through, and its columns across and up.
    """

    name: str
    label: str
    data: Mapping[str, Mapping[str, Sequence[Any]]]
    main: tuple[str, str, str]
    table: Table | None = None


def render(template: str, charts: Mapping[str, Chart], folder: Path = ASSETS, **context: Any) -> str:
    """Return the page of a template in `folder`, `page.html` or one that extends it.

    `charts` have the names that the template calls them by; every text of `context` is escaped where it is put.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    drawn = json.loads((ASSETS / "charts.json").read_text(encoding="utf-8"))
    data = {
        "specs": {chart.name: drawn[chart.name] for chart in charts.values()},
        "charts": {name: {"spec": one.name, "data": one.data, "main": one.main} for name, one in charts.items()},
        **context.pop("data", {}),
    }
    loader, trims = FileSystemLoader([folder, ASSETS]), {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **trims)
    page: str = environment.get_template(template).render(
        charts=charts,
        data=data,
        css=(ASSETS / "page.css").read_text(encoding="utf-8"),
        js=(ASSETS / "page.js").read_text(encoding="utf-8"),
        vega=base64.b64encode((ASSETS / "vega.min.js.gz").read_bytes()).decode("ascii"),
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **context,
    )
    return page


# Numbers as texts ----------------------------------------------------------------------------------------------------


def amount(count: float) -> str:
    """Return a count with three digits: 514, 9.22K, 171K, 1.34M."""
    rounded = float(f"{count:.3g}")
    thousands = min(max(0, math.floor(math.log10(abs(rounded) or 1) / 3)), 3)
    return f"{rounded / 1000**thousands:.4g}{['', 'K', 'M', 'B'][thousands]}"


def measured(value: float | None) -> str:
    """Return a metric with four decimals, or four digits where it is very large or small; a dash for none."""
    if value is None or not math.isfinite(value):
        return EMPTY
    form = ".4f" if value == 0 or 1e-3 <= abs(value) < 1e3 else ".4g"
    return f"{value:{form}}".replace("-", "−")


def duration(seconds: float) -> str:
    """Return a time: `48 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
