"""Numbers as a table prints them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .stats import Spread
from .table import EMPTY


def points(score: float) -> str:
    """Return a score in points, 0.8512 as `85.12`."""
    return decimals(100 * score)


def decimals(value: float) -> str:
    """Return a number with two decimals and a true minus sign."""
    return f"{value:.2f}".replace("-", "−")


def signed_points(difference: float) -> str:
    """Return a difference of scores in points with its sign; what rounds to zero has none."""
    text = f"{100 * difference:+.2f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def plain(value: float) -> str:
    """Return a number with as many digits as it needs, thousands grouped: 110, 112.5, 1,725, 0.0005."""
    return f"{value:,.10g}".replace("-", "−")


def amount(count: float) -> str:
    """Return a number of parameters with three digits: 0, 514, 9.22K, 171K, 1.34M."""
    for size, unit in ((1, ""), (1e3, "K"), (1e6, "M"), (1e9, "B")):
        text = f"{count / size:.3g}"
        if "e" not in text and float(text) < 1000:
            return text + unit
    return f"{count:.3g}"


def spread_text(spread: Spread | None, text: Callable[[float], str], planned: int) -> str:
    """Return mean ± deviation, and how many of the planned seeds there are where some lack."""
    if spread is None:
        return f"{EMPTY} (0 of {planned})" if planned else EMPTY
    shown = text(spread.mean) if spread.std is None else f"{text(spread.mean)} ± {text(spread.std)}"
    return shown if spread.count == planned else f"{shown} ({spread.count} of {planned})"


def span(values: Sequence[float], text: Callable[[float], str] = plain) -> str:
    """Return the one text of all `values`, or the smallest and the largest: `3`, `500–600`."""
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low}–{high}"


def listing(items: Sequence[str]) -> str:
    """Return `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1]))) if items else ""


def counted(number: int, noun: str) -> str:
    """Return `1 run`, `3 runs`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def show(value: object) -> str:
    """Return a setting's value as a person writes it: numbers short, texts bare, null for None."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float | int):
        return f"{value:.10g}"
    return str(value)
