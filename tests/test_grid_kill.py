"""Grids under kill: what is finished stays finished, what was interrupted goes on, nobody trains on unseen."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from aroma_lab.grid.reader import load_grid
from aroma_lab.grid.run import run_grid
from grid_worker import SAVED_EVERY

TESTS = Path(__file__).parent
STEPS = 20
NAMES = [f"mrpc/{method}/seed-{seed}" for method in "ab" for seed in (0, 1)]


@pytest.fixture
def grid_file(monkeypatch, tmp_path):
    """A grid of four trials of a second each, whose workers only count."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setattr("aroma_lab.grid.run.check_methods", lambda trials: None)
    grid = {
        "output": str(tmp_path / "out"),
        "model": "minilm",
        "processes": 2,
        "tasks": {"mrpc": None},
        "methods": {label: {"kind": "x", "pause": 0.05} for label in "ab"},
        "training": {"max_steps": STEPS},
        "seeds": [0, 1],
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    return path


def start(grid_file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TESTS / "grid_runner.py"), str(grid_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell lets what it starts in the background ignore SIGINT, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def folders(grid_file: Path) -> list[Path]:
    return [grid_file.parent / "out" / "runs" / name for name in NAMES]


def lines(folder: Path) -> list[str]:
    log = folder / "steps.log"
    return log.read_text().splitlines() if log.exists() else []


def steps_taken(grid_file: Path) -> int:
    return sum(len(lines(folder)) for folder in folders(grid_file))


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def worker_ids(grid_file: Path) -> list[int]:
    files = [folder / "environment.json" for folder in folders(grid_file)]
    return [json.loads(file.read_text())["pid"] for file in files if file.exists()]


def state_of(process: int) -> str:
    """The kernel's letter for what a process is doing, empty for one that is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def is_alive(process: int) -> bool:
    return state_of(process) not in ("", "Z")


def assert_whole(folder: Path) -> None:
    """Every step was taken; at most the steps since the last checkpoint of an interruption were taken again."""
    taken = lines(folder)
    assert taken.count("finished") == 1
    numbers = [int(line.split()[1]) for line in taken[:-1]]
    assert sorted(set(numbers)) == list(range(1, STEPS + 1))
    for before, after in itertools.pairwise(numbers):
        assert after == before + 1 or (
            after <= before + 1 and after % SAVED_EVERY == 1 and before - after < SAVED_EVERY
        )
    assert numbers[-1] == STEPS


def test_a_killed_worker_is_reported_and_goes_on_from_its_checkpoint(grid_file):
    runner = start(grid_file)
    victim = folders(grid_file)[0]
    wait_until(lambda: f"step {SAVED_EVERY + 2}" in lines(victim))
    os.kill(json.loads((victim / "environment.json").read_text())["pid"], signal.SIGKILL)
    output, _ = runner.communicate(timeout=60)
    assert output.split() == ["3", "0", "1"]  # finished, skipped, failed
    assert "SIGKILL" in json.loads((victim / "failure.json").read_text())["message"]

    outcome = run_grid(load_grid(grid_file), module="grid_worker", retry_failed=True)
    assert (outcome.finished, len(outcome.skipped), outcome.failed) == ([NAMES[0]], 3, [])
    for folder in folders(grid_file):
        assert_whole(folder)
    assert len(lines(victim)) < STEPS + 1 + SAVED_EVERY  # it did not start over


def test_a_killed_runner_takes_its_workers_along_and_leaves_no_lock(grid_file):
    runner = start(grid_file)
    wait_until(lambda: all(f"step {SAVED_EVERY + 1}" in lines(folder) for folder in folders(grid_file)[::2]))
    workers = worker_ids(grid_file)
    assert len(workers) == 2
    assert all(is_alive(worker) for worker in workers)
    runner.kill()
    runner.communicate()
    wait_until(lambda: not any(is_alive(worker) for worker in workers), seconds=5)

    outcome = run_grid(load_grid(grid_file), module="grid_worker")
    assert sorted(outcome.finished) == sorted(NAMES)
    for folder in folders(grid_file):
        assert_whole(folder)


def test_the_next_runner_waits_for_the_workers_of_a_killed_one(grid_file):
    """A worker stopped in its tracks cannot notice that its runner is gone; it still keeps its folder to itself."""
    grid = yaml.safe_load(grid_file.read_text())
    for method in grid["methods"].values():
        method["pause"] = 0.25  # on a busy machine, trials of a second may be over before the other worker begins
    grid_file.write_text(yaml.safe_dump(grid))
    runner = start(grid_file)
    wait_until(lambda: len(worker_ids(grid_file)) == 2)
    stopped = worker_ids(grid_file)
    for worker in stopped:
        os.kill(worker, signal.SIGSTOP)
    wait_until(lambda: [state_of(worker) for worker in stopped] == ["T", "T"], seconds=5)
    runner.kill()
    runner.communicate()
    following = start(grid_file)
    time.sleep(1.5)
    assert following.poll() is None
    assert worker_ids(grid_file) == stopped  # no other worker has begun in their folders
    for worker in stopped:
        os.kill(worker, signal.SIGCONT)
    output, errors = following.communicate(timeout=60)
    assert output.split() == ["4", "0", "0"], errors


def test_an_interrupt_stops_the_workers_first(grid_file):
    runner = start(grid_file)
    wait_until(lambda: len(worker_ids(grid_file)) == 2)
    workers = worker_ids(grid_file)
    runner.send_signal(signal.SIGINT)
    _, errors = runner.communicate(timeout=30)
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert not any(is_alive(worker) for worker in workers)
    assert not any((folder / "failure.json").exists() for folder in folders(grid_file))  # interrupted, not failed
    outcome = run_grid(load_grid(grid_file), module="grid_worker")
    assert (len(outcome.finished), outcome.failed) == (4, [])


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing_finished(grid_file):
    moments = random.Random(0)
    finished: dict[Path, float] = {}
    for _ in range(12):
        goal = steps_taken(grid_file) + moments.randrange(25)  # by steps, not by time: machines differ
        runner = start(grid_file)
        wait_until(lambda: steps_taken(grid_file) >= goal or runner.poll() is not None)  # noqa: B023
        time.sleep(moments.uniform(0, 0.3))
        runner.kill()
        runner.communicate()
        for result in [folder / "result.json" for folder in folders(grid_file)]:
            if result.exists():
                assert finished.setdefault(result, result.stat().st_mtime) == result.stat().st_mtime
    assert finished
    output, errors = start(grid_file).communicate(timeout=60)
    assert sum(map(int, output.split()[:2])) == 4, errors
    for result, written in finished.items():
        assert result.stat().st_mtime == written
    for folder in folders(grid_file):
        assert_whole(folder)


VOLATILE = {"wall_seconds", "cpu_seconds", "peak_memory_mib", "peak_gpu_memory_mib", "epoch_seconds", "git_revision"}
"""Of the machine and the moment, not of the trial."""


@pytest.mark.slow
def test_real_trials_end_as_if_runner_and_worker_had_not_been_killed(tmp_path):
    whole, killed = real_grid(tmp_path, "whole"), real_grid(tmp_path, "killed")
    assert command(whole).wait(300) == 0, said(whole).read_text()
    kill_at_a_checkpoint(killed, "lora", lambda runner: runner.kill())
    kill_at_a_checkpoint(killed, "aroma", lambda runner: os.kill(children(runner.pid)[0], signal.SIGKILL))
    assert command(killed, "--retry-failed").wait(300) == 0, said(killed).read_text()
    for name in ("words/lora/seed-0", "words/aroma/seed-0"):
        results = [json.loads((tmp_path / output / "runs" / name / "result.json").read_text()) for output in NAMED]
        expected, found = ({key: value for key, value in one.items() if key not in VOLATILE} for one in results)
        assert found == expected
        assert not (tmp_path / "killed" / "runs" / name / "checkpoints").exists()


NAMED = ("whole", "killed")


def real_grid(folder: Path, output: str) -> Path:
    from tiny_classifier import save_tiny_bert, sentences, write_json_lines

    if not (folder / "bert").exists():
        save_tiny_bert(folder / "bert")
        for name, count in (("train", 200), ("test", 50)):
            write_json_lines(folder / f"{name}.jsonl", sentences(count, seed=count))
    aroma = {"inner_check_interval": 5, "max_inner_steps": 20, "rewarmup_steps": 5}
    files = {"source": str(folder), "train": "train.jsonl", "reported": {"test": "test.jsonl"}, "max_length": 16}
    grid = {
        "output": str(folder / output),
        "model": str(folder / "bert"),
        "tasks": {"words": files},
        "methods": {"lora": {"kind": "lora", "r": 4}, "aroma": {"kind": "aroma", **aroma}},
        "training": {"max_steps": 120, "warmup_steps": 5, "batch_size": 8, "save_steps": 10, "early_stop": False},
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    return path


def command(grid: Path, *options: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "aroma.cli", "lab", "run", str(grid), *options]
    with said(grid).open("wb") as log:
        return subprocess.Popen(arguments, stdout=log, stderr=log)


def said(grid: Path) -> Path:
    return grid.with_suffix(".log")


def kill_at_a_checkpoint(grid: Path, method: str, kill: Callable[[subprocess.Popen[bytes]], None]) -> None:
    trial = grid.parent / grid.stem / "runs" / "words" / method / "seed-0"
    runner = command(grid)

    def has_checkpoint() -> bool:
        assert runner.poll() is None, said(grid).read_text()
        return any(trial.glob("checkpoints/checkpoint-*/trainer_state.json"))

    wait_until(has_checkpoint, seconds=200)
    kill(runner)
    runner.wait(60)
    assert not (trial / "result.json").exists()


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
