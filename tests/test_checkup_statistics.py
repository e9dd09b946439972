"""The statistics of a checkup, when checkups come, and how many batches they use."""

from __future__ import annotations

import math

import pytest
import torch

from aroma.errors import ConfigError, NonFiniteError
from aroma.evidence.schedule import HeldOut, batches_each, moments
from aroma.evidence.statistics import fewest, sizes_to_measure

# Statistics ----------------------------------------------------------------------------------------------------------


def test_the_fewest_within_some_standard_errors_of_the_least_loss() -> None:
    losses = torch.tensor([[2.0, 2.2, 1.8], [1.1, 1.5, 1.0], [1.0, 1.2, 1.1], [1.3, 1.2, 1.4]], dtype=torch.float64)
    assert fewest(losses, 0.0) == 2
    assert fewest(losses, 1.0) == 1
    assert fewest(losses, 10.0) == 0
    assert fewest(torch.ones(3, 4), 0.0) == 0, "of equal losses the smallest adapter"
    with pytest.raises(NonFiniteError, match="not finite"):
        fewest(torch.tensor([[1.0, math.inf], [1.0, 2.0]]), 0.0)


@pytest.mark.parametrize("directions", [0, 1, 5, 576])
def test_sizes_go_from_none_to_all(directions: int) -> None:
    sizes = sizes_to_measure(directions)
    assert sizes[0] == 0
    assert sizes[-1] == directions
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= 13


# When, and how much --------------------------------------------------------------------------------------------------


def test_moments() -> None:
    assert moments((0.6, 0.2), 100) == [20, 60]
    assert moments([1.0], 7) == [7]
    for bad in ([], [0.0], [1.5], ["a"], 0.0):
        with pytest.raises(ConfigError, match="at="):
            moments(bad, 100)
    with pytest.raises(ConfigError, match="train longer"):
        moments((0.2, 0.21), 10)


def test_held_out_batches_come_once_before_any_comes_again() -> None:
    held_out = HeldOut([*"abcdefgh"], seed=3)
    taken = held_out.take(5) + held_out.take(11)
    assert sorted(taken[:8]) == sorted(taken[8:]) == [*"abcdefgh"]
    assert taken[:8] != taken[8:]
    again = HeldOut([*"abcdefgh"], seed=3)
    again.taken = 5
    assert again.take(11) == taken[5:]
    with pytest.raises(ConfigError, match="held_out='7 batches': 8 are needed"):
        HeldOut([*"abcdefg"])


@pytest.mark.parametrize(
    ("steps", "count", "there", "cost"), [(1500, 3, 37, 0.25), (1500, 1, 400, 1.0), (9000, 3, 64, 1.0)]
)
def test_all_checkups_cost_twelve_percent_of_the_steps_at_most(
    steps: int, count: int, there: int, cost: float
) -> None:
    each = batches_each(steps, count, there, cost)
    assert 8 <= each <= there
    assert count * cost * 9 * each / 3 <= 0.12 * steps
