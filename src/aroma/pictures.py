"""A picture of the ranks of an adapter: each matrix is a double circle, layers left to right, kinds top to bottom.

matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .errors import bad_value
from .files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
