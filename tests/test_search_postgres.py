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
    runs_in,
    search_values,
    start_command,
    start_machine,
    trainable,
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
    url: str = server.new_database(request.node.name[:60])
    return url


def files_of_machines(tmp_path: Path, count: int, **changes) -> list[Path]:
    """Write one search file a machine, each with a folder of its own."""
    return [
        write_yaml(tmp_path / f"machine-{n}.yaml", search_values(tmp_path / f"machine-{n}", **changes))
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


def test_there_are_exactly_n_trials_over_workers_of_three_machines(tmp_path, storage):
    log = tmp_path / "log.txt"
    files = files_of_machines(tmp_path, 3, storage=storage, trials=17, processes=2)
    machines = [start_machine(file, log, role=role) for file, role in zip(files, ("run", "run", "work"), strict=True)]
    assert [output_of(machine) for machine in machines[:2]] == ["", ""]
    assert output_of(machines[2]).strip().isdigit()
    assert list(runs_in(log).values()) == [1] * 17
    assert len(tried(tmp_path)) == 17
    assert len({entry["values"][RATE] for entry in tried(tmp_path)}) == 17


def test_the_trials_of_a_killed_machine_are_failed_and_tried_again_by_another(tmp_path, storage):
    log = tmp_path / "log.txt"
    doomed, survivor = files_of_machines(tmp_path, 2, storage=storage, trials=4, processes=2)
    machine = start_machine(doomed, log, seconds=300)
    wait_until(lambda: len(runs_in(log)) == 2)
    trials = [json.loads(file.read_text())["pid"] for file in (tmp_path / "machine-0").rglob("environment.json")]
    machine.send_signal(signal.SIGKILL)
    machine.wait()
    other = start_machine(survivor, log)
    assert output_of(other) == ""
    assert sorted(runs_in(log).values()) == [1, 1, 2, 2]
    entries = tried(tmp_path, machine=1)
    assert [entry["attempts"] for entry in entries] == [2, 2, 1, 1]
    assert all(entry["score"] is not None for entry in entries)
    assert trials
    assert not any(Path(f"/proc/{trial}").exists() for trial in trials)


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


def test_another_file_a_wrong_password_and_a_missing_database_are_clear_errors(tmp_path, server, storage):
    log = tmp_path / "log.txt"
    (first,) = files_of_machines(tmp_path, 1, storage=storage, trials=1)
    assert output_of(start_machine(first, log)) == ""
    for changes, message in (
        ({"storage": storage, "training": {"max_steps": 30}}, "was run with another training.max_steps; use the same"),
        ({"storage": server.url("postgres").replace(PASSWORD, "wr0ng")}, "password authentication failed"),
        ({"storage": server.url("absent")}, 'database "absent" does not exist'),
    ):
        file = write_yaml(tmp_path / "other.yaml", search_values(tmp_path / "other", trials=1, **changes))
        printed = output_of(start_machine(file, log))
        assert printed.startswith("error: st")
        assert message in printed
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
    machine = start_machine(write_yaml(tmp_path / "long.yaml", values), log, seconds=300)
    wait_until(lambda: runs_in(log))
    server.stop()
    try:
        printed = output_of(machine)
    finally:
        server.start()
    assert printed.startswith("error: storage='postgresql://aroma:***@127.0.0.1")
    assert "cannot be reached (" in printed
    assert "nothing finished is lost" in printed


def test_two_commands_share_a_study_of_real_trainings(tmp_path, storage):
    files = files_of_machines(tmp_path, 2, storage=storage, **trainable(tmp_path, rates=[1e-6, 1e-3, 1e-2, 5e-2]))
    said = [tmp_path / "0.log", tmp_path / "1.log"]
    commands = [start_command("search", str(file), said=log) for file, log in zip(files, said, strict=True)]
    assert [command.wait(300) for command in commands] == [0, 0], [log.read_text() for log in said]
    results = [list((tmp_path / f"machine-{n}" / "runs").rglob("result.json")) for n in range(2)]
    assert len(results[0]) + len(results[1]) == 4
    assert min(map(len, results)) >= 1, "both took part"
    assert tried(tmp_path, 0) == tried(tmp_path, 1)
    assert all("4 trials finished, 0 failed" in log.read_text() for log in said)


def test_a_worker_takes_up_real_trials_of_a_killed_command_and_they_end_bit_equal(tmp_path, storage):
    whole, said = real_grid(tmp_path, "whole"), tmp_path / "said.log"
    assert start_command("run", str(whole), said=said).wait(300) == 0, said.read_text()
    shared = {"storage": storage, "study": "shared", "heartbeat": 2}
    doomed = start_command("run", str(real_grid(tmp_path, "doomed", **shared)), said=said)
    wait_for_checkpoint(tmp_path / "doomed" / "runs" / "words" / "lora" / "seed-0", doomed, said)
    doomed.kill()
    doomed.wait(60)
    helper = real_grid(tmp_path, "helper", **shared)
    assert start_command("worker", str(helper), "--idle", "5", said=said).wait(300) == 0, said.read_text()
    assert "Trials that ended here: 2." in said.read_text()
    for trial in ("words/lora/seed-0", "words/aroma/seed-0"):
        assert comparable(tmp_path / "helper" / "runs" / trial) == comparable(tmp_path / "whole" / "runs" / trial)
    # The first command, run again, finds that nothing is left.
    assert start_command("run", str(tmp_path / "doomed.yaml"), said=said).wait(300) == 0
    assert "0 now, 2 earlier; failed: 0" in said.read_text()
