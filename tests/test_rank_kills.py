"""One of several processes is killed: the others end with one error, and the next run goes on exactly."""

from __future__ import annotations

import pytest

from rank_kills import kills


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_of_which_a_rank_is_killed_goes_on_exactly() -> None:
    asked = [("DDP", 2, [0]), ("FSDP2", 2, [0]), ("ZeRO-2", 2, [0]), ("ZeRO-3", 2, [0])]
    told = [*kills(asked, seed=3)]
    assert [(entry["way"], entry["processes"], [entry["number"]]) for entry in told] == asked
    for entry in told:
        assert entry["outcome"] == "equal", entry
        assert entry["codes"].count(-9) == 1, entry
