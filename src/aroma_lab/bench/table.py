"""The result as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .result import BenchResult, Comparison
from .timing import Spread

if TYPE_CHECKING:
    from rich.table import Table

    from .operations import OperationTimes


def time_table(result: BenchResult) -> Table:
    """Return the table of times and of their ratios to forward and backward of the floor."""
    table = _table(headline(result), ("case",), ("fwd+bwd ms", "× floor", "quartiles", "step ms", "× floor"))
    for case in result.cases:
        ratio = case.forward_backward_ratio
        table.add_row(
            case.key,
            f"{1000 * case.forward_backward.median:.1f}",
            f"{ratio.median:.3f}",
            _quartiles(ratio),
            f"{1000 * case.step.median:.1f}",
            f"{case.step_ratio.median:.3f}",
        )
    return table


def size_table(result: BenchResult) -> Table:
    """Return the table of bytes and parameters."""
    table = _table("sizes, MiB", ("case",), ("kept for backward", "peak", "optimizer", "trainable"))
    for case in result.cases:
        footprint = case.footprint
        table.add_row(
            case.key,
            f"{footprint.kept_bytes / 2**20:.1f}",
            "–" if footprint.peak_bytes is None else f"{footprint.peak_bytes / 2**20:.0f}",
            f"{footprint.optimizer_bytes / 2**20:.2f}",
            f"{footprint.trainable_parameters:,}",
        )
    return table


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Return the table of AROMA against LoRA r=8: quotients, less than 1 where AROMA takes less."""
    table = _table("AROMA over LoRA r=8", ("case", "over"), ("fwd+bwd", "quartiles", "step", "kept"))
    for comparison in comparisons:
        ratio = comparison.forward_backward_ratio
        table.add_row(
            comparison.key,
            comparison.other,
            f"{ratio.median:.3f}",
            _quartiles(ratio),
            f"{comparison.step_ratio.median:.3f}",
            f"{comparison.kept_ratio:.3f}",
        )
    return table


def growth_lines(result: BenchResult) -> list[str]:
    """Return what the controller costs, in two sentences."""
    cost = result.growth
    return [
        f"Controller: {cost.amortised_ms:.2f} ms a step on average, {cost.amortised_fraction:.2%} of an ordinary step "
        f"({cost.step_ms:.1f} ms); a check every {cost.check_interval} steps takes {cost.check_ms:.2f} ms.",
        f"One outer step (check, merge, reset, norms of the weights): {cost.outer_ms:.1f} ms, "
        f"{cost.outer_fraction:.2f} of an ordinary step.",
    ]


def roofline_lines(result: BenchResult) -> list[str]:
    """Return what bounds an update on this machine, in two sentences."""
    machine = result.roofline
    floor_ms = 1000 * result.cases[0].forward_backward.median
    return [
        f"The machine multiplies {machine.multiply_flops / 1e9:.0f} GFLOP/s and moves {machine.move_bytes / 1e9:.1f} "
        f"GB/s. The narrow matmuls of all updates must move {machine.update_bytes / 1e9:.2f} GB a step: "
        f"{machine.update_ms:.0f} ms, {machine.update_ms / floor_ms:.3f} of the floor, before they multiply anything.",
    ]


def operations_table(found: Sequence[OperationTimes]) -> Table:
    """Return the table of milliseconds, a row for every kind of operation."""
    table = _table("forward and backward, ms", ("kind of operation",), [times.key for times in found])
    for kind in found[0].milliseconds:
        table.add_row(kind, *(f"{times.milliseconds[kind]:.0f}" for times in found))
    table.add_row("in all", *(f"{sum(times.milliseconds.values()):.0f}" for times in found))
    return table


def headline(result: BenchResult) -> str:
    """Return what was measured, in one line."""
    settings = result.settings
    return (
        f"{settings.model}, batch {settings.batch_size}×{settings.length}, {settings.dtype}, "
        f"{settings.rounds} {'round' if settings.rounds == 1 else 'rounds'} in turns"
    )


def machine_lines(result: BenchResult) -> list[str]:
    """Return on what it was measured, and with what."""
    found = result.provenance
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    machine = found["device"] if result.settings.device == "cuda" else found["cpu_model"]
    policy = found["wait_policy"] or "not set"
    return [
        f"{machine}; {found['threads']} of {found['cpu_count']} threads, OMP_WAIT_POLICY {policy}.",
        f"{versions}; revision {found['git_revision'] or 'unknown'}.",
        "The backbone's own dropouts are 0; a dropout in a case's name is the adapter's.",
    ]


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(*names, title=title, title_justify="left")
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _quartiles(spread: Spread) -> str:
    return f"{spread.lower:.3f}–{spread.upper:.3f}"
