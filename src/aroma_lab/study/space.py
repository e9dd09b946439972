"""What is searched: a range or a list of choices per key, as Optuna's distributions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from aroma.errors import bad_value

from ..settings import flatten, unknown_key
from .grid import SECTIONS

Space = dict[str, BaseDistribution]
"""Distributions by dotted key of a trial, such as `training.learning_rate`."""

_WRITE = (
    "write {low: 1e-4, high: 1e-2, log: true}, {low: 1, high: 8}, {low: 0.1, high: 0.5, step: 0.1} or "
    "{choices: [1, 2]}"
)
_KEYS = ("low", "high", "step", "log", "choices")
_MAX_POINTS = 10_000


def flat_space(values: Any) -> dict[str, Any]:
    """Return a space as described, by dotted key: overrides such as `space.training.learning_rate.low=1` nest it.

    Raises:
        ConfigError: It has no keys.
    """
    flat = flatten(values, SECTIONS) if isinstance(values, dict) else {}
    if not flat:
        remedy = f"give at least one dotted key, such as training.learning_rate, and for it {_WRITE}"
        raise bad_value("space", values, remedy)
    return flat


def read_space(described: Mapping[str, Any]) -> Space:
    """Return the distributions of a space, by sorted key, so that machines agree on the order of points.

    Whole numbers as both `low` and `high` mean whole numbers in between; write `1.0` for a range of real numbers.

    Args:
        described: Ranges and choices by dotted key; see `flat_space`.

    Raises:
        ConfigError: Naming the key whose range or choices cannot work.
    """
    return {str(key): _distribution(f"space.{key}", described[key]) for key in sorted(described, key=str)}


def grid_points(space: Space) -> list[dict[str, Any]]:
    """Return all points of a space that has finitely many, the last key changing fastest.

    Raises:
        ConfigError: A range without steps, or more than 10,000 points.
    """
    values = {key: _values(key, distribution) for key, distribution in space.items()}
    count = math.prod(map(len, values.values()))
    if count > _MAX_POINTS:
        raise bad_value("space", f"{count} points", f"a grid has at most {_MAX_POINTS}; use sampler: random")
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def extremes(space: Space) -> list[dict[str, Any]]:
    """Return points that together contain every choice and both ends of every range."""
    ends: dict[str, list[Any]] = {
        key: list(one.choices) if isinstance(one, CategoricalDistribution) else [one.low, one.high]  # type: ignore[attr-defined]
        for key, one in space.items()
    }
    rounds = max(map(len, ends.values()))
    return [{key: several[min(n, len(several) - 1)] for key, several in ends.items()} for n in range(rounds)]


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """Return the values that the study's sampler gives `trial`; values that it already has are kept."""
    values: dict[str, Any] = {}
    for key, one in space.items():
        if isinstance(one, CategoricalDistribution):
            values[key] = trial.suggest_categorical(key, one.choices)
        elif isinstance(one, IntDistribution):
            values[key] = trial.suggest_int(key, one.low, one.high, step=one.step, log=one.log)
        elif isinstance(one, FloatDistribution):
            values[key] = trial.suggest_float(key, one.low, one.high, step=one.step, log=one.log)
    return values


def _distribution(field: str, given: Any) -> BaseDistribution:
    if not isinstance(given, dict) or not given:
        raise bad_value(field, given, _WRITE)
    for key, value in given.items():
        if key not in _KEYS:
            raise unknown_key(f"{field}.{key}", value, [f"{field}.{name}" for name in _KEYS], "a range", _WRITE)
        if key in ("low", "high", "step") and (
            isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        ):
            raise bad_value(f"{field}.{key}", value, "give a number")
    if "choices" in given:
        return _choices(field, given)
    if "low" not in given or "high" not in given:
        raise bad_value(field, given, f"a range needs both low and high; {_WRITE}")
    if given["low"] == given["high"]:
        raise bad_value(f"{field}.low", given["low"], f"it must be below high={given['high']!r}")
    if given.get("step", 0) > 0 and not given.get("log"):
        _require_end(field, given)
    whole = all(isinstance(given.get(key, 0), int) for key in ("low", "high", "step"))
    try:
        made: BaseDistribution = IntDistribution(**given) if whole else FloatDistribution(**given)
    except ValueError as error:  # says what does not go together
        raise bad_value(field, dict(given), str(error)) from error
    return made


def _choices(field: str, given: Mapping[str, Any]) -> CategoricalDistribution:
    choices = given["choices"]
    if len(given) > 1:
        raise bad_value(field, dict(given), "choices cannot be combined with other keys; leave those out")
    if not isinstance(choices, list) or not choices:
        raise bad_value(f"{field}.choices", choices, "give a list of at least one value")
    for number, choice in enumerate(choices):
        if not isinstance(choice, None | bool | int | float | str):
            raise bad_value(f"{field}.choices", choice, "a choice is a number, a text, true, false or null")
        if any(choice == other and type(choice) is type(other) for other in choices[:number]):
            raise bad_value(f"{field}.choices", choice, "it is there twice; keep one")
    return CategoricalDistribution(choices)


def _require_end(field: str, given: Mapping[str, Any]) -> None:
    """Refuse a `high` that Optuna would lower with a warning only."""
    low, high, step = (Decimal(str(given[key])) for key in ("low", "high", "step"))
    if (high - low) % step:
        end = low + (high - low) // step * step
        remedy = f"steps of {step} from {low} do not end there, but at {end}; write that"
        raise bad_value(f"{field}.high", given["high"], remedy)


def _values(key: str, one: BaseDistribution) -> list[Any]:
    if isinstance(one, CategoricalDistribution):
        return list(one.choices)
    if isinstance(one, IntDistribution) and not one.log:
        return list(range(one.low, one.high + 1, one.step))
    if isinstance(one, FloatDistribution) and one.step is not None:
        low, high, step = (Decimal(str(x)) for x in (one.low, one.high, one.step))
        return [float(low + n * step) for n in range(int((high - low) / step) + 1)]
    remedy = "a grid needs choices or a step; or use sampler: random"
    raise bad_value(f"space.{key}", {"low": one.low, "high": one.high, "log": one.log}, remedy)  # type: ignore[attr-defined]
