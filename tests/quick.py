"""Which cases of a parametrised test the default run has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Return arguments for `parametrize`: the cases among `quick` as they are, and the others marked slow.

    A case is the value of one argument, or a tuple with those of several.
    """
    quick, cases = [*quick], [*cases]
    assert all(case in cases for case in quick), "no such case"
    return [case if case in quick else pytest.param(*values(case), marks=pytest.mark.slow) for case in cases]


def values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
