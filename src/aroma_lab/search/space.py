"""What is searched: one range or list of choices a key, as Optuna's distributions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from aroma.errors import bad_value

from ..grid.settings import SECTIONS
from ..settings import flatten, unknown_key

Space = dict[str, BaseDistribution]
"""Distributions by dotted key of a trial, as `training.learning_rate`."""

_WRITE = (
    "write {low: 1e-4, high: 1e-2, log: true}, {low: 1, high: 8}, {low: 0.1, high: 0.5, step: 0.1} or "
    "{choices: [1, 2]}"
)
_KEYS = ("low", "high", "step", "log", "choices")
_MOST_POINTS = 10_000


def whole_keys(values: Any) -> dict[str, Any]:
    """Return a space as described, with sections taken apart: an override's dots have made some of its keys.

    Raises:
        ConfigError: It has no keys.
    """
    flat = flatten(values, SECTIONS) if isinstance(values, dict) else {}
    if not flat:
        raise bad_value(
            "space", values, f"give at least one dotted key, as training.learning_rate, and to it {_WRITE}"
        )
    return flat


def read_space(values: Any) -> Space:
    """Return the space that a search file describes.

    Whole numbers as both `low` and `high` mean whole numbers in between; write `1.0` for a range of numbers.

    Raises:
        ConfigError: Naming the key whose range or choices cannot be.
    """
    described = whole_keys(values)
    # Sorted, so that machines agree on the order of points whatever the order of lines.
    return {str(key): _distribution(f"space.{key}", described[key]) for key in sorted(described, key=str)}


def grid_points(space: Space) -> list[dict[str, Any]]:
    """Return all points of a space that has finitely many, the last key changing fastest.

    Raises:
        ConfigError: A range without steps, or more than 10,000 points.
    """
    values = {key: _values(key, distribution) for key, distribution in space.items()}
    count = 1
    for several in values.values():
        count *= len(several)
    if count > _MOST_POINTS:
        raise bad_value("space", f"{count} points", f"a grid has at most {_MOST_POINTS}; use sampler: random")
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def extremes(space: Space) -> list[dict[str, Any]]:
    """Return points such that every choice, and the ends of every range, are in one of them."""
    ends = {
        key: list(distribution.choices)
        if isinstance(distribution, CategoricalDistribution)
        else [distribution.low, distribution.high]  # type: ignore[attr-defined]
        for key, distribution in space.items()
    }
    rounds = max(map(len, ends.values()))
    return [{key: several[min(n, len(several) - 1)] for key, several in ends.items()} for n in range(rounds)]


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """Return the values that the study's sampler gives `trial`; those it has already stay."""
    values: dict[str, Any] = {}
    for key, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            values[key] = trial.suggest_categorical(key, distribution.choices)
        elif isinstance(distribution, IntDistribution):
            values[key] = trial.suggest_int(
                key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
        else:
            assert isinstance(distribution, FloatDistribution), "read_space makes no others"
            values[key] = trial.suggest_float(
                key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
    return values


def _distribution(field: str, given: Any) -> BaseDistribution:
    if not isinstance(given, dict) or not given:
        raise bad_value(field, given, _WRITE)
    for key, value in given.items():
        if key not in _KEYS:
            raise unknown_key(f"{field}.{key}", value, [f"{field}.{name}" for name in _KEYS], "a range", _WRITE)
    if "choices" in given:
        return _choices(field, given)
    if "low" not in given or "high" not in given:
        raise bad_value(field, given, f"a range needs both low and high; {_WRITE}")
    return _range(field, given)


def _choices(field: str, given: Mapping[str, Any]) -> CategoricalDistribution:
    choices = given["choices"]
    if len(given) > 1:
        raise bad_value(field, dict(given), "choices stand alone; leave the other keys out")
    if not isinstance(choices, list) or not choices:
        raise bad_value(f"{field}.choices", choices, "give a list of at least one value")
    for number, choice in enumerate(choices):
        if not isinstance(choice, None | bool | int | float | str):
            raise bad_value(f"{field}.choices", choice, "a choice is a number, a text, true, false or null")
        if any(choice == other and type(choice) is type(other) for other in choices[:number]):
            raise bad_value(f"{field}.choices", choice, "it is there twice; keep one")
    return CategoricalDistribution(choices)


def _range(field: str, given: Mapping[str, Any]) -> BaseDistribution:
    for key in ("low", "high", "step"):
        number = given.get(key)
        if key in given and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise bad_value(f"{field}.{key}", number, "give a number")
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise bad_value(f"{field}.log", log, "give true or false")
    low, high, step = given["low"], given["high"], given.get("step")
    if not (low < high and math.isfinite(high - low)):
        raise bad_value(f"{field}.low", low, f"it must be a number below high={high!r}")
    if step is not None:
        _check_step(field, low, high, step, log)
    if log and low <= 0:
        raise bad_value(
            f"{field}.low", low, "only numbers above 0 have a logarithm; give a low above 0, or leave log out"
        )
    if all(isinstance(number, int) for number in (low, high, step) if number is not None):
        return IntDistribution(low, high, log=log, step=step or 1)
    return FloatDistribution(low, high, log=log, step=step)


def _check_step(field: str, low: float, high: float, step: float, log: bool) -> None:
    """Refuse what Optuna would change in silence: what is written is what is searched."""
    if log:
        raise bad_value(f"{field}.step", step, "a logarithmic range has no steps; leave step or log out")
    if not step > 0:
        raise bad_value(f"{field}.step", step, "give a positive number")
    first, last, width = (Decimal(str(number)) for number in (low, high, step))
    if (last - first) % width:
        end = first + (last - first) // width * width
        raise bad_value(
            f"{field}.high", high, f"steps of {step} from {low} do not end there, but at {end}; write that"
        )


def _values(key: str, distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        low, high, step = (Decimal(str(x)) for x in (distribution.low, distribution.high, distribution.step))
        return [float(low + n * step) for n in range(int((high - low) / step) + 1)]
    assert isinstance(distribution, IntDistribution | FloatDistribution), "read_space makes no others"
    written = {"low": distribution.low, "high": distribution.high, **({"log": True} if distribution.log else {})}
    raise bad_value(f"space.{key}", written, "a grid needs choices or a step; or use sampler: random")
