"""The charts of a report, written in Altair, and how they get into `src/aroma/report/assets/`.

A page holds Vega, which draws, and each chart compiled to Vega; Vega-Lite and Altair are needed only here. Whoever
changes a chart runs `python tools/charts.py` with the extra `test` installed, and commits what it writes.
Colours are variables of the page's style sheet, so that one drawing is light or dark.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
import zopfli.gzip

ASSETS = Path(__file__).resolve().parents[1] / "src" / "aroma" / "report" / "assets"

VEGA_LITE = "6.4"
"""What the charts are compiled with; vl-convert holds several."""

VEGA = "6.4.0"
"""What draws them."""

_HEIGHT, _LOW = 240, 170
"""Pixels: heights of a chart, and of one in half a row."""

_STEP = alt.X(
    "step:Q",
    title="optimizer step",
    scale=alt.Scale(zero=True, nice=False),
    axis=alt.Axis(grid=False, tickCount=6, format="~s"),
)

_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif',
    "padding": 2,
    "view": {"stroke": None},
    "axis": {
        "domain": False,
        "ticks": False,
        "labelColor": "var(--faint)",
        "labelFontSize": 12,
        "labelPadding": 6,
        "titleColor": "var(--faint)",
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "gridColor": "var(--rule)",
    },
    "axisX": {"domain": True, "domainColor": "var(--rule)"},
    "line": {"strokeWidth": 2, "strokeJoin": "round"},
}


def charts() -> dict[str, alt.LayerChart]:
    """Return every chart by name. Each draws data sets of the page by their names; see `page.py`."""
    return {
        "loss": _loss(),
        "rank": _rank(),
        "methods": _methods(),
        "budget": _budget(),
    }


def _nearest(base: alt.Chart, tooltip: list[alt.Tooltip], y: str, name: str) -> alt.LayerChart:
    """Return marks that tell of the step nearest to the pointer."""
    near = alt.selection_point(
        name=name, nearest=True, on="pointermove", clear="pointerout", fields=["step"], empty=False
    )
    points = base.mark_point(size=60, filled=True, color="var(--line)", opacity=0).encode(
        x=_STEP, y=alt.Y(y), tooltip=tooltip, opacity=alt.condition(near, alt.value(1), alt.value(0))
    )
    return points.add_params(near)


def _loss() -> alt.LayerChart:
    """Loss of the training batches, and of evaluations."""
    training, held_out = (alt.Chart(alt.NamedData(name)) for name in ("loss", "eval_loss"))
    y = alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=5))
    tip = [alt.Tooltip("step:Q", title="step"), alt.Tooltip("loss:Q", title="loss", format=".4~g")]
    evaluation = [*tip[:1], alt.Tooltip("loss:Q", title="loss, validation", format=".4~g")]
    return _sized(
        alt.layer(
            training.mark_line(color="var(--line)").encode(x=_STEP, y=y),
            held_out.mark_line(color="var(--other)", strokeDash=[4, 3]).encode(x=_STEP, y=y),
            _nearest(training, tip, "loss:Q", "near"),
            held_out.mark_point(size=45, filled=True, opacity=1, color="var(--other)").encode(
                x=_STEP, y=y, tooltip=evaluation
            ),
        )
    )


def _rank() -> alt.LayerChart:
    """The rank of a matrix, which holds from its step on, until the next."""
    base = alt.Chart(alt.NamedData("rank"))
    y = alt.Y("rank:Q", title=None, axis=alt.Axis(tickCount=4, format="~s"))
    tip = [alt.Tooltip("step:Q", title="from step"), alt.Tooltip("rank:Q", title="rank", format=",")]
    return _sized(
        alt.layer(
            base.mark_area(color="var(--line)", opacity=0.18, interpolate="step-after").encode(x=_STEP, y=y),
            base.mark_line(color="var(--line)", interpolate="step-after").encode(x=_STEP, y=y),
            _nearest(base, tip, "rank:Q", "near"),
        ),
        _LOW,
    )


def _methods() -> alt.LayerChart:
    """The scores of the methods of a grid on one task: a dot for each seed, a bar for the mean."""
    seeds, means = (alt.Chart(alt.NamedData(name)) for name in ("seeds", "means"))
    x = alt.X("points:Q", title=None, scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=5))
    y = alt.Y("method:N", title=None, sort=None, axis=alt.Axis(labelColor="var(--ink)", labelLimit=130, grid=True))
    own = alt.condition("datum.own", alt.value("var(--born)"), alt.value("var(--line)"))
    of_seed = [
        alt.Tooltip("method:N", title="method"),
        alt.Tooltip("seed:N", title="seed"),
        alt.Tooltip("points:Q", title="score", format=".2f"),
    ]
    of_mean = [alt.Tooltip("method:N", title="method"), alt.Tooltip("points:Q", title="mean", format=".2f")]
    chart = alt.layer(
        seeds.mark_point(size=40, filled=True, opacity=0.45).encode(x=x, y=y, color=own, tooltip=of_seed),
        means.mark_tick(thickness=3, size=16, opacity=1).encode(x=x, y=y, color=own, tooltip=of_mean),
    )
    return chart.properties(width="container", height=alt.Step(22))


def _budget() -> alt.LayerChart:
    """Score against the trained rank on one task: a mark for each method, whiskers of one standard error.

    The names are written beside the marks by Vega itself, see `_NAMES`.
    """
    base = alt.Chart(alt.NamedData("budget"))
    x = alt.X(
        "trained:Q",
        title="trained rank, mean over matrices and steps",
        scale=alt.Scale(type="log", base=2, nice=False, padding=44),
        axis=alt.Axis(grid=False, tickCount=6, format="~g"),
    )
    y = alt.Y("points:Q", title=None, scale=alt.Scale(zero=False, nice=True, padding=12), axis=alt.Axis(tickCount=5))
    own = alt.condition("datum.own", alt.value("var(--born)"), alt.value("var(--line)"))
    tip = [
        alt.Tooltip("method:N", title="method"),
        alt.Tooltip("points:Q", title="score", format=".2f"),
        alt.Tooltip("trained:Q", title="trained rank", format=".3~g"),
    ]
    whiskers = base.mark_rule(strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q", title=None), y2="high:Q", color=own)
    methods = base.mark_point(size=90, filled=True, opacity=1).encode(x=x, y=y, color=own, tooltip=tip)
    return _sized(alt.layer(whiskers, methods))


def _sized(chart: alt.LayerChart, height: int = _HEIGHT) -> alt.LayerChart:
    return chart.properties(width="container", height=height)


_NAMES: dict[str, Any] = {
    "type": "text",
    "from": {"data": "layer_1_marks"},
    "encode": {
        "update": {
            "text": {"field": "datum.method"},
            "fontSize": {"value": 11},
            "fill": [{"test": "datum.datum.own", "value": "var(--born)"}, {"value": "var(--line)"}],
        }
    },
    "transform": [
        {
            "type": "label",
            "size": {"signal": "[max(1, width), height]"},  # a narrow window's width is 0
            "anchor": ["top-right", "bottom-right", "top-left", "bottom-left", "right", "left", "top", "bottom"],
            "offset": [3],
            "padding": 40,
        }
    ],
}
"""A name beside every method's mark, none over another, which Vega-Lite cannot say; one without room is left out."""


def compiled(name: str, chart: alt.LayerChart) -> dict[str, Any]:
    """Return the chart of that name as Vega draws it."""
    written = chart.configure(**_CONFIG).to_dict()
    vega: dict[str, Any] = vl_convert.vegalite_to_vega(written, vl_version=VEGA_LITE)
    vega.pop("$schema")
    if name == "budget":
        vega["marks"].append(_NAMES)
    return vega


def assets() -> str:
    """Return the content of `charts.json`, a line for each."""
    lines = []
    for name, chart in sorted(charts().items()):
        vega = json.dumps(compiled(name, chart), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        lines.append(f'"{name}":{vega}')
    return "{" + ",\n".join(lines) + "}\n"


def vega() -> bytes:
    """Return Vega as its makers publish it, from npm."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", f"vega@{VEGA}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as packed:
            member = packed.extractfile("package/build/vega.min.js")
            assert member is not None, "a file, no folder"
            return member.read()


def main() -> None:
    """Write the assets."""
    (ASSETS / "charts.json").write_text(assets(), encoding="utf-8")
    (ASSETS / "vega.min.js.gz").write_bytes(zopfli.gzip.compress(vega(), numiterations=60, blocksplittingmax=0))


if __name__ == "__main__":
    main()
