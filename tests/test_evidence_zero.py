"""Growth by evidence under DeepSpeed's ZeRO: it does what replicas do, and resumes exactly; see test_zero.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
from aroma import verify_adapter
from evidence_ranks import ZERO_OF_FOUR, ZERO_SAVED, ZERO_SAVED_AT
from trainer_runs import assert_same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

RUNS = str(Path(__file__).parent / "evidence_zero.py")
NAMES = ["zero 1", "zero 2", "zero 3", "zero 3, nothing stays", "zero 2, offloaded", "zero 3, offloaded"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, deepspeed: dict[str, str]) -> Path:
    """The folder in which two ranks told of every loop and checkpoint, and four of some in `four`."""
    out = tmp_path_factory.mktemp("zero")
    jobs = [[2, RUNS, "loops", "checkpoints", str(out)], [4, RUNS, "loops of four", str(out / "four")]]
    (out / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, ranks.__file__, "zero_runs", str(out / "jobs.json")]
    done = subprocess.run(command, env={**os.environ, **deepspeed}, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return out


def ends(told: Path, name: str, count: int) -> list[dict[str, Any]]:
    return [torch.load(told / f"{name}-{rank}.pt", weights_only=True) for rank in range(count)]


@pytest.mark.parametrize(("name", "count"), [*((name, 2) for name in NAMES), *((name, 4) for name in ZERO_OF_FOUR)])
def test_it_does_what_replicas_do(told: Path, name: str, count: int) -> None:
    """Of four ranks some hold no entry of a pair."""
    folder = told if count == 2 else told / "four"
    first, *others = ends(folder, name, count)
    for other in others:
        assert_same(other, first)
    replicas = ends(folder, "replicas", 1)[0]
    born = {step for step, _, kind in first["events"] if kind == "born" and step > 34}
    assert len(born) > 2, "held-out batches are to decide more than once"
    assert any(kind == "squeezed" for _, _, kind in first["events"]) or name == "zero 3, nothing stays"
    for what in ("events", "noted", "ranks"):
        assert first[what] == replicas[what], what
    for matrix, update in first["weights"].items():
        # In float32, where Adam lets entries move as the rounding wants that have hardly any gradient.
        close = {"rtol": 1e-3, "atol": 1e-3 * float(update.abs().max())}
        torch.testing.assert_close(update, replicas["weights"][matrix], **close)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_ends_with_is_shortened_in_all_copies(told: Path, name: str) -> None:
    for whole, left in zip(ends(told, name, 2), ends(told, f"shortened-{name}", 2), strict=True):
        for matrix, update in whole["weights"].items():
            merged = left["merged"][matrix]
            torch.testing.assert_close(left["half"][matrix], merged + 0.5 * (update - merged), rtol=1e-5, atol=1e-6)
            assert torch.equal(left["after a step"][matrix], left["half"][matrix])


@pytest.mark.parametrize("step", ZERO_SAVED_AT)
@pytest.mark.parametrize("name", ZERO_SAVED)
def test_it_resumes_exactly(told: Path, name: str, step: int) -> None:
    verify_adapter(told / f"saved-{name}-{step}")
    for uninterrupted, resumed in zip(
        ends(told, f"uninterrupted-{name}-{step}", 2), ends(told, f"resumed-{name}-{step}", 2), strict=True
    ):
        assert any(kind == "born" and when > step for when, _, kind in resumed["events"]), "it is to grow on"
        resumed["events"] = [event for event in uninterrupted["events"] if event[0] <= step] + resumed["events"]
        assert_same(resumed, uninterrupted)
