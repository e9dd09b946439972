"""Grids under kill: what is finished stays finished, what was interrupted resumes, no process is left behind."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aroma_lab.run.run import run_trial
from aroma_lab.study.grid import expand, load_grid
from aroma_lab.study.run import run_grid
from fake_trial import SAVED_EVERY
from study_files import grid_values, real_grid, start_command, wait_until, write_yaml

pytestmark = pytest.mark.slow

STEPS = 20
NAMES = [f"mrpc/{method}/seed-{seed}" for seed in (0, 1) for method in "ab"]
COSTS = {"wall_seconds", "peak_gpu_memory_mib", "train_seconds", "git_revision"}


@pytest.fixture
def grid_file(tmp_path: Path) -> Path:
    """A grid of four trials of a second each, whose trials are stand-ins."""
    methods = {label: {"kind": "x", "pause": 0.05} for label in "ab"}
    values = grid_values(tmp_path / "out", methods=methods, training={"max_steps": STEPS})
    return write_yaml(tmp_path / "grid.yaml", values)


def finish(grid_file: Path) -> tuple[int, int]:
    """Run what is left, and require that every step was taken, again only since the last checkpoint."""
    outcome = run_grid(load_grid(grid_file), runner="fake_trial")
    assert outcome.failed == {}
    for taken in map(lines, folders(grid_file)):
        assert taken.count("finished") == 1
        numbers = [int(line.split()[1]) for line in taken[:-1]]
        assert sorted(set(numbers)) == list(range(1, STEPS + 1))
        assert numbers[-1] == STEPS
        for before, after in itertools.pairwise(numbers):
            resumed = after <= before + 1 and after % SAVED_EVERY == 1 and before - after < SAVED_EVERY
            assert after == before + 1 or resumed
    return len(outcome.finished), len(outcome.skipped)


def folders(grid_file: Path) -> list[Path]:
    return [grid_file.parent / "out" / "runs" / name for name in NAMES]


def lines(folder: Path) -> list[str]:
    log = folder / "steps.log"
    return log.read_text().splitlines() if log.exists() else []


def workers(grid_file: Path) -> list[int]:
    files = [folder / "pid.json" for folder in folders(grid_file)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_or_interrupted_command_takes_its_workers_along(grid_file: Path, how: signal.Signals) -> None:
    command = start_command(grid_file)
    wait_until(lambda: all(f"step {SAVED_EVERY + 1}" in lines(folder) for folder in folders(grid_file)[:2]))
    processes = workers(grid_file)
    assert len(processes) == 2
    assert all(map(is_alive, processes))
    command.send_signal(how)
    command.communicate()
    wait_until(lambda: not any(map(is_alive, processes)), seconds=5)
    assert not any((folder / "failure.json").exists() for folder in folders(grid_file))  # interrupted, not failed
    assert finish(grid_file) == (4, 0)


def test_kills_at_any_moment_lose_nothing_finished(grid_file: Path) -> None:
    moments = random.Random(0)
    finished: dict[Path, float] = {}

    def steps_taken() -> int:
        return sum(len(lines(folder)) for folder in folders(grid_file))

    for _ in range(12):
        goal = steps_taken() + moments.randrange(25)  # by steps, not by time: machines differ
        command = start_command(grid_file)
        wait_until(lambda: steps_taken() >= goal or command.poll() is not None)  # noqa: B023
        time.sleep(moments.uniform(0, 0.3))
        command.kill()
        command.communicate()
        for result in [folder / "result.json" for folder in folders(grid_file)]:
            if result.exists():
                assert finished.setdefault(result, result.stat().st_mtime) == result.stat().st_mtime
    assert finished
    assert sum(finish(grid_file)) == 4
    assert all(result.stat().st_mtime == written for result, written in finished.items())


def test_real_trials_of_one_killed_command_and_worker_end_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole, killed, said = real_grid(tmp_path, "whole"), real_grid(tmp_path, "killed"), tmp_path / "said.log"
    trials = expand(load_grid(whole))
    for trial in trials:
        run_trial(trial, tmp_path / "whole" / "runs" / trial.name)
    ours = [tmp_path / "killed" / "runs" / trial.name for trial in trials]

    def command() -> subprocess.Popen[bytes]:
        with said.open("wb") as log:
            return subprocess.Popen([sys.executable, "-m", "aroma", "lab", "run", killed], stdout=log, stderr=log)

    def wait_for_checkpoint(folder: Path) -> None:
        def has_checkpoint() -> bool:
            assert running.poll() is None, said.read_text()
            return any(folder.glob("checkpoints/checkpoint-*/trainer_state.json"))

        wait_until(has_checkpoint, seconds=200)

    running = command()
    wait_for_checkpoint(ours[0])
    running.kill()
    running.wait(60)
    assert not (ours[0] / "result.json").exists()
    running = command()
    wait_for_checkpoint(ours[1])
    (ended,) = subprocess.check_output(["fuser", ours[1] / "worker.log"], text=True).split()
    os.kill(int(ended), signal.SIGKILL)
    assert not (ours[1] / "result.json").exists()
    assert running.wait(300) == 0, said.read_text()  # it takes the trial up itself
    for folder in ours:
        assert comparable(folder) == comparable(tmp_path / "whole" / folder.relative_to(tmp_path / "killed"))
        assert not (folder / "checkpoints").exists()


def comparable(folder: Path) -> dict[str, Any]:
    """Return the result of a trial without what is of the machine and the moment."""
    return {key: value for key, value in json.loads((folder / "result.json").read_text()).items() if key not in COSTS}
