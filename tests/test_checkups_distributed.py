"""Checkups in several processes: all ranks decide alike, and as one process with their global batches.

DeepSpeed is looked for by the fixture `deepspeed`, in conftest.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import checkup_ranks
import ranks
from aroma.evidence.compact import compact
from checkup_ranks import LOOPS, ZERO, Loop, Net, Way, rows, trained
from trainer_runs import assert_same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

RUNS = checkup_ranks.__file__
SHARDED = [name for name in (*LOOPS, *ZERO) if not name.startswith("ddp")]
TRAINERS = ("ddp", "fsdp2", "zero 3")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the ranks of all launches tell what they came to."""
    return tmp_path_factory.mktemp("checkups")


@pytest.fixture(scope="module")
def told(out: Path) -> Path:
    for part in ("loops", "train ddp", "train fsdp2"):
        ranks.launch(2, RUNS, part, str(out))
    return out


@pytest.fixture(scope="module")
def told_by_deepspeed(out: Path, deepspeed: dict[str, str]) -> Path:
    (out / "jobs.json").write_text(json.dumps([[2, RUNS, part, str(out)] for part in ("zero", "train zero 3")]))
    command = [sys.executable, ranks.__file__, "zero_runs", str(out / "jobs.json")]
    done = subprocess.run(command, env={**os.environ, **deepspeed}, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return out


def ends(request: pytest.FixtureRequest, name: str) -> list[dict[str, Any]]:
    """What each rank came to."""
    folder = request.getfixturevalue("told_by_deepspeed" if "zero" in name else "told")
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


def assert_as_one_process(came_to: dict[str, Any], alone: dict[str, Any], close: float) -> None:
    assert len(came_to["checkups"]) == len(alone["checkups"]) > 1
    assert 0 < came_to["checkups"][-1]["kept"] < came_to["checkups"][0]["sizes"][-1], "it is to cut, and not all"
    for found, expected in zip(came_to["checkups"], alone["checkups"], strict=True):
        for what in ("step", "ranks_before", "ranks", "sizes", "kept"):
            assert found[what] == expected[what], what
        assert found["losses"] == pytest.approx(expected["losses"], abs=close)
    assert came_to["updates"].keys() == alone["updates"].keys()
    for name, update in came_to["updates"].items():
        torch.testing.assert_close(update, alone["updates"][name], rtol=0, atol=close)


def close_in(way: Way) -> float:
    return 1e-12 if way.dtype == torch.float64 else 2e-6


@pytest.mark.parametrize("name", [*LOOPS, *ZERO])
def test_two_processes_do_what_one_does(request: pytest.FixtureRequest, name: str) -> None:
    """Of each batch, held-out ones too, every process has a half."""
    first, other = ends(request, name)
    for what in ("checkups", "factors"):
        assert_same(first[what], other[what], what)
    way = {**LOOPS, **ZERO}[name]
    assert_as_one_process(first, Loop(way).go_on().came_to(), close_in(way))


@pytest.mark.parametrize("name", [*LOOPS, *ZERO])
def test_a_checkup_leaves_no_trace_and_what_it_cut_stays_zero(request: pytest.FixtureRequest, name: str) -> None:
    for came_to in ends(request, name):
        for before, after in came_to["traces"]:
            assert_same(before, after)
            assert any(gradient is not None for gradient in before["gradients"]) or "zero" in name
        assert not came_to["moved"]


@pytest.mark.parametrize("name", ["ddp", *SHARDED])
def test_the_saved_adapter_is_compact_or_becomes_it(request: pytest.FixtureRequest, name: str) -> None:
    """Replicas are compact after the last step; shards keep their shape until one process has them."""
    first = ends(request, name)[0]
    way = {**LOOPS, **ZERO}[name]
    folder = request.getfixturevalue("out") / f"adapter-{name}"
    model: Any = PeftModel.from_pretrained(Net(), folder, autocast_adapter_dtype=False).to(way.dtype)
    x = rows(32, seed=4)[0].to(way.dtype)
    before, kept = model(x), {name: rank for name, (rank,) in first["checkups"][-1]["ranks"].items() if rank}
    widths = {A.shape[0] for _, A in first["factors"].values()}
    assert widths == ({8} if name in SHARDED else {*kept.values()})
    assert compact(model) == kept
    torch.testing.assert_close(model(x), before, rtol=0, atol=close_in(way))


@pytest.mark.parametrize("way", TRAINERS)
def test_the_trainer_does_what_it_does_in_one_process(
    request: pytest.FixtureRequest, tmp_path: Path, way: str
) -> None:
    first, other = ends(request, f"trainer-{way}")
    assert_same(first, other)
    assert (
        first["wrapped"]
        == {
            "ddp": "DistributedDataParallel",
            "fsdp2": "FSDPPeftModelForSequenceClassification",
            "zero 3": "DeepSpeedEngine",
        }[way]
    )
    assert_as_one_process(first, trained(tmp_path, way), 1e-5 if way == "zero 3" else 1e-12)
