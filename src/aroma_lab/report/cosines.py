"""Figure 4: cosine similarity between the components of two runs, module by module, from their saved adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aroma.errors import CheckpointError, DataError, bad_value
from aroma.export import Update, read_adapter
from aroma.pictures import INK, new_figure, write_title
from aroma.spectra import component_cosines

from ..run.files import TrialFiles
from .runs import Run
from .style import matching_module, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PAPERS = "layer.10.attention.output.dense"
"""The module that Figure 4 shows."""
_CELL, _LARGEST, _LEAST = 0.55, 4.6, 2.6
"""Inches of a cell's side, and the most and the least of a panel's width."""
_LEFT, _GAP, _TOP, _BOTTOM, _BAR = 0.8, 0.85, 1.35, 0.9, 0.85
_LEAST_CELL = 0.38
"""Inches of a cell's side that has room for its value."""


@dataclass(frozen=True)
class CosinePanel:
    """One module.

    Args:
        name: Module name in the base model.
        cosines: A row for each component of the first run, a column for each of the second.
    """

    name: str
    cosines: torch.Tensor

    def caption(self) -> str:
        """Return what Appendix E looks at: the diagonal, where components have the same position."""
        return f"mean |cosine| on the diagonal {float(self.cosines.diagonal().abs().mean()):.2f}"


def cosine_panels(first: Run, second: Run, modules: Sequence[str] | None = None) -> list[CosinePanel]:
    """Return the cosines of modules of two runs of the same model, from their saved adapters.

    Args:
        first: A run whose `adapter/` is a plain LoRA adapter, as AROMA's.
        second: Another.
        modules: Names of the modules, or ends of them; by default the paper's, or else the one that grew most in both.

    Raises:
        CheckpointError: An adapter is missing or damaged.
        ConfigError: An adapter is no plain LoRA adapter, a run trains nothing, or a module did not grow in both.
        DataError: The adapters have no module of the same shape in common that grew in both.
    """
    ours, others = _updates(first), _updates(second)
    shared = [name for name in ours if name in others and _comparable(ours[name], others[name])]
    if not shared:
        remedy = (
            f"its adapter has no grown module in common with that of {first.where}, so there is nothing to compare; "
            "give runs of one model"
        )
        raise bad_value("FOLDER", second.where, remedy, DataError)
    chosen = [_default(shared, ours, others)] if modules is None else [matching_module(one, shared) for one in modules]
    panels = []
    for name in chosen:
        one, other = ours[name], others[name]
        ranks = _component_rank(first), _component_rank(second)
        panels.append(CosinePanel(name, component_cosines(one.B, one.A, other.B, other.A, *ranks)))
    return panels


def draw_cosines(panels: Sequence[CosinePanel], first: Run, second: Run) -> Figure:
    """Return Figure 4: a matrix of cells for each module, with its diagonal framed.

    Args:
        panels: The modules.
        first: The run in the rows.
        second: The run in the columns.
    """
    shapes = [panel.cosines.shape for panel in panels]
    cell = min(_CELL, _LARGEST / max(max(shape) for shape in shapes))
    widths = [max(_LEAST, columns * cell) for _, columns in shapes]
    height = max(1.4, max(rows for rows, _ in shapes) * cell)
    width = max(5.6, _LEFT + sum(widths) + _GAP * len(panels) + _BAR)
    figure = new_figure(width, _TOP + height + _BOTTOM)

    def add_axes(left: float, bottom: float, wide: float, high: float) -> Axes:
        """Add axes whose place is in inches."""
        whole = figure.get_figheight()
        return figure.add_axes((left / width, bottom / whole, wide / width, high / whole))

    left = _LEFT
    for panel, panel_width in zip(panels, widths, strict=True):
        rows, columns = panel.cosines.shape
        axes = add_axes(left, _BOTTOM + height - rows * cell, columns * cell, rows * cell)
        _draw_panel(axes, panel, with_numbers=cell >= _LEAST_CELL)
        left += panel_width + _GAP
    bar = add_axes(left - _GAP / 2, _BOTTOM, 0.18, height)
    figure.colorbar(axes.collections[0], cax=bar, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.set_title("cosine", fontsize=8.5, color=INK)
    bar.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    labels = [f"{run.method}, seed {run.seed}" for run in (first, second)]
    write_title(figure, f"Cosines of components on {first.task}", f"rows: {labels[0]} · columns: {labels[1]}")
    figure.text(0.25 / width, 0.18 / figure.get_figheight(), "framed: components of the same position", fontsize=9)
    return figure


def _draw_panel(axes: Axes, panel: CosinePanel, with_numbers: bool) -> None:
    import seaborn as sns
    from matplotlib.patches import Rectangle

    values = panel.cosines.numpy().round(2) + 0.0  # adding 0 makes −0.00 0.00
    rows, columns = values.shape
    # Components are counted from 1; where they are many, only some are named, so that names stay readable.
    every = 1 + (max(rows, columns) - 1) // 16
    names = {"xticklabels": range(1, columns + 1), "yticklabels": range(1, rows + 1)}
    sns.heatmap(
        values,
        vmin=-1,
        vmax=1,
        cmap="PuOr",
        annot=with_numbers,
        fmt=".2f",
        annot_kws={"fontsize": 7.5},
        cbar=False,
        ax=axes,
        **names,
    )
    for axis in (axes.xaxis, axes.yaxis):
        ticks = axis.get_majorticklocs()
        axis.set_ticks(ticks[::every], [label.get_text() for label in axis.get_ticklabels()][::every])
    for place in range(min(rows, columns)):
        axes.add_patch(Rectangle((place, place), 1, 1, fill=False, edgecolor=INK, linewidth=1.6, clip_on=False))
    axes.set_title(f"{short_name(panel.name)}\n{panel.caption()}", fontsize=9, color=INK, loc="left")
    axes.set_xlabel("component", color=INK, fontsize=9)
    axes.set_ylabel("component", color=INK, fontsize=9)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK, rotation=0)


def _updates(run: Run) -> Mapping[str, Update]:
    if not run.steps:
        raise bad_value("--methods", run.method, "it trains nothing, so it has no components; choose others")
    adapter = TrialFiles(Path(run.where)).adapter
    if not adapter.is_dir():  # records are often kept, and passed on, without what was trained
        remedy = (
            "the adapter of this run is not kept there, and cosines are of adapters; remove the folder and run the "
            "trial again, or run its grid again with another output"
        )
        raise bad_value("FOLDER", run.where, remedy, CheckpointError)
    return read_adapter(adapter).updates


def _default(shared: Sequence[str], ours: Mapping[str, Update], others: Mapping[str, Update]) -> str:
    papers = [name for name in shared if name.endswith(_PAPERS)]
    return papers[0] if papers else max(shared, key=lambda name: min(len(ours[name].A), len(others[name].A)))


def _component_rank(run: Run) -> int:
    """Return r of a method that trains one component after the other; 1 for those that train all at once."""
    return int(run.trial["options"].get("r", 1)) if run.kind in ("aroma", "relora") else 1


def _comparable(one: Update, other: Update) -> bool:
    """Whether two updates are of the same m×n and neither is zero: a module of rank 0 has nothing to compare."""
    same = one.B.shape[0] == other.B.shape[0] and one.A.shape[1] == other.A.shape[1]
    return same and bool(one.B.any()) and bool(other.B.any())
