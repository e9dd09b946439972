"""What a whole run found, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .accounting import ADALORA, AROMA, LORA, PAPER_RATIOS, UNFROZEN, Epoch, Saving
from .run_report import RunResult, notes

if TYPE_CHECKING:
    from rich.table import Table

MOST_ROWS = 12
"""Epochs that the table shows; of more it shows some, evenly."""


def method_table(result: RunResult) -> Table:
    """Return the table of the methods: the average epoch, as the paper's Table 5 has it."""
    table = _table(headline(result), "method", ("s an epoch", "AROMA ÷", "paper", "trainable", "rank"))
    means, last = result.means, result.epochs[-1]
    for name, label in result.labels.items():
        table.add_row(
            label,
            f"{means.seconds[name]:.2f}",
            f"{means.seconds[AROMA] / means.seconds[name]:.3f}" if name != AROMA else "",
            f"{PAPER_RATIOS[name]:g}" if name in PAPER_RATIOS else "",
            f"{means.trainable[name]:,.0f}",
            f"{last.arms[name].total_rank}",
        )
    return table


def epoch_table(result: RunResult) -> Table:
    """Return the table of the epochs: seconds of every method, and AROMA's growth."""
    shown = _evenly(result.epochs, MOST_ROWS)
    of_all = "" if len(shown) == len(result.epochs) else f", {len(shown)} of {len(result.epochs)}"
    title = f"seconds by epoch{of_all}; done: modules that have finished; saved: by these"
    columns = ("LoRA", "AdaLoRA", "AROMA", "÷ LoRA", "÷ AdaL.", "trainable", "rank", "done", "saved")
    table = _table(title, "epoch", columns)
    for epoch in shown:
        table.add_row(*_row(epoch))
    return table


def saving_line(result: RunResult) -> str:
    """Return in a sentence what AROMA saves against LoRA, and the share of modules that have finished."""
    saving = Saving.of(result.means.seconds)
    finished = f"{_signed(saving.finished)} s an epoch come from modules that have finished"
    if saving.share is None:
        return f"AROMA is {-saving.total:.2f} s an epoch slower than LoRA; {finished}."
    return f"AROMA is {saving.total:.2f} s an epoch faster than LoRA; {finished} ({saving.share:.0%} of it)."


def note_lines(result: RunResult) -> list[str]:
    """Return what a reader has to know, and on what it was measured."""
    found: Mapping[str, object] = result.provenance
    machine = f"{found['device']}, {found['threads']} of {found['cpu_count']} threads"
    return [*notes(result), f"{machine}; revision {found['git_revision'] or 'unknown'}."]


def ratio_line(result: RunResult) -> str:
    """Return AROMA's time as a share of the others', beside the paper's."""
    seconds = result.means.seconds
    ours, theirs = ({name: seconds[AROMA] / seconds[name] for name in (LORA, ADALORA)}, PAPER_RATIOS)
    return (
        f"AROMA takes {ours[LORA]:.3f} of LoRA's time and {ours[ADALORA]:.3f} of AdaLoRA's "
        f"(in the paper {theirs[LORA]:g} and {theirs[ADALORA]:g})"
    )


def headline(result: RunResult) -> str:
    """Return what was measured, in one line."""
    settings = result.settings
    if settings.recipe is None:
        where = f"{settings.model}, batch {settings.batch_size}×{settings.length}"
    else:
        where = f"{settings.recipe.model.name}, batch {settings.recipe.training.batch_size}"
    ranks = "replayed" if result.is_replay else "trained for real"
    sample = f", one step of {settings.every}" if settings.every > 1 else ""
    return f"{where}, {result.steps} steps {ranks}{sample}"


def _table(title: str, name: str, numbers: Sequence[str]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    # Without lines between columns, so that it fits into 80 characters.
    table = Table(name, title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _row(epoch: Epoch) -> list[str]:
    seconds, aroma = epoch.seconds, epoch.arms[AROMA]
    return [
        str(epoch.number),
        *(f"{seconds[name]:.2f}" for name in (LORA, ADALORA, AROMA)),
        *(f"{seconds[AROMA] / seconds[name]:.3f}" for name in (LORA, ADALORA)),
        f"{aroma.trainable:,.0f}",
        str(aroma.total_rank),
        str(aroma.finished),
        _signed(seconds[UNFROZEN] - seconds[AROMA]),
    ]


def _evenly(epochs: Sequence[Epoch], most: int) -> list[Epoch]:
    """Return at most `most` epochs, the first and the last among them."""
    if len(epochs) <= most:
        return list(epochs)
    return [epochs[round(i * (len(epochs) - 1) / (most - 1))] for i in range(most)]


def _signed(seconds: float) -> str:
    return f"{seconds:+.2f}".replace("-", "−")
