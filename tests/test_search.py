"""Searches: exactly N trials whoever runs them, every one on held-out data, and clear about what cannot work."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import OperationalError

from aroma.errors import ConfigError, DataError
from aroma_lab.study.engine import Engine
from aroma_lab.study.grid import KEY, NAME, make_grid, read_grid_file
from aroma_lab.study.run import serve
from aroma_lab.study.search import Search, SearchOutcome, run_search
from aroma_lab.study.status import ERROR, scheduled_in
from aroma_lab.study.storage import open_storage, without_password
from fake_trial import score_of
from quick import slow_but
from study_files import (
    DECAY,
    FAKE,
    RATE,
    RATES,
    environment,
    output_of,
    real_grid,
    runs_in,
    search_values,
    start_machine,
    write_yaml,
)

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

EVERY_STORAGE = pytest.mark.parametrize("kind", ["journal", "sqlite"])


@pytest.fixture
def log(tmp_path, monkeypatch) -> Path:
    """Where stand-ins write the names of their trials."""
    path = tmp_path / "log.txt"
    for key, value in environment(path).items():
        monkeypatch.setenv(key, value)
    return path


make_search = partial(make_grid, kind=Search)


def searched(output: Path, **changes) -> SearchOutcome:
    return run_search(make_search(search_values(output, **changes)), module=FAKE)


def scores(outcome: SearchOutcome) -> list[float | None]:
    return [one.score for one in outcome.trials]


def storage_of(kind: str, tmp_path: Path) -> str | None:
    return f"sqlite:///{tmp_path / 'study.db'}" if kind == "sqlite" else None


def enqueued(search) -> Engine:
    """Return an engine in whose study the trials of the search wait."""
    engine = Engine(search)
    engine._enqueue({attributes[KEY]: attributes for attributes in search.scheduled()})
    return engine


# What a file says ---------------------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_values_whatever_the_order_of_lines(tmp_path):
    ranges = {
        DECAY: {"low": 0.1, "high": 0.4, "step": 0.1},
        "options.r": {"low": 2, "high": 6, "step": 2},
        RATE: {"choices": RATES},
    }

    def searching(space):
        return make_search(search_values(tmp_path, space=space, sampler="grid", trials=None))

    points = searching(ranges).points
    assert len({tuple(point.values()) for point in points}) == len(points) == 4 * 3 * 3
    assert points == searching(dict(reversed(ranges.items()))).points
    assert {point[DECAY] for point in points} == {0.1, 0.2, 0.3, 0.4}  # not 0.30000000000000004
    ends = searching(ranges).extreme_trials()
    assert {trial.options["r"] for trial in ends} == {2, 6}
    assert {trial.training.learning_rate for trial in ends} == set(RATES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "space={}: give at least one dotted key"),
        ({"space": {"training": None}}, "space={}: give at least one dotted key"),
        ({"space": {RATE: 1e-3}}, f"space.{RATE}=0.001: write {{low: 1e-4"),
        ({"space": {RATE: {"low": 1e-3}}}, f"space.{RATE}={{'low': 0.001}}: "),
        (
            {"space": {RATE: {"low": 1e-2, "high": 1e-3}}},
            f"space.{RATE}={{'low': 0.01, 'high': 0.001}}: `low <= high`",
        ),
        ({"space": {RATE: {"low": "much", "high": 1.0}}}, f"space.{RATE}={{'low': 'much', 'high': 1.0}}: "),
        ({"space": {"options.r": {"low": 0, "high": 8, "log": True}}}, "space.options.r={'low': 0, 'high': 8"),
        ({"space": {RATE: {"low": 0.1, "high": 0.55, "step": 0.1}}}, f"space.{RATE}={{'low': 0.1, 'high': 0.55"),
        ({"space": {RATE: {"low": 0.1, "high": 1.0, "steps": 0.1}}}, "unexpected keyword argument 'steps'"),
        ({"space": {RATE: {"choices": []}}}, f"space.{RATE}={{'choices': []}}: "),
        ({"space": {RATE: {"choices": [[1]]}}}, f"space.{RATE}={{'choices': [[1]]}}: "),
        ({"space": {"training.learning_rat": {"choices": [1]}}}, f"no such key; the nearest is 'space.{RATE}'"),
        ({"space": {RATE: {"low": -1.0, "high": 1.0}}}, f"{RATE}=-1.0: give a positive number"),
        ({"space": {"training.batch_size": {"low": 1.5, "high": 2.5}}}, "space.training.batch_size=1.5: give a whole"),
        ({"space": {"training.seed": {"choices": [0, 1]}}}, "space.training.seed=0: seeds are given by"),
        ({"tasks": {"a": {}, "b": {}}}, "tasks=['a', 'b']: a search has one task"),
        ({"seeds": [0, 1]}, "seeds=[0, 1]: a search has one task, one method and one seed"),
        ({"trials": None}, "trials=None: say how many"),
        ({"heartbeat": 0}, "heartbeat=0: give 1 or more"),
        ({"sampler": "bayes"}, "sampler='bayes': give one of random, grid, tpe"),
        ({"study": "../other"}, "study='../other': it names folders"),
        (
            {"sampler": "grid"},
            f"space.{RATE}=FloatDistribution(high=0.1, log=True, low=1e-05, step=None): a grid needs",
        ),
        (
            {"sampler": "grid", "space": {RATE: {"choices": RATES}}},
            "trials=4: sampler: grid tries each of the 3 points",
        ),
        ({"select": {"over": {"options.r": [1]}}}, "select={'options.r': [1]}: only a grid has it"),
        ({"trails": 5}, "trails=5: a search has no such key; the nearest is 'trials'"),
    ],
    ids=str,
)
def test_a_search_file_that_cannot_work_is_one_clear_error(changes, message, tmp_path):
    with pytest.raises(ConfigError) as raised:
        make_search(search_values(tmp_path, **changes))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_arguments_win_over_overrides_and_these_over_the_file_and_nest_the_space(tmp_path):
    file = write_yaml(tmp_path / "search.yaml", search_values(tmp_path / "out"))
    nested = [f"space.{RATE}.low=1e-4", f"space.{DECAY}={{choices: [0.0, 0.1]}}"]
    overrides = ["trials=7", "training.max_steps=9", *nested]
    search = make_search(read_grid_file(file, overrides, storage="sqlite:///x.db", trials=8, processes=3))
    assert (search.trials, search.storage, search.processes, search.training.max_steps) == (8, "sqlite:///x.db", 3, 9)
    assert list(search.space) == [RATE, DECAY]
    assert search.space[RATE]["low"] == 1e-4
    same = make_search(read_grid_file(file, [overrides[1]], space=search.space))
    assert same.searched() == search.searched(), "however it is written, it is the same search"
    assert (same.study_name, same.sampler, same.storage) == ("mine-lora-r8", "random", None)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "storage='nonsense': not a database URL; write sqlite:///FILE or postgresql://"),
        ("oracel://host/db", "storage='oracel://host/db': not a database URL"),
        ("postgresql://me:s3cret@127.0.0.1:1/db", "storage='postgresql://me:***@127.0.0.1:1/db': cannot be reached ("),
        ("mysql+pymysql://me:s3cret@127.0.0.1/db", "@127.0.0.1/db': its driver is missing (pymysql)"),
        ("sqlite:///FOLDER/study.journal", "study.journal': cannot be reached (file is not a database)"),
        (None, "study.journal there is not a study's journal"),
    ],
)
def test_a_storage_that_cannot_work_is_one_clear_error_without_its_password(url, message, tmp_path):
    (tmp_path / "study.journal").write_text("not a database, but long enough to be looked at as one\n" * 20)
    with pytest.raises(ConfigError) as raised:
        open_storage(url and url.replace("FOLDER", str(tmp_path)), tmp_path, heartbeat=20)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "s3cret" not in str(raised.value)
    assert "s3cret" not in without_password(url or "")


# What the study says ------------------------------------------------------------------------------------------------


def frozen(number: int, state: TrialState, retries: list[int] = (), error: str | None = None, key: str = "one"):
    trial: FrozenTrial = create_trial(
        state=state,
        value=number / 10 if state is TrialState.COMPLETE else None,
        system_attrs={"retry_history": retries} if retries else {},
        user_attrs={NAME: key, KEY: key, **({ERROR: error} if error else {})},
    )
    trial.number = number
    return trial


class Study:
    def __init__(self, *trials: FrozenTrial) -> None:
        self.trials = trials

    def get_trials(self, **_: object) -> list[FrozenTrial]:
        return [*reversed(self.trials)]


def test_attempts_that_two_machines_enqueued_at_once_count_once_and_a_lost_one_is_tried_three_times():
    study = Study(
        frozen(0, TrialState.FAIL),
        frozen(1, TrialState.WAITING, key="two"),
        frozen(2, TrialState.COMPLETE, retries=[0]),
        frozen(3, TrialState.WAITING, retries=[0]),
        frozen(4, TrialState.FAIL, error="bad data", key="two"),
    )
    one, two = scheduled_in(study).values()
    assert (one.score, one.tries, one.decided) == (0.2, 2, True)
    assert (two.error, two.decided) == ("bad data", True)
    trials = [frozen(0, TrialState.FAIL), frozen(1, TrialState.FAIL, [0]), frozen(2, TrialState.FAIL, [0, 1])]
    seen = [scheduled_in(Study(*trials[:count]))["one"] for count in (1, 2, 3)]
    assert [one.is_lost for one in seen] == [True, True, False]
    assert [one.error for one in seen] == [None, None, "its process or machine died, 3 times in a row"]


@EVERY_STORAGE
def test_of_many_machines_that_claim_a_trial_at_once_one_gets_it(tmp_path, kind):
    search = make_search(search_values(tmp_path / "out", trials=15, storage=storage_of(kind, tmp_path)))
    engines = [enqueued(search), *(Engine(search) for _ in range(3))]
    waiting = engines[0].study.get_trials()
    together = threading.Barrier(len(engines))

    def claims(engine: Engine) -> list[bool]:
        got = []
        for trial in waiting:
            together.wait(timeout=30)
            got.append(engine._claim(trial))
        return got

    with ThreadPoolExecutor(len(engines)) as pool:
        claimed = list(pool.map(claims, engines))
    assert [sum(column) for column in zip(*claimed, strict=True)] == [1] * 15


# Whole searches, with stand-ins for the trainings -------------------------------------------------------------------


def test_a_search_runs_each_of_n_trials_once_reports_the_best_and_more_trials_run_only_what_is_new(tmp_path, log):
    out = tmp_path / "out"
    outcome = searched(out, trials=4)
    assert sorted(runs_in(log).items()) == [(f"search/mine-lora-r8/{n:04d}", 1) for n in range(4)]
    rates = [one.attempt.params[RATE] for one in outcome.trials]
    assert len(set(rates)) == 4
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert scores(outcome) == [score_of(rate) for rate in rates]
    record = json.loads((out / "search.json").read_text())
    assert [entry["score"] for entry in record["tried"]] == scores(outcome)
    assert record["best"] == max(record["tried"], key=lambda entry: entry["score"])
    assert (record["scored_on"], record["task"], record["method"]) == ("held_out", "mine", "lora-r8")
    for entry in record["tried"]:
        trial = json.loads((out / entry["run"] / "trial.json").read_text())
        assert trial["purpose"] == "select"
        assert trial["training"]["learning_rate"] == entry["values"][RATE]

    values = search_values(out, model="minilm")
    assert scores(run_search(make_search(values))) == scores(outcome), "a finished search needs no data"
    with pytest.raises(DataError, match=r"^tasks\.mine\.train='absent\.jsonl'"):
        run_search(make_search({**values, "trials": 5}))
    more = searched(out, trials=5)
    assert scores(more)[:4] == scores(outcome)
    (out / "study.journal").unlink()
    assert scores(searched(out, trials=5)) == scores(more), "told by its results"
    assert list(runs_in(log).values()) == [1] * 5
    with pytest.raises(ConfigError, match=r"search\.json there is of study 'mine-lora-r8'"):
        searched(out, study="other")
    with pytest.raises(ConfigError, match="0000 was run with another sampler_seed"):
        searched(out, trials=1, sampler_seed=1)
    with pytest.raises(ConfigError, match=r"methods\.lora-r8: .*rr"):
        run_search(make_search(search_values(tmp_path / "bad", space={"options.rr": {"choices": [1, 2]}})))
    assert not (tmp_path / "bad").exists()


def test_random_points_depend_on_the_seed_alone_and_tpe_tries_no_place_twice(tmp_path, log):
    one = searched(tmp_path / "one", processes=1)
    two = searched(tmp_path / "two", processes=3, storage=storage_of("sqlite", tmp_path))
    other = searched(tmp_path / "three", sampler_seed=1)
    assert scores(one) == scores(two)
    assert set(scores(one)).isdisjoint(scores(other))
    outcome = searched(tmp_path / "tpe", sampler="tpe", trials=14, processes=3)
    assert len({one.attempt.params[RATE] for one in outcome.trials}) == 14


@pytest.mark.parametrize("kind", slow_but(["journal"], ["journal", "sqlite"]))
def test_two_processes_on_one_file_try_every_point_of_a_grid_once(tmp_path, log, kind):
    space = {RATE: {"choices": RATES}, DECAY: {"choices": [0.0, 0.01, 0.02]}}
    storage = storage_of(kind, tmp_path)
    values = search_values(tmp_path / "out", sampler="grid", trials=None, space=space, storage=storage)
    file = write_yaml(tmp_path / "search.yaml", values)
    machines = [start_machine(file, log, seconds=0.1) for _ in range(2)]
    assert [output_of(machine) for machine in machines] == ["", ""]
    assert sorted(runs_in(log).values()) == [1] * 9
    tried = json.loads((tmp_path / "out" / "search.json").read_text())["tried"]
    points = sorted((entry["values"][RATE], entry["values"][DECAY]) for entry in tried)
    assert points == [(rate, decay) for rate in RATES for decay in (0.0, 0.01, 0.02)]


def test_failed_and_killed_trials_stop_nothing_and_only_killed_ones_are_tried_again(tmp_path, log):
    space = {"options.fail": {"choices": [None, "raise", "kill", "kill once"]}}
    methods = {"x": {"kind": "x", "until": "absent"}}
    outcome = searched(tmp_path / "out", sampler="grid", trials=None, space=space, methods=methods)
    fine, failed, dead, revived = outcome.trials
    assert (fine.error, fine.tries) == (revived.error, revived.tries - 1) == (None, 1)
    assert (failed.error, failed.tries) == ("DataError: no such file", 1)
    assert (dead.error, dead.tries) == ("its process or machine died, 3 times in a row", 3)
    assert outcome.best == fine
    assert [runs_in(log)[one.name] for one in outcome.trials] == [1, 1, 3, 2]


@pytest.mark.slow
@EVERY_STORAGE
def test_the_trial_of_a_machine_that_died_is_taken_up_again(tmp_path, log, kind):
    storage = storage_of(kind, tmp_path)
    search = make_search(search_values(tmp_path / "out", trials=2, storage=storage))
    engine = enqueued(search)
    assert engine._claim(engine.study.get_trials()[0])
    outcome = run_search(search, module=FAKE)
    # A journal knows that the machine is gone; in a database, signs of life were missing.
    assert [one.tries for one in outcome.trials] == ([2, 1] if storage else [1, 1])
    assert list(runs_in(log).values()) == [1, 1]


def test_an_interrupt_hands_back_the_running_trials(tmp_path, log, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "60")
    search = make_search(search_values(tmp_path / "out", trials=3))

    def interrupt(_: object) -> None:
        if len(runs_in(log)) == 2:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_search(search, interrupt, module=FAKE)
    assert time.monotonic() - began < 30, "the trials were not waited for"
    study = optuna.load_study(study_name="mine-lora-r8", storage=open_storage(None, tmp_path / "out", 1))
    assert [trial.state for trial in study.get_trials()] == [TrialState.WAITING] * 3
    begun = [trial.params[RATE] for trial in study.get_trials()[:2]]
    monkeypatch.setenv("FAKE_SECONDS", "0")
    outcome = run_search(search, module=FAKE)
    assert [one.attempt.params[RATE] for one in outcome.trials[:2]] == begun
    assert [one.tries for one in outcome.trials] == [1, 1, 1]


def test_trials_withdrawn_by_an_edited_file_come_back_with_the_file(tmp_path, log):
    search = make_search(search_values(tmp_path / "out", trials=2))
    enqueued(search)
    edited = make_search(search_values(tmp_path / "out", trials=2, training={"max_steps": 30, "warmup_steps": 1}))
    with Engine(edited) as engine:
        engine._retire_others(edited.scheduled())
    outcome = run_search(search, module=FAKE)
    assert [one.error for one in outcome.trials] == [None, None]
    with pytest.raises(ConfigError, match=r"was run with another training\.max_steps"):
        run_search(edited, module=FAKE)


def test_a_database_that_is_away_for_a_moment_leaves_no_folder_locked(tmp_path, log, monkeypatch):
    search = make_search(search_values(tmp_path / "out", trials=1, storage=storage_of("sqlite", tmp_path)))
    really, calls = Engine._claim, []

    def away_once(engine, attempt):
        calls.append(attempt.number)
        if len(calls) == 1:
            raise OperationalError("the statement", {}, Exception("gone"))
        return really(engine, attempt)

    monkeypatch.setattr(Engine, "_claim", away_once)
    assert [one.error for one in run_search(search, module=FAKE).trials] == [None]
    assert len(calls) == 2


def test_the_record_is_there_from_the_start_so_that_another_search_is_refused(tmp_path, log):
    seen = []

    def look(_: object) -> None:
        with pytest.raises(ConfigError, match=r"search\.json there is of study 'mine-lora-r8'"):
            run_search(make_search(search_values(tmp_path / "out", trials=1, study="other")), module=FAKE)
        seen.append(True)

    run_search(make_search(search_values(tmp_path / "out", trials=1)), look, module=FAKE)
    assert seen


def test_another_search_file_for_one_study_is_refused(tmp_path, log):
    def values(machine, **changes):
        return search_values(tmp_path / machine, trials=1, storage=storage_of("sqlite", tmp_path), **changes)

    one = run_search(make_search(values("one")), module=FAKE)
    enqueued(make_search({**values("one"), "trials": 2}))
    for changes, key in (
        ({"training": {"max_steps": 21, "warmup_steps": 1}}, "training.max_steps"),
        ({"sampler_seed": 5}, "sampler_seed"),
        ({"methods": {"lora-r8": {"kind": "lora", "r": 4}}}, "methods.lora-r8.r"),
        ({"space": {RATE: {"low": 1e-5, "high": 1e-2, "log": True}}}, f"space.{RATE}.high"),
    ):
        other = make_search(values("two", **changes))
        with pytest.raises(ConfigError, match=f"0000 was run with another {key}; use the same file on all machines"):
            run_search(other, module=FAKE)
        with pytest.raises(ConfigError, match=f"its trials have another {key}; use the same file"):
            serve(other, 1, module=FAKE)
    assert not (tmp_path / "two" / "runs").exists()
    two = run_search(make_search(values("two", processes=3, heartbeat=2)), module=FAKE)
    assert scores(one) == scores(two), "where a machine writes and how many processes it has is its own affair"
    assert sum(runs_in(log).values()) == 1


@pytest.mark.slow
def test_the_command_trains_for_real_and_never_opens_what_is_reported(tmp_path, capsys):
    from aroma.cli import main

    lora = {"lora": {"kind": "lora", "r": 2}}
    training = {"max_steps": 12, "batch_size": 8, "warmup_steps": 1}
    space = {RATE: {"choices": [1e-6, 5e-2]}}
    file = real_grid(tmp_path, "out", methods=lora, training=training, space=space, sampler="grid")
    (tmp_path / "test.jsonl").write_text("not to be read\n")
    assert main(["lab", "search", str(file), "--workers", "2"]) == 0
    record = json.loads((tmp_path / "out" / "search.json").read_text())
    printed = capsys.readouterr().out
    assert f"best, with {record['best']['score']:.4f} on held-out examples: {RATE}=" in printed
    for entry in record["tried"]:
        result = json.loads((tmp_path / "out" / entry["run"] / "result.json").read_text())
        assert (result["score"], result["reported"]) == (entry["score"], {})
        assert result["examples"] == {"train": 180, "held_out": 20}
    assert record["best"]["values"] == {RATE: 5e-2}
