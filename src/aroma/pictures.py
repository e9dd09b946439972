"""Pictures of growth: the ranks of an adapter, and the births of a run over time.

In the first each matrix is a double circle, layers left to right, kinds top to bottom. In the second each matrix is a
row, in a panel for each kind. matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .errors import bad_value
from .files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

SUFFIXES = (".png", ".svg", ".pdf")
"""Kinds of files that a picture can be written to."""
INK, FAINT, GRID = "#222222", "#767676", "#E4E4E4"
"""Colours of text, of secondary text, and of grid lines."""

# Two colours of Okabe and Ito that differ in lightness as much as in hue, so that a greyscale print stays readable.
_RANK: dict[str, Any] = {"marker": "o", "color": "#BFDDF0", "edgecolor": "#0072B2", "linewidth": 1.1}
_EFFECTIVE: dict[str, Any] = {"marker": "o", "color": "#D55E00", "linewidth": 0}
_AFTER: dict[str, Any] = {"marker": "o", "color": "#0072B2", "linewidth": 0}
_CROSS: dict[str, Any] = {"marker": "x", "color": FAINT, "linewidth": 1.3}
_UNIT = 0.55
"""Inches between two matrices."""
_LARGEST = 900
"""Area of the largest rank's circle, in points², as `Axes.scatter` takes it."""
_EVIDENCE, _BORN, _TRIAL, _KEPT = "#0072B2", "#D55E00", "#ECECEC", "#9CC9E6"
"""Colours of evidence, of births, of the trial's band, and of the components that the trial left."""
_LEFT: dict[str, Any] = {"color": _KEPT, "linewidth": 0}
_SINCE: dict[str, Any] = {"color": _BORN, "linewidth": 0}
_GONE: dict[str, Any] = {"facecolor": "none", "edgecolor": _KEPT, "linewidth": 0.8}
_BIRTH: dict[str, Any] = {"marker": "o", "color": _BORN, "linewidth": 0}
_MERGE: dict[str, Any] = {"marker": "o", "color": INK, "linewidth": 0}
_FULL = 0.8
"""Height of evidence at its threshold, as a share of a row."""


class Matrix(Protocol):
    """What is drawn of a matrix. `aroma.export.RankRow` and `aroma.ModuleSummary` have it."""

    @property
    def name(self) -> str:
        """Module name in the base model."""

    @property
    def rank(self) -> int:
        """Rank of its update."""

    @property
    def effective_rank(self) -> float:
        """Effective rank of its update."""


class MatrixRank(NamedTuple):
    """Rank of one matrix, where nothing else is known of it: a `Matrix`."""

    name: str
    rank: int
    effective_rank: float


class Position(NamedTuple):
    """Where a matrix stands in the picture.

    Args:
        layer: Index of its layer; None for a module outside the numbered layers.
        kind: Its name without the layer, such as `attention.self.query`.
    """

    layer: int | None
    kind: str


def rank_picture(
    matrices: Sequence[Matrix], path: str | os.PathLike[str], title: str = "Ranks grown by AROMA"
) -> None:
    """Draw ranks and effective ranks, and write the picture to `path`.

    Args:
        matrices: The matrices, in the order of the model.
        path: File to write: .png, .svg or .pdf.
        title: Title of the picture.

    Raises:
        ConfigError: Another suffix, or no matrices.
    """
    require_picture_name("plot", path)
    save_picture(draw_ranks({title: matrices}), path)


def draw_ranks(panels: Mapping[str, Sequence[Matrix]]) -> Figure:
    """Return adapters, by title, one below the other, on one scale and with one legend.

    The area of the outer circle is proportional to the rank, the area of the inner one to the effective rank, both on
    the same scale. The number is the rank. A cross marks a matrix of rank 0.

    Args:
        panels: The matrices of each adapter by its title, in the order of the model.

    Raises:
        ConfigError: A panel has no matrices.
    """
    if not panels or not all(panels.values()):
        raise bad_value("matrices", [], "there is nothing to draw; give an adapter with at least one matrix")
    names = list(dict.fromkeys(matrix.name for matrices in panels.values() for matrix in matrices))
    figure, every, places = _grids(names, [f"{title}\n{_summary(matrices)}" for title, matrices in panels.items()])
    scale = _LARGEST / max(1, *(matrix.rank for matrices in panels.values() for matrix in matrices))
    for axes, matrices in zip(every, panels.values(), strict=True):
        for matrix in matrices:
            place = places[matrix.name]
            if matrix.rank == 0:
                axes.scatter(*place, s=40, **_CROSS)
                continue
            axes.scatter(*place, s=scale * matrix.rank, **_RANK)
            axes.scatter(*place, s=scale * matrix.effective_rank, **_EFFECTIVE)
            axes.annotate(str(matrix.rank), place, (14, -17), textcoords="offset points", fontsize=7, color=INK)
    _explain(figure, {"rank": (120, _RANK), "effective rank": (60, _EFFECTIVE), "rank 0": (40, _CROSS)})
    return figure


def kept_picture(ranks: Mapping[str, tuple[int, int]], path: str | os.PathLike[str], title: str) -> None:
    """Draw what a compressed adapter kept, and write the picture to `path`.

    The area of the outer circle is proportional to the rank before, that of the inner one to the rank after, which is
    the number. A cross marks a matrix that kept nothing.

    Args:
        ranks: Rank of every matrix before and after, by its name, in the order of the model; at least one.
        path: File to write: .png, .svg or .pdf.
        title: Title of the picture.
    """
    figure, (axes,), places = _grids([*ranks], [title])
    scale = _LARGEST / max(1, *(before for before, _ in ranks.values()))
    for name, (before, after) in ranks.items():
        place = places[name]
        axes.scatter(*place, s=scale * before, **_RANK)
        axes.scatter(*place, **({"s": scale * after, **_AFTER} if after else {"s": 40, **_CROSS}))
        axes.annotate(str(after), place, (14, -17), textcoords="offset points", fontsize=7, color=INK)
    _explain(figure, {"rank before": (120, _RANK), "rank after": (60, _AFTER), "nothing kept": (40, _CROSS)})
    save_picture(figure, path)


def _grids(names: Sequence[str], titles: Sequence[str]) -> tuple[Figure, list[Axes], dict[str, tuple[int, int]]]:
    """Return a figure with a grid of layers and kinds for each title, and where each matrix stands in all of them."""
    positions = positions_of(names)
    # Modules outside the numbered layers come last.
    layers = sorted({place.layer for place in positions}, key=lambda layer: (layer is None, layer or 0))
    kinds = list(dict.fromkeys(place.kind for place in positions))
    width = 0.9 + 0.085 * max(map(len, kinds)) + _UNIT * len(layers)
    figure = new_figure(max(width, 7.5), 0.4 + len(titles) * (1.15 + _UNIT * len(kinds)))
    every = [*figure.subplots(len(titles), squeeze=False).flat]
    for axes, title in zip(every, titles, strict=True):
        axes.set(xlim=(-0.5, len(layers) - 0.5), ylim=(len(kinds) - 0.5, -0.5), xlabel="layer", frame_on=False)
        axes.set_xticks(range(len(layers)), ["other" if layer is None else str(layer) for layer in layers])
        axes.set_yticks(range(len(kinds)), kinds)
        axes.tick_params(length=0, labelsize=9)
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
    places = [(layers.index(place.layer), kinds.index(place.kind)) for place in positions]
    return figure, every, dict(zip(names, places, strict=True))


def _explain(figure: Figure, meanings: Mapping[str, tuple[int, dict[str, Any]]]) -> None:
    """Write the legend below: the size and look of a mark by what it means."""
    axes = figure.axes[-1]
    handles = [axes.scatter([], [], s=size, label=label, **look) for label, (size, look) in meanings.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=9, frameon=False)


# Births --------------------------------------------------------------------------------------------------------------


@dataclass
class History:
    """What the events of a run with `growth="evidence"` say of one matrix.

    Args:
        name: Module name in the base model.
        settled: Components that the trial left, or the last one where there are several; None before the end of one.
        rank: Components at the last event.
        births: Optimizer steps of the births since the trial, in order.
        merges: Those of them at which the oldest component was merged to make room.
        squeezed: Components that went in squeezes.
        evidence: Optimizer step and log E wherever it was told, in order; twice at a birth, after which E is 1 again.
    """

    name: str
    settled: int | None = None
    rank: int = 0
    births: list[int] = field(default_factory=list)
    merges: list[int] = field(default_factory=list)
    squeezed: int = 0
    evidence: list[tuple[int, float]] = field(default_factory=list)

    @property
    def peak(self) -> float:
        """The largest log E that was told."""
        return max((value for _, value in self.evidence), default=-math.inf)


def histories_of(events: Iterable[Mapping[str, Any]]) -> list[History]:
    """Return the history of every matrix, in the order in which the events name them.

    Args:
        events: `Event.as_dict()` of every event of one run, in order.

    Raises:
        ConfigError: They tell of no growth by evidence.
    """
    histories: dict[str, History] = {}
    for event in events:
        if event["module"] is None or event["log_evidence"] is None:
            continue
        step, kind = int(event["step"]), event["kind"]
        matrix = histories.setdefault(event["module"], History(event["module"]))
        before, matrix.rank = matrix.rank, int(event["rank"])
        if kind == "settled":
            matrix.settled = matrix.rank
            matrix.evidence.append((step, 0.0))
        elif kind == "merged":
            matrix.merges.append(step)
        elif kind == "squeezed":
            matrix.squeezed += before - matrix.rank
        elif matrix.settled is not None:
            matrix.evidence.append((step, float(event["log_evidence"])))
            if kind == "born":
                matrix.births.append(step)
                matrix.evidence.append((step, 0.0))
    if not histories:
        raise bad_value(
            "events", "none of evidence", "only growth='evidence' has births over time; give the events of such a run"
        )
    return [*histories.values()]


def birth_picture(
    events: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    significance: float = 0.05,
    steps: int | None = None,
    title: str = "Births by evidence",
) -> None:
    """Draw when each matrix got its components, and write the picture to `path`; see `draw_births`.

    .. code-block:: python

        events = []
        Trainer(model=model, callbacks=[AromaCallback(on_event=events.append)], ...).train()
        birth_picture([event.as_dict() for event in events], "births.png")

    Raises:
        ConfigError: Another suffix than .png, .svg or .pdf, or no event of growth by evidence.
    """
    require_picture_name("plot", path)
    save_picture(draw_births(events, significance, steps, title), path)


def draw_births(
    events: Iterable[Mapping[str, Any]],
    significance: float = 0.05,
    steps: int | None = None,
    title: str = "Births by evidence",
) -> Figure:
    """Return a picture of a run with `growth="evidence"`: a row for each matrix, optimizer steps from left to right.

    Above, one or two matrices large: the one with the most births, and one with the fewest that came near another. The
    evidence E is drawn against its threshold 1/α. Below, a panel for each kind of matrix, and in it a row for each
    layer: the height of the area is log E / log(1/α), from 0 to 1; a dot is a birth, a dark one if the oldest
    component was merged for it. The bars are the ranks at the end: what the trial left, then what was born, and hollow
    what went.

    Args:
        events: `Event.as_dict()` of every event of the run, in order, or the rows of `events.jsonl`.
        significance: α of the run.
        steps: Optimizer steps of the run; by default up to the last event.
        title: Title of the picture.

    Raises:
        ConfigError: No event of growth by evidence.
    """
    events = [*events]
    histories = histories_of(events)
    last = max(int(event["step"]) for event in events)
    ends = sorted({int(event["step"]) for event in events if event["kind"] == "settled"})
    scene = _Scene(
        steps=max(last, steps or 0),
        trial=min(ends, default=max(last, steps or 0)),
        threshold=-math.log(significance),
        most=max(1, *(matrix.rank + matrix.squeezed for matrix in histories)),
    )
    panels: dict[str, dict[str, History]] = {}
    labels: dict[str, str] = {}
    for matrix, place in zip(histories, positions_of([matrix.name for matrix in histories]), strict=True):
        kind, row = ("other", place.kind) if place.layer is None else (place.kind, str(place.layer))
        panels.setdefault(kind, {})[row] = matrix
        labels[matrix.name] = place.kind if place.layer is None else f"{place.kind}, layer {place.layer}"
    if len(panels.get("other", {})) == 1:  # a long name has more room as a title
        [(name, matrix)] = panels.pop("other").items()
        panels[name] = {"": matrix}
    columns = min(len(panels), 3 if len(panels) in (5, 6, 9) else 4)
    lines = math.ceil(len(panels) / columns)
    tallest = max(map(len, panels.values()))
    row_height = min(max(4.2 / tallest, 0.1), 0.26)  # inches
    below = lines * (0.55 + row_height * tallest) + 0.35
    figure = new_figure(max(3.3 * columns, 8.0), 3.1 + below)
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.1, below))
    top, bottom = parts
    told = _most_telling(histories)
    for axes, matrix in zip(top.subplots(1, len(told), squeeze=False, sharey=True).flat, told, strict=True):
        _draw_evidence(axes, matrix, labels[matrix.name], scene)
    top.suptitle(f"{title}\n{_births_summary(histories, scene)}", x=0.01, ha="left", fontsize=10, color=INK)
    every = [*bottom.subplots(lines, columns, squeeze=False).flat]
    for axes, (kind, rows) in zip(every, panels.items(), strict=False):
        axes.set(xlim=(0, 1.3 * scene.steps), ylim=(tallest - 0.4, -0.8), frame_on=False)
        axes.set_title(kind, loc="left", fontsize=9, color=INK, pad=3)
        _draw_rows(axes, rows, scene, row_height)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    _explain_births(bottom, every[0], histories)
    return figure


class _Scene(NamedTuple):
    """What all panels share.

    Args:
        steps: Optimizer steps of the run.
        trial: Step at which its trial ended.
        threshold: log 1/α.
        most: The largest rank, with what went.
    """

    steps: int
    trial: int
    threshold: float
    most: int


def _most_telling(histories: Sequence[History]) -> list[History]:
    """Return the matrix with the most births, and of the others with the fewest the one that came nearest to one."""
    first = max(histories, key=lambda matrix: (len(matrix.births), matrix.peak))
    others = [matrix for matrix in histories if matrix is not first]
    return [first, *sorted(others, key=lambda matrix: (len(matrix.births), -matrix.peak))[:1]]


def _births_summary(histories: Sequence[History], scene: _Scene) -> str:
    """Return what the trial left, what was born, what went, in a second line, and the ranks at the end."""
    settled = [matrix.settled for matrix in histories if matrix.settled is not None]
    ranks, births = [matrix.rank for matrix in histories], [step for one in histories for step in one.births]
    count = f"{len(ranks)} {'matrix' if len(ranks) == 1 else 'matrices'}"
    if not settled:
        return f"{count} · the trial had not ended at step {scene.steps}"
    born = f"births {len(births)}" + (f", last at step {max(births)}" if births else "")
    left = f"the trial left {sum(settled)} components at step {scene.trial}"
    squeezed = sum(matrix.squeezed for matrix in histories)
    gone = f"\ngone: {squeezed}" if squeezed else ""
    return f"{count} · {left} · {born}{gone} · ranks {min(ranks)} to {max(ranks)}, total {sum(ranks)}"


def _draw_evidence(axes: Axes, matrix: History, label: str, scene: _Scene) -> None:
    """Draw E of one matrix on a logarithmic axis, against its threshold."""
    top, floor = math.exp(scene.threshold), math.exp(-1.5 * scene.threshold)
    kept = "in its trial" if matrix.settled is None else f"trial left {matrix.settled or 'none'}"
    born = "" if matrix.settled is None else f", {len(matrix.births) or 'none'} born"
    axes.set_title(f"{label}: {kept}{born}", loc="left", fontsize=9, color=INK)
    axes.set_yscale("log")
    axes.set(xlim=(0, scene.steps), ylim=(floor, top**1.35), xlabel="optimizer step", ylabel="evidence E")
    axes.set_yticks([1 / top, 1, top], [f"1/{top:.3g}", "1", f"1/α = {top:.3g}"])
    axes.minorticks_off()
    axes.tick_params(length=0, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvspan(0, scene.trial, color=_TRIAL, linewidth=0)
    axes.axhline(1, color=FAINT, linewidth=0.8)
    axes.axhline(top, color=_BORN, linewidth=1.2, linestyle=(0, (5, 2)))
    at = [step for step, _ in matrix.evidence]
    values = [max(math.exp(min(value, scene.threshold)), floor) for _, value in matrix.evidence]
    axes.fill_between(at, values, 1, color=_EVIDENCE, alpha=0.2, linewidth=0)
    axes.plot(at, values, color=_EVIDENCE, linewidth=1.6)
    for steps, look in ((matrix.births, _BIRTH), (matrix.merges, _MERGE)):
        axes.scatter(steps, [top] * len(steps), s=40, zorder=3, clip_on=False, **look)


def _draw_rows(axes: Axes, rows: Mapping[str, History], scene: _Scene, height: float) -> None:
    """Draw a row for each matrix of one kind; `height` is that of a row, in inches."""
    from matplotlib.ticker import MaxNLocator

    letters, mark = min(8.0, 58 * height), (24 * height) ** 2
    axes.set_yticks(range(len(rows)), [*rows], fontsize=letters)
    ticks = [step for step in MaxNLocator(4, integer=True).tick_values(0, scene.steps) if step <= scene.steps]
    axes.set_xticks(ticks, [f"{step:g}" for step in ticks], fontsize=7)
    axes.tick_params(length=0)
    axes.fill_between([0, scene.trial], -0.5, len(rows) - 0.5, color=_TRIAL, linewidth=0)
    start, unit = 1.03 * scene.steps, 0.2 * scene.steps / scene.most
    for line, matrix in enumerate(rows.values()):
        foot = line + 0.4
        axes.plot([0, scene.steps], [foot, foot], color=GRID, linewidth=0.6, zorder=1)
        at = [step for step, _ in matrix.evidence]
        tops = [foot - _FULL * min(max(value / scene.threshold, 0.0), 1.0) for _, value in matrix.evidence]
        axes.fill_between(at, foot, tops, color=_EVIDENCE, linewidth=0)
        for steps, look in ((matrix.births, _BIRTH), (matrix.merges, _MERGE)):
            axes.scatter(steps, [foot - _FULL] * len(steps), s=mark, zorder=3, **look)
        kept = matrix.rank if matrix.settled is None else min(matrix.settled, matrix.rank)
        end = start
        looks = ((kept, _LEFT), (matrix.rank - kept, _SINCE), (matrix.squeezed, _GONE))
        for count, look in filter(lambda part: part[0], looks):  # no outline of nothing
            axes.barh(line, unit * count, 0.66, end, **look)
            end += unit * count
        end += 0.015 * scene.steps
        axes.text(end, line, str(matrix.rank), va="center", fontsize=letters, color=INK)


def _explain_births(figure: SubFigure, axes: Axes, histories: Sequence[History]) -> None:
    """Write the legend."""
    from matplotlib.patches import Patch

    merges, gone = [], []
    if any(matrix.merges for matrix in histories):
        merges = [axes.scatter([], [], s=30, label="birth, the oldest merged", **_MERGE)]
    if any(matrix.squeezed for matrix in histories):
        gone = [Patch(label="gone in a squeeze", **_GONE)]
    handles = [
        Patch(color=_TRIAL, label="trial"),
        Patch(color=_EVIDENCE, label="evidence: log E, full at log 1/α"),
        axes.scatter([], [], s=30, label="birth", **_BIRTH),
        *merges,
        Patch(label="rank that the trial left", **_LEFT),
        Patch(label="rank born since", **_SINCE),
        *gone,
    ]
    columns = len(handles) if figure.bbox.width / figure.figure.dpi > 11 else 3
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=8, frameon=False)


def positions_of(names: Sequence[str]) -> list[Position]:
    """Split module names at their first number: `encoder.layer.3.output.dense` is `output.dense` of layer 3.

    If there are several stacks of numbered layers, such as an encoder and a decoder, the kind begins with the part of
    the name that tells them apart.
    """
    matches = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    prefixes = {name[: match.start()] for name, match in zip(names, matches, strict=True) if match}
    stacks = {prefix: prefix.split(".") for prefix in prefixes}
    front = _common(stacks.values())
    back = _common([parts[front:][::-1] for parts in stacks.values()])
    positions = []
    for name, match in zip(names, matches, strict=True):
        if match is None:
            positions.append(Position(None, name))
        else:
            prefix = name[: match.start()]
            stack = stacks[prefix][front : len(stacks[prefix]) - back]
            kind = ".".join(filter(None, (*stack, name[match.end() :])))
            positions.append(Position(int(match[1]), kind or prefix))
    return positions


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of that size in inches. It belongs to no window, and pyplot does not know it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def require_picture_name(field: str, path: str | os.PathLike[str]) -> None:
    """Raise unless `path` has the suffix of a picture.

    Raises:
        ConfigError: Naming the field.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise bad_value(field, str(path), f"unknown kind of picture; its name must end in {', '.join(SUFFIXES)}")


def save_picture(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write `figure` to `path` atomically, in the format of its suffix. The same figure gives the same bytes."""
    import matplotlib
    from PIL import Image

    drawn = io.BytesIO()  # so that its size is known before anything is written
    form = Path(path).suffix.lower().removeprefix(".")
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[form]
    with matplotlib.rc_context({"svg.hashsalt": "aroma"}):
        figure.savefig(drawn, format=form, dpi=120, metadata=undated)
    if form == "png":  # with 256 colours drawings look the same, and take a third of the bytes
        image = Image.open(drawn).convert("RGB")
        drawn = io.BytesIO()
        image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(
            drawn, "PNG", optimize=True, dpi=(120, 120)
        )
    write_bytes(path, drawn.getvalue())


def _common(sequences: Iterable[Sequence[str]]) -> int:
    """Return how many items from the front all sequences share."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False)))


def _summary(matrices: Sequence[Matrix]) -> str:
    """Return the number of matrices, their ranks, and the effective rank as a share of the rank (Appendix C)."""
    ranks = [matrix.rank for matrix in matrices]
    effective = sum(matrix.effective_rank for matrix in matrices)
    share = f" ({effective / sum(ranks):.0%} of the rank)" if sum(ranks) else ""
    count = f"{len(ranks)} {'matrix' if len(ranks) == 1 else 'matrices'}"
    return f"{count} · ranks {min(ranks)} to {max(ranks)}, total {sum(ranks)} · effective {effective:.1f}{share}"
