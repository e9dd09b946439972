"""Compressing in two processes: both decide alike, and as one process with the examples of both.

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

import compress_ranks
import ranks
from compress_ranks import COMPRESSING, DTYPES, ROWS, call, trained
from distributed_runs import assert_refused
from trainer_runs import assert_same, examples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RUNS = compress_ranks.__file__


@pytest.fixture(autouse=True)
def _drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what the one process of a comparison does to pull as the two."""
    monkeypatch.setattr(COMPRESSING, "pull", COMPRESSING.pull)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks tell what they came to."""
    return tmp_path_factory.mktemp("compressing")


def ends(out: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(out / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


def assert_as_one_process(found: dict[str, Any], alone: dict[str, Any], close: float) -> None:
    one, other = found["compression"], alone["compression"]
    assert 0 < one["curve"][one["chosen"]]["share"] < 1
    for what in ("chosen", "reason", "ranks", "examples", "outputs"):
        assert one[what] == other[what], what
    for size, expected in zip(one["curve"], other["curve"], strict=True):
        assert size == pytest.approx(expected, rel=close, abs=close)
    assert found["updates"].keys() == alone["updates"].keys()
    for name, update in found["updates"].items():
        torch.testing.assert_close(update, alone["updates"][name], rtol=0, atol=close)


# Plain calls ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def called(out: Path) -> Path:
    ranks.launch(2, RUNS, "calls", str(out))
    return out


@pytest.mark.parametrize("name", DTYPES)
def test_two_processes_decide_as_one(called: Path, name: str) -> None:
    first, second = ends(called, f"call-{name}")
    assert_same(first, second)
    assert first["compression"]["examples"] == ROWS
    assert_as_one_process(first, call(DTYPES[name]), 1e-9 if name == "float64" else 1e-6)


def test_what_one_process_meets_is_raised_in_both(called: Path) -> None:
    assert_refused(called, "not_finite_on_one", "NonFiniteError", "they are NaN or infinite")
    assert_refused(called, "none_on_one", "ConfigError", "give 16 examples or more")


# The Trainer ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(out: Path) -> Path:
    ranks.launch(2, RUNS, "train", str(out))
    return out


@pytest.mark.parametrize("name", ["seen", "given"])
def test_the_trainer_under_ddp_does_what_it_does_in_one_process(told: Path, tmp_path: Path, name: str) -> None:
    """Of the examples that it measures on each process has a half, seen in training or given."""
    first, second = ends(told, f"trainer-{name}")
    for what in ("compression", "updates"):
        assert_same(first[what], second[what], what)
    assert first["wrapped"] == "DistributedDataParallel"
    assert first["compression"]["examples"] == ROWS
    assert first["log"]["compress/share"] == second["log"]["compress/share"] < 1
    assert_as_one_process(first, trained(tmp_path, None if name == "seen" else examples(ROWS, seed=11)), 1e-9)


def assert_refused_before_a_step(out: Path, name: str) -> None:
    for told in ends(out, name):
        assert told["kind"] == "ConfigError", told
        assert told["refused"].startswith("callbacks='CompressCallback': shards keep their shape; leave the callback")
        assert "run `aroma compress` on the saved adapter" in told["refused"]
        assert told["steps"] == 0


def test_fsdp2_is_refused_before_a_step(out: Path) -> None:
    ranks.launch(2, RUNS, "fsdp2", str(out))
    assert_refused_before_a_step(out, "fsdp2")


def test_zero_is_refused_before_a_step(out: Path, deepspeed: dict[str, str]) -> None:
    (out / "jobs.json").write_text(json.dumps([[2, RUNS, "zero", str(out)]]))
    command = [sys.executable, ranks.__file__, "zero_runs", str(out / "jobs.json")]
    done = subprocess.run(command, env={**os.environ, **deepspeed}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    for stage in (2, 3):
        assert_refused_before_a_step(out, f"zero {stage}")
