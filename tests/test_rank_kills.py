"""One of several processes is killed: the others end with an error, and the next run goes on exactly."""

from __future__ import annotations

import pytest

from rank_kills import kills

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    ("way", "processes", "moments"),
    [("DDP", 2, 4), ("DDP", 4, 1), ("FSDP2", 2, 2), ("ZeRO-2", 2, 1), ("ZeRO-3", 2, 1)],
)
def test_a_run_of_which_a_rank_is_killed_goes_on_exactly(way: str, processes: int, moments: int) -> None:
    told = kills([way], [processes], seed=3, moments=moments)
    assert len(told) == moments
    for entry in told:
        assert entry["outcome"] == "equal", entry
        assert entry["codes"].count(-9) == 1, entry
