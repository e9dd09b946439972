"""Trials that are forked from a process that has imported everything: each by itself, and as in a fresh one."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aroma_lab.study.grid import expand, load_grid
from aroma_lab.study.nursery import Forked, Nursery
from aroma_lab.study.process import TrialProcess, is_locked, take_lock
from aroma_lab.study.run import run_grid
from study_files import children, comparable, real_grid, wait_until

pytestmark = pytest.mark.slow
"""A nursery imports for ten seconds before it forks the first trial."""

STAND_IN = """
import os, pathlib, signal, sys, time
print("begins", *sys.argv[1:], "torch" in sys.modules, os.getsid(0) == os.getpid(), flush=True)
what, folder = sys.argv[1:]
if what == "sleep":
    pathlib.Path(folder, "sleeps").touch()
    time.sleep(60)
elif what == "raise":
    raise ValueError("so it is")
elif what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(what))
"""


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "stand_in.py").write_text(STAND_IN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        made = Nursery()
    yield made
    made.close()


def begin(nursery: Nursery, what: str, folder: Path) -> tuple[Forked, Path, int]:
    lock = take_lock(folder, what)
    assert lock is not None
    return nursery.start("stand_in", [what, str(folder)], folder / f"{what}.log", lock), folder / f"{what}.log", lock


def test_each_ends_in_its_own_way_and_says_it_in_its_own_log(nursery: Nursery, tmp_path: Path) -> None:
    begun = {what: begin(nursery, what, tmp_path) for what in ("0", "7", "raise", "die")}
    codes = {what: process.wait(60) for what, (process, _, _) in begun.items()}
    assert codes == {"0": 0, "7": 7, "raise": 1, "die": -signal.SIGKILL}
    for what, (process, log, _) in begun.items():
        assert log.read_text().splitlines()[0] == f"begins {what} {tmp_path} True True"
        assert process.poll() == process.returncode == codes[what]
        process.terminate()  # of one that has ended: nothing
    assert begun["raise"][1].read_text().splitlines()[-1] == "ValueError: so it is"
    for _, _, lock in begun.values():
        os.close(lock)


def test_a_process_is_stopped_and_keeps_its_lock_until_then(nursery: Nursery, tmp_path: Path) -> None:
    (process, _, lock), (other, _, other_lock) = (begin(nursery, what, tmp_path) for what in ("sleep", "0"))
    os.close(lock)
    os.close(other_lock)
    assert other.wait(60) == 0
    assert not is_locked(tmp_path, "0")
    wait_until((tmp_path / "sleeps").exists)
    assert process.poll() is None
    assert is_locked(tmp_path, "sleep")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM
    assert not is_locked(tmp_path, "sleep")


def test_a_killed_nursery_is_replaced_and_its_trials_go_on(tmp_path: Path) -> None:
    file = real_grid(tmp_path, "grid")
    runs, killed, others = tmp_path / "grid" / "runs", [], children(os.getpid())

    def kill_once(progress: object) -> None:
        if not killed and any(runs.glob("words/*/seed-0/checkpoints/checkpoint-*/trainer_state.json")):
            killed.extend(one for one in children(os.getpid()) if one not in others)
            os.kill(killed[0], signal.SIGKILL)

    outcome = run_grid(load_grid(file), watch=kill_once)
    assert len(killed) == 1
    assert (len(outcome.finished), outcome.failed) == (2, [])


def test_a_forked_trial_ends_as_one_in_a_process_of_its_own(nursery: Nursery, tmp_path: Path) -> None:
    folders = []
    for name, where in (("forked", nursery), ("fresh", None)):
        grid = load_grid(real_grid(tmp_path, name))
        trial = expand(grid)[-1]
        assert trial.method == "aroma"
        lock = take_lock(grid.folder, trial.name)
        assert lock is not None
        process = TrialProcess(trial, 0, grid.folder, lock, nursery=where)
        wait_until(process.has_ended, seconds=200)
        assert process.failure() is None
        os.close(lock)
        folders.append(grid.folder / "runs" / trial.name)
    assert comparable(folders[0]) == comparable(folders[1])
    weights = [folder / "adapter" / "adapter_model.safetensors" for folder in folders]
    assert weights[0].read_bytes() == weights[1].read_bytes()
