"""Searches shared over a real PostgreSQL server by processes that stand for machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from postgres import PASSWORD, Server, private_server
from search_files import RATES, output_of, runs_in, search_values, start_machine, trainable, wait_until, write_search

pytestmark = pytest.mark.slow

RATE = "training.learning_rate"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with private_server() as running:
        yield running


@pytest.fixture
def storage(server, request) -> str:
    """An empty database of the test's own."""
    url: str = server.new_database(request.node.name[:60])
    return url


def files_of_machines(tmp_path: Path, count: int, **changes) -> list[Path]:
    """Write one search file a machine, each with a folder of its own."""
    return [
        write_search(tmp_path / f"machine-{n}.yaml", search_values(tmp_path / f"machine-{n}", **changes))
        for n in range(count)
    ]


def tried(tmp_path: Path, machine: int = 0) -> list[dict[str, object]]:
    """Return what a machine says was tried, wherever it ran."""
    content = json.loads((tmp_path / f"machine-{machine}" / "search.json").read_text())
    entries: list[dict[str, object]] = content["tried"]
    return entries


def test_two_machines_try_every_point_of_a_grid_once(tmp_path, storage):
    log = tmp_path / "log.txt"
    space = {RATE: {"choices": RATES}, "options.r": {"low": 1, "high": 4}}
    files = files_of_machines(tmp_path, 2, storage=storage, sampler="grid", trials=None, space=space)
    # At the same moment, on a database without tables.
    machines = [start_machine(file, log, seconds=0.3) for file in files]
    assert [output_of(machine) for machine in machines] == ["", ""]
    assert [machine.returncode for machine in machines] == [0, 0]
    assert sorted(runs_in(log).items()) == [(f"search/mine-lora-r8/{n:04d}", 1) for n in range(12)]
    points = [(entry["values"]["options.r"], entry["values"][RATE]) for entry in tried(tmp_path)]
    assert sorted(points) == [(r, rate) for r in (1, 2, 3, 4) for rate in RATES]
    assert tried(tmp_path, 0) == tried(tmp_path, 1)
    assert all(any((tmp_path / f"machine-{n}" / "runs").rglob("result.json")) for n in range(2)), "both took part"
    assert PASSWORD not in (tmp_path / "machine-0" / "search.json").read_text()


def test_there_are_exactly_n_trials_over_four_workers_of_two_machines(tmp_path, storage):
    log = tmp_path / "log.txt"
    files = files_of_machines(tmp_path, 2, storage=storage, trials=17, processes=2)
    machines = [start_machine(file, log) for file in files]
    assert [output_of(machine) for machine in machines] == ["", ""]
    assert list(runs_in(log).values()) == [1] * 17
    assert len(tried(tmp_path)) == 17
    assert len({entry["values"][RATE] for entry in tried(tmp_path)}) == 17


def test_the_trials_of_a_killed_machine_are_failed_and_tried_again_by_another(tmp_path, storage):
    log = tmp_path / "log.txt"
    doomed, survivor = files_of_machines(tmp_path, 2, storage=storage, trials=4, processes=2)
    machine = start_machine(doomed, log, seconds=300)
    wait_until(lambda: len(runs_in(log)) == 2)
    machine.send_signal(signal.SIGKILL)
    machine.wait()
    other = start_machine(survivor, log)
    assert output_of(other) == ""
    assert sorted(runs_in(log).values()) == [1, 1, 2, 2]
    entries = tried(tmp_path, machine=1)
    assert [entry["attempts"] for entry in entries] == [2, 2, 1, 1]
    assert all(entry["score"] is not None for entry in entries)
    wait_until(
        lambda: "fake_trial_worker" not in subprocess.check_output(["ps", "-eo", "args"], text=True), seconds=10
    )


def test_a_machine_that_was_held_up_gives_its_trial_up(tmp_path, storage):
    log = tmp_path / "log.txt"
    held_up, other = files_of_machines(tmp_path, 2, storage=storage, trials=1)
    machine = start_machine(held_up, log, seconds=20)
    wait_until(lambda: runs_in(log))
    machine.send_signal(signal.SIGSTOP)
    second = start_machine(other, log)
    assert output_of(second) == ""
    machine.send_signal(signal.SIGCONT)
    assert output_of(machine) == ""
    assert not list((tmp_path / "machine-0" / "runs").rglob("result.json")), "it was stopped, not waited for"
    assert tried(tmp_path, 0) == tried(tmp_path, 1)
    assert tried(tmp_path)[0]["attempts"] == 2


def test_another_search_file_for_the_study_is_refused(tmp_path, storage):
    log = tmp_path / "log.txt"
    (first,) = files_of_machines(tmp_path, 1, storage=storage, trials=1)
    assert output_of(start_machine(first, log)) == ""
    values = search_values(tmp_path / "other", storage=storage, trials=1, training={"max_steps": 30})
    refused = output_of(start_machine(write_search(tmp_path / "other.yaml", values), log))
    assert refused.startswith("error: study='mine-lora-r8': the study of that name searches something else")
    assert "training.max_steps" in refused
    assert PASSWORD not in refused


def test_a_wrong_password_and_a_missing_database_are_clear_errors(tmp_path, server):
    for url, reason in (
        (server.url("postgres").replace(PASSWORD, "wr0ng"), "password authentication failed"),
        (server.url("absent"), 'database "absent" does not exist'),
    ):
        (file,) = files_of_machines(tmp_path, 1, storage=url, trials=1)
        printed = output_of(start_machine(file, tmp_path / "log.txt"))
        assert printed.startswith("error: storage='postgresql://aroma:***@127.0.0.1")
        assert reason in printed
        assert printed.count("\n") == 1
        assert PASSWORD not in printed


def test_a_server_that_restarts_is_waited_for_and_one_that_stays_away_is_an_error(tmp_path, server, storage):
    log = tmp_path / "log.txt"
    (file,) = files_of_machines(tmp_path, 1, storage=storage, trials=2, heartbeat=5)
    machine = start_machine(file, log, seconds=8)
    wait_until(lambda: runs_in(log))
    server.stop()
    time.sleep(3)
    server.start()
    assert output_of(machine) == ""
    assert list(runs_in(log).values()) == [1, 1]

    values = search_values(tmp_path / "long", storage=storage, trials=1, study="long")
    log.unlink()
    machine = start_machine(write_search(tmp_path / "long.yaml", values), log, seconds=300)
    wait_until(lambda: runs_in(log))
    server.stop()
    try:
        printed = output_of(machine)
    finally:
        server.start()
    assert printed.startswith("error: storage='postgresql://aroma:***@127.0.0.1")
    assert "lost (" in printed
    assert "nothing finished is lost" in printed


def test_two_commands_share_a_study_of_real_trainings(tmp_path, storage):
    files = files_of_machines(tmp_path, 2, storage=storage, **trainable(tmp_path, rates=[1e-6, 1e-3, 1e-2, 5e-2]))
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "aroma.cli", "lab", "search", str(file)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for file in files
    ]
    printed = [command.communicate(timeout=300)[0] for command in commands]
    assert [command.returncode for command in commands] == [0, 0], printed
    results = [list((tmp_path / f"machine-{n}" / "runs").rglob("result.json")) for n in range(2)]
    assert len(results[0]) + len(results[1]) == 4
    assert min(map(len, results)) >= 1, "both took part"
    assert tried(tmp_path, 0) == tried(tmp_path, 1)
    assert all("4 trials finished, 0 failed" in text for text in printed)
