"""Searches: exactly N trials whoever runs them, every one on held-out data, and clear about what cannot be."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from aroma.errors import ConfigError, DataError
from aroma_lab.grid.status import GridStatus, Silent
from aroma_lab.search.run import SearchOutcome, run_search
from aroma_lab.search.space import extremes, grid_points, read_space
from aroma_lab.search.spec import load_search, make_search
from aroma_lab.search.storage import open_storage, shown
from aroma_lab.search.study import join_study
from aroma_lab.search.tickets import ERROR, best_of, tickets_of
from aroma_lab.search.worker import SearchWorker
from aroma_lab.tasks.load import load_task
from aroma_lab.tasks.spec import TaskSpec
from fake_trial_worker import DIES, DIES_ONCE, FAILS, score_of
from search_files import (
    FAKE,
    RATES,
    output_of,
    runs_in,
    search_values,
    start_machine,
    trainable,
    use_fake_worker,
    write_search,
)

RATE = "training.learning_rate"
DECAY = "training.weight_decay"


@pytest.fixture
def log(tmp_path, monkeypatch) -> Path:
    """Where the stand-in for the trials' worker writes what it is given."""
    path = tmp_path / "log.txt"
    for key, value in use_fake_worker(dict(os.environ), path).items():
        monkeypatch.setenv(key, value)
    return path


def searched(output: Path, **changes) -> SearchOutcome:
    return run_search(make_search(search_values(output, **changes)), module=FAKE)


def scores(outcome: SearchOutcome) -> list[float | None]:
    return [ticket.last.value for ticket in outcome.tickets]


# The space


def test_every_kind_of_range_is_read():
    space = read_space(
        {
            RATE: {"low": 1e-4, "high": 1e-2, "log": True},
            DECAY: {"low": 0.1, "high": 0.4, "step": 0.1},
            "options.r": {"low": 2, "high": 6, "step": 2},
            "options.lora_alpha": {"choices": [1, 4]},
        }
    )
    points = extremes(space)
    assert {point[RATE] for point in points} == {1e-4, 1e-2}
    assert {point["options.r"] for point in points} == {2, 6}
    assert {point["options.lora_alpha"] for point in points} == {1, 4}


def test_a_grid_is_the_product_of_its_values_whatever_the_order_of_lines():
    ranges = {
        DECAY: {"low": 0.1, "high": 0.4, "step": 0.1},
        "options.r": {"low": 1, "high": 3},
        RATE: {"choices": RATES},
    }
    points = grid_points(read_space(ranges))
    assert len(points) == 4 * 3 * 3
    assert points == grid_points(read_space(dict(reversed(ranges.items()))))
    assert {point[DECAY] for point in points} == {0.1, 0.2, 0.3, 0.4}  # not 0.30000000000000004
    assert len({tuple(point.values()) for point in points}) == len(points)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (None, "space=None: give at least one dotted key"),
        ({}, "space={}: give at least one dotted key"),
        ({RATE: 1e-3}, f"space.{RATE}=0.001: write {{low: 1e-4"),
        ({RATE: {"low": 1e-3}}, "a range needs both low and high"),
        ({RATE: {"low": 1e-2, "high": 1e-3}}, f"space.{RATE}.low=0.01: it must be a number below high=0.001"),
        ({RATE: {"low": "much", "high": 1.0}}, f"space.{RATE}.low='much': give a number"),
        (
            {RATE: {"low": 0.0, "high": 1.0, "log": True}},
            f"space.{RATE}.low=0.0: only numbers above 0 have a logarithm; give a low above 0, or leave log out",
        ),
        (
            {"options.r": {"low": 0, "high": 8, "log": True}},
            "space.options.r.low=0: only numbers above 0 have a logarithm",
        ),
        ({"training": {"lr": 1}}, "space.training.lr=1: write {low: 1e-4"),
        ({"training": {"lr": {"low": 1.0, "high": 2.0}}}, "space.training.lr=1.0: a grid has no such key; the neare"),
        ({"training": None}, "space={'training': None}: give at least one dotted key"),
        ({RATE: {"low": 0.1, "high": 1.0, "log": True, "step": 0.1}}, "a logarithmic range has no steps"),
        ({RATE: {"low": 0.1, "high": 0.55, "step": 0.1}}, f"space.{RATE}.high=0.55: steps of 0.1 from 0.1 do not end"),
        ({RATE: {"low": 0.1, "high": 1.0, "steps": 0.1}}, f"the nearest is 'space.{RATE}.step'"),
        ({RATE: {"choices": []}}, f"space.{RATE}.choices=[]: give a list of at least one"),
        ({RATE: {"choices": [1e-3, 1e-3]}}, f"space.{RATE}.choices=0.001: it is there twice"),
        ({RATE: {"choices": [[1]]}}, f"space.{RATE}.choices=[1]: a choice is a number"),
        ({RATE: {"choices": [1], "log": True}}, "choices stand alone"),
        (
            {"training.learning_rat": {"choices": [1]}},
            f"space.training.learning_rat=1: a grid has no such key; the nearest is '{RATE}'",
        ),
        ({RATE: {"low": -1.0, "high": 1.0}}, f"{RATE}=-1.0: give a positive number"),
        ({"training.batch_size": {"low": 1.5, "high": 2.5}}, "space.training.batch_size=1.5: give a whole number"),
        ({"training.seed": {"choices": [0, 1]}}, "space.training.seed=0: seeds are given by"),
    ],
)
def test_a_space_that_cannot_be_is_one_clear_error(space, message, tmp_path):
    with pytest.raises(ConfigError) as raised:
        make_search({**search_values(tmp_path), "space": space})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"a": {}, "b": {}}}, "tasks=['a', 'b']: a search has one task"),
        ({"seeds": [0, 1]}, "seeds=[0, 1]: a search has one task, one method and one seed"),
        ({"trials": None}, "trials=None: say how many"),
        ({"trials": 0}, "trials=0: give 1 or more"),
        ({"heartbeat": 0}, "heartbeat=0: give 1 or more"),
        ({"sampler": "bayes"}, "sampler='bayes': give one of random, grid, tpe"),
        ({"study": "../other"}, "study='../other': it names folders"),
        (
            {"sampler": "grid"},
            f"space.{RATE}={{'low': 1e-05, 'high': 0.1, 'log': True}}: a grid needs choices or a step",
        ),
        (
            {"sampler": "grid", "space": {"options.r": {"low": 1, "high": 8, "log": True}}},
            "space.options.r={'low': 1, 'high': 8, 'log': True}: a grid needs choices or a step",
        ),
        (
            {"sampler": "grid", "space": {RATE: {"choices": RATES}}},
            "trials=4: sampler: grid tries each of the 3 points",
        ),
        ({"select": {"over": {}}}, "select={'over': {}}: only a grid has it; a search has space instead, as space: {"),
        ({"trails": 5}, "trails=5: a search has no such key; the nearest is 'trials'"),
    ],
    ids=str,
)
def test_a_search_file_that_cannot_be_is_one_clear_error(changes, message, tmp_path):
    with pytest.raises(ConfigError) as raised:
        make_search(search_values(tmp_path, **changes))
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_option_of_the_method_is_refused_before_anything_is_written(tmp_path):
    search = make_search(search_values(tmp_path / "out", space={"options.rr": {"choices": [1, 2]}}))
    with pytest.raises(ConfigError, match=r"methods\.lora-r8: .*rr"):
        run_search(search, module=FAKE)
    assert not (tmp_path / "out").exists()


def test_arguments_are_stronger_than_overrides_and_these_than_the_file(tmp_path):
    file = write_search(tmp_path / "search.yaml", search_values(tmp_path / "out"))
    search = load_search(file, ["trials=7", "training.max_steps=9"], storage="sqlite:///x.db", trials=8, workers=3)
    assert (search.trials, search.storage, search.grid.processes) == (8, "sqlite:///x.db", 3)
    assert search.grid.training.max_steps == 9
    plain = load_search(file)
    assert plain.storage == f"sqlite:///{tmp_path / 'out' / 'search.db'}"
    assert (plain.study, plain.sampler) == ("mine-lora-r8", "random")


def test_a_key_of_the_space_can_be_given_by_an_override(tmp_path):
    file = write_search(tmp_path / "search.yaml", search_values(tmp_path / "out"))
    search = load_search(file, [f"space.{RATE}.low=1e-4", f"space.{DECAY}={{choices: [0.0, 0.1]}}"])
    assert list(search.space) == [RATE, DECAY]
    assert search.space[RATE].low == 1e-4
    whole = make_search(search_values(tmp_path / "out", space=search.described))
    assert whole.identity() == search.identity(), "however it is written, it is the same search"
    assert set(search.described) == {RATE, DECAY}


def test_a_task_that_cannot_be_loaded_is_refused_before_anything_is_written(tmp_path):
    values = search_values(tmp_path / "out", model="minilm")
    with pytest.raises(DataError, match=r"^tasks\.mine\.train='absent\.jsonl'"):
        run_search(make_search(values))
    assert not (tmp_path / "out").exists()


def test_a_finished_search_needs_its_data_no_more(tmp_path, log):
    outcome = searched(tmp_path / "out", trials=2)
    assert scores(run_search(make_search(search_values(tmp_path / "out", trials=2)))) == scores(outcome)
    with pytest.raises(DataError, match=r"^tasks\.mine\.train"):
        run_search(make_search(search_values(tmp_path / "out", trials=3)))


# The storage


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "storage='nonsense': no database URL; write sqlite:///FILE or postgresql://"),
        ("oracel://host/db", "storage='oracel://host/db': no database URL"),
        (
            "postgresql://me:s3cret@127.0.0.1:1/db",
            "storage='postgresql://me:***@127.0.0.1:1/db': cannot be reached (",
        ),
        ("mysql+nodriver://me:s3cret@127.0.0.1/db", "no database URL"),
        (
            "mysql+pymysql://me:s3cret@127.0.0.1/db",
            "mysql+pymysql://me:***@127.0.0.1/db': its driver is missing (pymysql)",
        ),
    ],
)
def test_a_storage_that_cannot_be_is_one_clear_error_without_its_password(url, message):
    with pytest.raises(ConfigError) as raised:
        open_storage(url, heartbeat=20)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "s3cret" not in str(raised.value)


def test_a_file_that_is_no_database_is_one_clear_error(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, but long enough to be looked at as one\n" * 20)
    with pytest.raises(ConfigError, match=r"notes\.txt.*file is not a database"):
        open_storage(f"sqlite:///{tmp_path / 'notes.txt'}", heartbeat=20)


def test_a_password_is_not_shown():
    assert shown("postgresql://me:s3cret@host/db") == "postgresql://me:***@host/db"
    assert shown("nonsense") == "nonsense"


# Tickets


def frozen(number: int, state: TrialState, retries: list[int] | None = None, error: str | None = None) -> FrozenTrial:
    trial = create_trial(
        state=state,
        value=number / 10 if state is TrialState.COMPLETE else None,
        system_attrs={"retry_history": retries} if retries else {},
        user_attrs={ERROR: error} if error else {},
    )
    trial.number = number
    return trial


def test_what_waits_beyond_the_last_ticket_and_double_retries_do_not_count():
    trials = [
        frozen(0, TrialState.COMPLETE),
        frozen(1, TrialState.FAIL),
        frozen(2, TrialState.WAITING),  # put there by a second machine at the same moment
        frozen(3, TrialState.COMPLETE, retries=[1]),
        frozen(4, TrialState.WAITING, retries=[1]),  # likewise
    ]
    tickets = tickets_of(reversed(trials), count=2)
    assert [[attempt.number for attempt in ticket.attempts] for ticket in tickets] == [[0], [1, 3]]
    assert all(ticket.done for ticket in tickets)
    best = best_of(tickets)
    assert best is not None
    assert best.number == 1


def test_a_ticket_is_lost_only_until_it_was_tried_three_times():
    trials = [frozen(0, TrialState.FAIL), frozen(1, TrialState.FAIL, [0]), frozen(2, TrialState.FAIL, [0, 1])]
    assert [tickets_of(trials[:count], 1)[0].is_lost for count in (1, 2, 3)] == [True, True, False]
    assert tickets_of(trials, 1)[0].error == "its worker died, 3 times in a row"
    failed = tickets_of([frozen(0, TrialState.FAIL, error="bad data")], 1)[0]
    assert (failed.is_lost, failed.done, failed.error) == (False, True, "bad data")


def test_of_many_workers_that_claim_a_ticket_in_one_file_at_once_one_gets_it(tmp_path):
    search = make_search(search_values(tmp_path / "out", trials=15))
    workers = []
    for _ in range(4):
        storage = open_storage(search.storage, search.heartbeat)
        workers.append(SearchWorker(search, join_study(search, storage), storage))
    waiting = workers[0].study.get_trials()
    together = threading.Barrier(len(workers))

    def claims(worker: SearchWorker) -> list[bool]:
        got = []
        for trial in waiting:
            together.wait(timeout=30)
            got.append(worker._claim(trial))
        return got

    with ThreadPoolExecutor(len(workers)) as pool:
        claimed = list(pool.map(claims, workers))
    assert [sum(column) for column in zip(*claimed, strict=True)] == [1] * 15


# Whole searches, with a stand-in for the training


def test_a_search_runs_each_of_n_trials_once_and_reports_the_best(tmp_path, log):
    outcome = searched(tmp_path / "out", trials=6, processes=2)
    assert sorted(runs_in(log).items()) == [(f"search/mine-lora-r8/{n:04d}", 1) for n in range(6)]
    rates = [ticket.last.params[RATE] for ticket in outcome.tickets]
    assert len(set(rates)) == 6
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert scores(outcome) == pytest.approx([score_of(rate) for rate in rates])
    record = json.loads((tmp_path / "out" / "search.json").read_text())
    assert [entry["score"] for entry in record["tried"]] == scores(outcome)
    assert record["best"] == max(record["tried"], key=lambda entry: entry["score"])
    assert record["scored_on"] == "held_out"
    for entry in record["tried"]:
        trial = json.loads((tmp_path / "out" / entry["run"] / "trial.json").read_text())
        assert trial["purpose"] == "select"
        assert trial["training"]["learning_rate"] == entry["values"][RATE]


def test_random_points_depend_on_the_seed_alone(tmp_path, log):
    one = searched(tmp_path / "one", processes=1)
    two = searched(tmp_path / "two", processes=3)
    other = searched(tmp_path / "three", sampler_seed=1)
    assert scores(one) == scores(two)
    assert set(scores(one)).isdisjoint(scores(other))


def test_tpe_gives_each_trial_values_of_its_own(tmp_path, log):
    outcome = searched(tmp_path / "out", sampler="tpe", trials=14, processes=3)
    assert len({ticket.last.params[RATE] for ticket in outcome.tickets}) == 14


def test_a_finished_search_runs_nothing_and_more_trials_run_only_what_is_new(tmp_path, log, monkeypatch):
    monkeypatch.setattr("aroma_lab.search.worker._IDLE_SECONDS", 0.5)
    first = searched(tmp_path / "out", trials=2)
    again = searched(tmp_path / "out", trials=2)
    assert scores(again) == scores(first)
    more = searched(tmp_path / "out", trials=3)
    assert scores(more)[:2] == scores(first)
    assert list(runs_in(log).values()) == [1, 1, 1]


def test_two_processes_on_one_file_try_every_point_of_a_grid_once(tmp_path, log):
    space = {RATE: {"choices": RATES}, DECAY: {"choices": [0.0, 0.01, 0.02]}}
    values = search_values(tmp_path / "out", sampler="grid", trials=None, space=space)
    file = write_search(tmp_path / "search.yaml", values)
    machines = [start_machine(file, log, seconds=0.1) for _ in range(2)]
    assert [output_of(machine) for machine in machines] == ["", ""]
    assert [machine.returncode for machine in machines] == [0, 0]
    assert sorted(runs_in(log).values()) == [1] * 9
    tried = json.loads((tmp_path / "out" / "search.json").read_text())["tried"]
    assert sorted((entry["values"][RATE], entry["values"][DECAY]) for entry in tried) == [
        (rate, decay) for rate in RATES for decay in (0.0, 0.01, 0.02)
    ]


def test_a_failed_run_is_a_failed_trial_with_its_message_and_stops_nothing(tmp_path, log):
    space = {RATE: {"choices": RATES}, DECAY: {"choices": [0.0, FAILS]}}
    outcome = searched(tmp_path / "out", sampler="grid", trials=None, space=space)
    assert len(outcome.failed) == 3
    for ticket in outcome.failed:
        assert ticket.last.state is TrialState.FAIL
        assert ticket.last.user_attrs[ERROR].startswith("DataError: no such column (")
        assert Path(ticket.last.user_attrs[ERROR].partition("(")[2].rstrip(")")).exists()
        assert len(ticket.attempts) == 1
    assert outcome.best is not None
    assert outcome.best.last.value == 1.0
    assert list(runs_in(log).values()) == [1] * 6


def test_a_trial_whose_process_is_killed_is_tried_again_but_not_for_ever(tmp_path, log):
    space = {RATE: {"choices": [1e-3]}, DECAY: {"choices": [DIES, DIES_ONCE]}}
    outcome = searched(tmp_path / "out", sampler="grid", trials=None, space=space)
    by_decay = {ticket.last.params[DECAY]: ticket for ticket in outcome.tickets}
    assert len(by_decay[DIES_ONCE].attempts) == 2
    assert by_decay[DIES_ONCE].last.value == 1.0
    assert len(by_decay[DIES].attempts) == 3
    assert by_decay[DIES].error == "its worker died, 3 times in a row"
    assert sorted(runs_in(log).values()) == [2, 3]


def test_the_trial_of_a_worker_that_gives_no_sign_of_life_is_failed_and_tried_again(tmp_path, log):
    search = make_search(search_values(tmp_path / "out", trials=2))
    storage = open_storage(search.storage, search.heartbeat)
    study = join_study(search, storage)
    taken = study.get_trials()[0]
    storage.record_heartbeat(taken._trial_id)
    assert storage.set_trial_state_values(taken._trial_id, TrialState.RUNNING)
    outcome = run_search(search, module=FAKE)
    assert [[attempt.state for attempt in ticket.attempts] for ticket in outcome.tickets] == [
        [TrialState.FAIL, TrialState.COMPLETE],
        [TrialState.COMPLETE],
    ]
    assert list(runs_in(log).values()) == [1, 1]


def test_tickets_and_retries_that_a_kill_left_out_are_put_back(tmp_path, log, monkeypatch):
    monkeypatch.setattr("aroma_lab.search.worker._IDLE_SECONDS", 0.5)
    search = make_search(search_values(tmp_path / "out", trials=3))
    storage = open_storage(search.storage, search.heartbeat)
    study = join_study(search, storage)
    lost = study.get_trials()[0]
    storage.set_trial_state_values(lost._trial_id, TrialState.FAIL)  # failed as dead, but not queued again
    outcome = run_search(make_search(search_values(tmp_path / "out", trials=4)), module=FAKE)
    assert [len(ticket.attempts) for ticket in outcome.tickets] == [2, 1, 1, 1]
    assert None not in scores(outcome)


def test_an_interrupt_hands_back_what_was_running(tmp_path, log, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "60")
    search = make_search(search_values(tmp_path / "out", trials=3, processes=2))

    class Interrupts(Silent):
        def on_status(self, status: GridStatus) -> None:
            if len(runs_in(log)) == 2:
                raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_search(search, Interrupts(), module=FAKE)
    assert time.monotonic() - began < 30, "the trials were not waited for"
    storage = open_storage(search.storage, search.heartbeat)
    waiting = join_study(search, storage).get_trials()
    assert [trial.state for trial in waiting] == [TrialState.WAITING] * 3
    begun = [trial.params[RATE] for trial in waiting[:2]]
    monkeypatch.setenv("FAKE_SECONDS", "0")
    outcome = run_search(search, module=FAKE)
    assert [ticket.last.params[RATE] for ticket in outcome.tickets[:2]] == begun
    assert [len(ticket.attempts) for ticket in outcome.tickets] == [1, 1, 1]


def test_a_result_that_was_not_told_to_the_study_is_not_computed_again(tmp_path, log):
    outcome = searched(tmp_path / "out", trials=2)
    for file in ("search.db", "search.json"):
        (tmp_path / "out" / file).unlink()
    again = searched(tmp_path / "out", trials=2)
    assert scores(again) == scores(outcome)
    assert list(runs_in(log).values()) == [1, 1]


# Machines that do not agree


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"training": {"max_steps": 21}}, "training.max_steps"),
        ({"sampler_seed": 5}, "sampler_seed"),
        ({"methods": {"lora-r8": {"kind": "lora", "r": 4}}}, "methods.lora-r8.r"),
        ({"space": {RATE: {"low": 1e-5, "high": 1e-2, "log": True}}}, f"space.{RATE}.high"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_search_file_for_one_study_is_refused(changes, key, tmp_path, log):
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    searched(tmp_path / "one", trials=1, storage=storage)
    with pytest.raises(ConfigError) as raised:
        searched(tmp_path / "two", trials=1, storage=storage, **changes)
    assert f"searches something else, which differs in {key};" in str(raised.value)
    assert not (tmp_path / "two" / "runs").exists()
    assert sum(runs_in(log).values()) == 1


def test_where_a_machine_writes_and_how_many_processes_it_has_is_its_own_affair(tmp_path, log):
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    one = searched(tmp_path / "one", trials=1, storage=storage)
    two = searched(tmp_path / "two", trials=1, storage=storage, processes=3, heartbeat=2)
    assert scores(one) == scores(two)


def test_an_output_that_holds_another_searchs_trials_is_refused(tmp_path, log):
    searched(tmp_path / "out", trials=1)
    with pytest.raises(ConfigError, match=r"search\.json there is of study 'mine-lora-r8'"):
        searched(tmp_path / "out", trials=1, study="other")
    for file in ("search.db", "search.json"):
        (tmp_path / "out" / file).unlink()
    with pytest.raises(ConfigError, match=r"0000 \(training\.learning_rate\)"):
        searched(tmp_path / "out", trials=1, sampler_seed=1)
    search = make_search(search_values(tmp_path / "out", trials=1, sampler_seed=1))
    study = join_study(search, open_storage(search.storage, search.heartbeat))
    assert [trial.state for trial in study.get_trials()] == [TrialState.WAITING]


# With the real training


def test_the_command_trains_for_real_and_never_opens_what_is_reported(tmp_path, capsys):
    from aroma.cli import main

    values = search_values(tmp_path / "out", **trainable(tmp_path, rates=[1e-6, 5e-2]))
    with pytest.raises(DataError, match=r"test\.jsonl"):
        load_task(TaskSpec(name="mine", **values["tasks"]["mine"]))
    file = write_search(tmp_path / "search.yaml", values)
    assert main(["lab", "search", str(file), "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "search.json").read_text())
    assert f"best, with {record['best']['score']:.4f} on held-out examples: {RATE}=" in printed
    for entry in record["tried"]:
        result = json.loads((tmp_path / "out" / entry["run"] / "result.json").read_text())
        assert result["score"] == entry["score"]
        assert result["reported"] == {}
        assert result["examples"] == {"train": 60, "held_out": 20}
    assert record["best"]["values"] == {RATE: 5e-2}
