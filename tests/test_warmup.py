"""The climb of the learning rate after an outer step (Figure 2)."""

import pytest

from aroma.algorithm import rewarmup_factor


@pytest.mark.parametrize(
    ("outer_step", "inner_step", "rewarmup_steps", "factor"),
    [
        (1, 0, 50, 1.0),  # the first inner loop has the schedule's own warm-up
        (1, 7, 50, 1.0),
        (2, 0, 50, 0.0),
        (2, 1, 50, 0.02),
        (2, 25, 50, 0.5),
        (9, 49, 50, 0.98),
        (2, 50, 50, 1.0),
        (2, 51, 50, 1.0),
        (2, 0, 1, 0.0),
        (2, 1, 1, 1.0),
        (2, 0, 0, 1.0),  # switched off
        (5, 3, 0, 1.0),
    ],
)
def test_factor(outer_step: int, inner_step: int, rewarmup_steps: int, factor: float) -> None:
    assert rewarmup_factor(outer_step, inner_step, rewarmup_steps) == pytest.approx(factor, abs=1e-15)
