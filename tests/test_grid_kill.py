"""Grids under kill: what is finished stays finished, what was interrupted resumes, no process is left behind."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from aroma_lab.study.grid import load_grid
from aroma_lab.study.run import run_grid
from fake_trial import SAVED_EVERY
from study_files import (
    FAKE,
    comparable,
    environment,
    grid_values,
    output_of,
    real_grid,
    run_undisturbed,
    start_command,
    start_machine,
    wait_for_checkpoint,
    wait_until,
    write_yaml,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")]

STEPS = 20
NAMES = [f"mrpc/{method}/seed-{seed}" for seed in (0, 1) for method in "ab"]


@pytest.fixture
def grid_file(monkeypatch, tmp_path) -> Path:
    """A grid of four trials of a second each, whose trials are stand-ins."""
    for key, value in environment(tmp_path / "log.txt").items():
        monkeypatch.setenv(key, value)
    return write_grid(tmp_path, pause=0.05)


def write_grid(folder: Path, pause: float) -> Path:
    methods = {label: {"kind": "x", "pause": pause} for label in "ab"}
    values = grid_values(folder / "out", methods=methods, training={"max_steps": STEPS})
    return write_yaml(folder / "grid.yaml", values)


def start(grid_file: Path) -> subprocess.Popen[str]:
    return start_machine(grid_file, grid_file.parent / "log.txt")


def finish(grid_file: Path) -> tuple[int, int]:
    """Run what is left, and require that every step was taken, again only since the last checkpoint."""
    outcome = run_grid(load_grid(grid_file), module=FAKE)
    assert outcome.failed == []
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


def trial_processes(grid_file: Path) -> list[int]:
    files = [folder / "environment.json" for folder in folders(grid_file)]
    return [json.loads(file.read_text())["pid"] for file in files if file.exists()]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_trial_of_a_killed_process_is_taken_up_again_from_its_checkpoint(grid_file):
    runner, victim = start(grid_file), folders(grid_file)[0]
    wait_until(lambda: f"step {SAVED_EVERY + 2}" in lines(victim))
    os.kill(json.loads((victim / "environment.json").read_text())["pid"], signal.SIGKILL)
    assert output_of(runner) == "4 0 0\n"  # finished, skipped, failed
    assert len(lines(victim)) > STEPS + 1, "it was killed"
    assert finish(grid_file) == (0, 4)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_runner_takes_its_trials_along_even_stopped_ones(grid_file, stopped):
    runner = start(grid_file)
    wait_until(lambda: all(f"step {SAVED_EVERY + 1}" in lines(folder) for folder in folders(grid_file)[:2]))
    processes = trial_processes(grid_file)
    assert len(processes) == 2
    for process in processes:
        assert is_alive(process)
        if stopped:
            os.kill(process, signal.SIGSTOP)
    runner.kill()
    runner.communicate()
    wait_until(lambda: not any(map(is_alive, processes)), seconds=5)
    assert finish(grid_file) == (4, 0)


def test_the_next_runner_waits_for_a_runner_that_is_held_up_and_runs_the_rest(grid_file):
    write_grid(grid_file.parent, pause=0.2)  # the other command starts meanwhile
    runner = start(grid_file)
    wait_until(lambda: len(trial_processes(grid_file)) == 2)
    runner.send_signal(signal.SIGSTOP)
    following = start(grid_file)
    wait_until(lambda: all("finished" in lines(folder) for folder in folders(grid_file)))
    assert following.poll() is None, "the scores of the first two are not told yet"
    runner.send_signal(signal.SIGCONT)
    for command in (runner, following):
        now, earlier, failed = map(int, output_of(command).split())
        assert (now + earlier, failed) == (4, 0)
    whole = [f"step {n}" for n in range(1, STEPS + 1)] + ["finished"]
    assert all(lines(folder) == whole for folder in folders(grid_file))


def test_an_interrupt_stops_the_trials_first(grid_file):
    runner = start(grid_file)
    wait_until(lambda: len(trial_processes(grid_file)) == 2)
    processes = trial_processes(grid_file)
    runner.send_signal(signal.SIGINT)
    assert output_of(runner).splitlines()[-1] == "KeyboardInterrupt"
    assert not any(map(is_alive, processes))
    assert not any((folder / "failure.json").exists() for folder in folders(grid_file))  # interrupted, not failed
    assert finish(grid_file) == (4, 0)


def test_kills_at_any_moment_lose_nothing_finished(grid_file):
    moments = random.Random(0)
    finished: dict[Path, float] = {}

    def steps_taken() -> int:
        return sum(len(lines(folder)) for folder in folders(grid_file))

    for _ in range(12):
        goal = steps_taken() + moments.randrange(25)  # by steps, not by time: machines differ
        runner = start(grid_file)
        wait_until(lambda: steps_taken() >= goal or runner.poll() is not None)  # noqa: B023
        time.sleep(moments.uniform(0, 0.3))
        runner.kill()
        runner.communicate()
        for result in [folder / "result.json" for folder in folders(grid_file)]:
            if result.exists():
                assert finished.setdefault(result, result.stat().st_mtime) == result.stat().st_mtime
    assert finished
    assert sum(finish(grid_file)) == 4
    assert all(result.stat().st_mtime == written for result, written in finished.items())


def test_real_trials_end_as_if_runner_and_process_had_not_been_killed(tmp_path):
    whole = run_undisturbed(real_grid(tmp_path, "whole"))
    killed, said = real_grid(tmp_path, "killed"), tmp_path / "said.log"
    trials = [tmp_path / "killed" / "runs" / "words" / method / "seed-0" for method in ("lora", "aroma")]

    runner = start_command("run", str(killed), said=said)
    wait_for_checkpoint(trials[0], runner, said)
    runner.kill()
    runner.wait(60)
    assert not (trials[0] / "result.json").exists()

    runner = start_command("run", str(killed), said=said)
    os.kill(wait_for_checkpoint(trials[1], runner, said), signal.SIGKILL)
    assert not (trials[1] / "result.json").exists()
    assert runner.wait(300) == 0, said.read_text()  # it takes the trial up itself
    for trial in trials:
        assert comparable(trial) == comparable(whole / trial.relative_to(tmp_path / "killed" / "runs"))
        assert not (trial / "checkpoints").exists()
