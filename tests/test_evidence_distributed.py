"""Growth by evidence in several processes: all ranks decide alike, and as one process with their global batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import evidence_ranks
from aroma import verify_adapter
from distributed_runs import assert_refused
from evidence_ranks import OF_FOUR, SAVED_AT, WRAPS, ended, runs
from evidence_runs import Loop
from ranks import launch
from trainer_runs import assert_same

pytestmark = pytest.mark.slow

CLOSE = {"rtol": 1e-6, "atol": 1e-9}
"""In float64 nothing but the order of sums differs; Adam divides by square roots of some of them."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks told of every loop."""
    out = tmp_path_factory.mktemp("evidence")
    launch(2, evidence_ranks.__file__, "all", str(out))
    return out


def ends(told: Path, name: str, count: int = 2) -> list[dict[str, Any]]:
    return [torch.load(told / f"{name}-{rank}.pt", weights_only=True) for rank in range(count)]


def assert_as_one_process(told: Path, name: str, count: int) -> None:
    first, *others = ends(told, name, count)
    for other in others:
        assert_same(other, first)
    alone = ended(Loop(**runs()[name][1]()).go_on())
    settled = max(step for step, _, kind in first["events"] if kind == "settled")
    assert any(kind == "born" and step > settled for step, _, kind in first["events"]), "it is to grow"
    squeezed = {kind == "squeezed" for _, _, kind in first["events"]}
    assert (True in squeezed) == ("held out" in name), "held-out examples say what goes where growth ends"
    for what in ("events", "noted", "ranks"):
        assert first[what] == alone[what], what
    for matrix, update in first["weights"].items():
        torch.testing.assert_close(
            update, alone["weights"][matrix], **CLOSE, msg=lambda said, m=matrix: f"{m}: {said}"
        )


@pytest.mark.parametrize("name", runs())
def test_two_processes_do_what_one_does(told: Path, name: str) -> None:
    assert_as_one_process(told, name, 2)


@pytest.mark.parametrize("way", WRAPS)
def test_what_is_learnt_by_heart_is_squeezed_early_and_shortened(told: Path, way: str) -> None:
    for end in ends(told, f"{way}, held out, learnt by heart"):
        assert {step for step, _, kind in end["events"] if kind == "squeezed"} == {204, 480}
        assert end["rule"]["strength_at_end"] < 1


@pytest.mark.parametrize("way", WRAPS)
def test_held_out_batches_duel_again_and_again(told: Path, way: str) -> None:
    """In the run above, and more of them than there are."""
    for end in ends(told, f"{way}, held out"):
        duels = max(max(flips) for _, _, flips in end["noted"])
        assert duels >= 7
        assert end["rule"]["asked"] + duels > 20, "they come in a second order"


def test_four_processes_do_what_one_does(tmp_path: Path) -> None:
    """Under FSDP2 one of them holds no slot."""
    launch(4, evidence_ranks.__file__, "loops of four", str(tmp_path))
    for name in OF_FOUR:
        assert_as_one_process(tmp_path, name, 4)


@pytest.mark.parametrize("step", SAVED_AT)
@pytest.mark.parametrize("way", WRAPS)
def test_it_resumes_exactly(told: Path, way: str, step: int) -> None:
    verify_adapter(told / f"saved-{way}-{step}")
    both = (ends(told, f"{kind}-{way}-{step}") for kind in ("uninterrupted", "resumed"))
    for uninterrupted, resumed in zip(*both, strict=True):
        assert any(kind == "born" and when > step for when, _, kind in resumed["events"]), "it is to grow on"
        resumed["events"] = [event for event in uninterrupted["events"] if event[0] <= step] + resumed["events"]
        assert_same(resumed, uninterrupted)


def test_replicas_go_on_after_the_controller_was_taken_away(told: Path) -> None:
    """DistributedDataParallel waits for a gradient of every pair, also of those of which no slot was in use yet."""
    one, other = ends(told, "detached")
    assert_same(one, other)
    assert not any(update.any() for update in one["after 4"].values())
    moved = [not torch.equal(update, one["before 30"][name]) for name, update in one["after 30"].items()]
    assert any(moved)


def test_ranks_with_unequal_numbers_of_held_out_batches_ask_alike(told: Path) -> None:
    one, other = ends(told, "unequal")
    assert_same(one, other)
    assert one["asked"] == 18


def test_the_trainer_does_what_it_does_alone(told: Path, tmp_path: Path) -> None:
    """Each rank has its own held-out batches, of the same examples in all."""
    one, other = ends(told, "trained")
    assert_same(one, other)
    alone = evidence_ranks.trained(tmp_path)
    assert one["events"] == alone["events"]
    assert one["noted"] == alone["noted"]
    for matrix, update in one["weights"].items():
        torch.testing.assert_close(update, alone["weights"][matrix], **CLOSE)


SAYS = {
    "other_held_out": ("ConfigError", "growth_batches='0 batches': it takes"),
    "broken_held_out": ("NonFiniteError", "is not finite on 4 batches in a row"),
}


@pytest.mark.parametrize("name", SAYS)
def test_a_clear_error_on_every_rank(told: Path, name: str) -> None:
    assert_refused(told, name, *SAYS[name])
