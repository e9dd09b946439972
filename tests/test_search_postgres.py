"""Studies shared over a real PostgreSQL server by processes that stand for machines."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from postgres import PASSWORD, Server, private_server
from study_files import (
    RATE,
    RATES,
    comparable,
    output_of,
    real_grid,
    run_undisturbed,
    runs_in,
    search_values,
    start_command,
    start_machine,
    wait_for_checkpoint,
    wait_until,
    write_yaml,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with private_server() as running:
        yield running


@pytest.fixture
def storage(server, request) -> str:
    """An empty database of the test's own."""
    return server.new_database(request.node.name[:60])


@pytest.fixture
def log(tmp_path) -> Path:
    """Where stand-ins write the names of their trials."""
    return tmp_path / "log.txt"


def files_of_machines(tmp_path: Path, count: int, **changes) -> list[Path]:
    """Write one search file a machine, each with a folder of its own."""
    folders = [tmp_path / f"machine-{n}" for n in range(count)]
    return [write_yaml(folder.with_suffix(".yaml"), search_values(folder, **changes)) for folder in folders]


def tried(tmp_path: Path, machine: int = 0) -> list[dict]:
    """Return what a machine says was tried, wherever it ran."""
    return json.loads((tmp_path / f"machine-{machine}" / "search.json").read_text())["tried"]


def test_three_machines_try_every_point_of_a_grid_once(tmp_path, storage, log):
    space = {RATE: {"choices": RATES}, "options.r": {"low": 1, "high": 4}}
    files = files_of_machines(tmp_path, 3, storage=storage, sampler="grid", trials=None, space=space)
    # At the same moment, on a database without tables.
    roles = ("run", "run", "work")
    machines = [start_machine(file, log, seconds=0.3, role=role) for file, role in zip(files, roles, strict=True)]
    assert [output_of(machine) for machine in machines[:2]] == ["", ""]
    assert output_of(machines[2]).strip().isdigit()
    assert sorted(runs_in(log).items()) == [(f"search/mine-lora-r8/{n:04d}", 1) for n in range(12)]
    points = [(entry["values"]["options.r"], entry["values"][RATE]) for entry in tried(tmp_path)]
    assert sorted(points) == [(r, rate) for r in (1, 2, 3, 4) for rate in RATES]
    assert tried(tmp_path, 0) == tried(tmp_path, 1)
    assert sum(any((tmp_path / f"machine-{n}" / "runs").rglob("result.json")) for n in range(3)) > 1, "they shared"
    assert PASSWORD not in (tmp_path / "machine-0" / "search.json").read_text()


def test_the_trials_of_a_killed_machine_are_failed_and_tried_again_by_another(tmp_path, storage, log):
    doomed, survivor = files_of_machines(tmp_path, 2, storage=storage, trials=4, processes=2)
    machine = start_machine(doomed, log, seconds=300)
    trial_files = (tmp_path / "machine-0").rglob
    wait_until(lambda: len(runs_in(log)) == len([*trial_files("environment.json")]) == 2)
    trials = [json.loads(file.read_text())["pid"] for file in trial_files("environment.json")]
    machine.kill()
    machine.wait()
    assert output_of(start_machine(survivor, log)) == ""
    assert sorted(runs_in(log).values()) == [1, 1, 2, 2]
    entries = tried(tmp_path, machine=1)
    assert [entry["attempts"] for entry in entries] == [2, 2, 1, 1]
    assert all(entry["score"] is not None for entry in entries)
    assert not any(Path(f"/proc/{trial}").exists() for trial in trials)


def test_a_machine_that_was_held_up_gives_its_trial_up(tmp_path, storage, log):
    held_up, other = files_of_machines(tmp_path, 2, storage=storage, trials=1)
    machine = start_machine(held_up, log, seconds=20)
    wait_until(lambda: runs_in(log))
    machine.send_signal(signal.SIGSTOP)
    assert output_of(start_machine(other, log)) == ""
    machine.send_signal(signal.SIGCONT)
    assert output_of(machine) == ""
    assert not list((tmp_path / "machine-0" / "runs").rglob("result.json")), "it was stopped, not waited for"
    assert tried(tmp_path, 0) == tried(tmp_path, 1)
    assert tried(tmp_path)[0]["attempts"] == 2


def test_a_wrong_password_and_a_missing_database_are_clear_errors(tmp_path, server, log):
    for url, message in (
        (server.url("postgres").replace(PASSWORD, "wr0ng"), "password authentication failed"),
        (server.url("absent"), 'database "absent" does not exist'),
    ):
        (file,) = files_of_machines(tmp_path, 1, storage=url)
        printed = output_of(start_machine(file, log))
        assert printed.startswith("error: storage=")
        assert message in printed
        assert printed.count("\n") == 1
        assert PASSWORD not in printed


def test_a_server_that_restarts_is_waited_for_and_one_that_stays_away_is_an_error(tmp_path, server, storage, log):
    (file,) = files_of_machines(tmp_path, 1, storage=storage, trials=2, heartbeat=5)
    machine = start_machine(file, log, seconds=8)
    wait_until(lambda: runs_in(log))
    server.stop()
    time.sleep(3)
    server.start()
    assert output_of(machine) == ""
    assert list(runs_in(log).values()) == [1, 1]

    log.unlink()
    (file,) = files_of_machines(tmp_path / "machine-0", 1, storage=storage, trials=1, study="long")
    machine = start_machine(file, log, seconds=300)
    wait_until(lambda: runs_in(log))
    server.stop()
    try:
        printed = output_of(machine)
    finally:
        server.start()
    assert printed.startswith("error: storage='postgresql://aroma:***@127.0.0.1")
    assert "cannot be reached (" in printed
    assert "nothing finished is lost" in printed


def test_a_worker_takes_up_real_trials_of_a_killed_command_and_they_end_bit_equal(tmp_path, storage):
    whole, said = run_undisturbed(real_grid(tmp_path, "whole")), tmp_path / "said.log"
    shared = {"storage": storage, "study": "shared", "heartbeat": 2}
    doomed = start_command("run", str(real_grid(tmp_path, "doomed", **shared)), said=said)
    wait_for_checkpoint(tmp_path / "doomed" / "runs" / "words" / "lora" / "seed-0", doomed, said)
    doomed.kill()
    doomed.wait(60)
    helper = real_grid(tmp_path, "helper", **shared)
    assert start_command("worker", str(helper), "--idle", "5", said=said).wait(300) == 0, said.read_text()
    assert "Trials that ended here: 2." in said.read_text()
    for trial in ("words/lora/seed-0", "words/aroma/seed-0"):
        assert comparable(tmp_path / "helper" / "runs" / trial) == comparable(whole / trial)
    # The first command, run again, finds that nothing is left.
    assert start_command("run", str(tmp_path / "doomed.yaml"), said=said).wait(300) == 0
    assert "0 now, 2 earlier; failed: 0" in said.read_text()
