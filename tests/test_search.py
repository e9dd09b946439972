"""Searches: exactly N trials whoever runs them, every one on held-out data, and clear about what cannot work."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from aroma.errors import ConfigError, DataError
from aroma_lab.study.engine import Engine
from aroma_lab.study.search import SearchOutcome, load_search, make_search, run_search, serve
from aroma_lab.study.space import extremes, grid_points, read_space
from aroma_lab.study.status import ERROR, KEY, NAME, scheduled_in
from aroma_lab.study.storage import open_storage, without_password
from aroma_lab.tasks.data import load_task
from aroma_lab.tasks.spec import TaskSpec
from fake_trial import score_of
from study_files import (
    FAKE,
    RATE,
    RATES,
    environment,
    output_of,
    runs_in,
    search_values,
    start_machine,
    trainable,
    write_yaml,
)

DECAY = "training.weight_decay"

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture
def log(tmp_path, monkeypatch) -> Path:
    """Where stand-ins write the names of their trials."""
    path = tmp_path / "log.txt"
    for key, value in environment(path).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("aroma_lab.study.search.check_methods", lambda trials: None)
    return path


def searched(output: Path, **changes) -> SearchOutcome:
    return run_search(make_search(search_values(output, **changes)), module=FAKE)


def scores(outcome: SearchOutcome) -> list[float | None]:
    return [one.score for one in outcome.trials]


# The space ----------------------------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_values_whatever_the_order_of_lines():
    ranges = {
        DECAY: {"low": 0.1, "high": 0.4, "step": 0.1},
        "options.r": {"low": 2, "high": 6, "step": 2},
        RATE: {"choices": RATES},
    }
    points = grid_points(read_space(ranges))
    assert len({tuple(point.values()) for point in points}) == len(points) == 4 * 3 * 3
    assert points == grid_points(read_space(dict(reversed(ranges.items()))))
    assert {point[DECAY] for point in points} == {0.1, 0.2, 0.3, 0.4}  # not 0.30000000000000004
    ends = extremes(read_space({**ranges, "options.alpha": {"low": 1e-4, "high": 1e-2, "log": True}}))
    assert {point["options.r"] for point in ends} == {2, 6}
    assert {point["options.alpha"] for point in ends} == {1e-4, 1e-2}
    assert {point[RATE] for point in ends} == set(RATES)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space={}: give at least one dotted key"),
        ({"training": None}, "space={'training': None}: give at least one dotted key"),
        ({RATE: 1e-3}, f"space.{RATE}=0.001: write {{low: 1e-4"),
        ({RATE: {"low": 1e-3}}, "a range needs both low and high"),
        ({RATE: {"low": 1e-2, "high": 1e-3}}, f"space.{RATE}={{'low': 0.01, 'high': 0.001}}: "),
        ({RATE: {"low": 1e-2, "high": 1e-2}}, f"space.{RATE}.low=0.01: it must be below high=0.01"),
        ({RATE: {"low": "much", "high": 1.0}}, f"space.{RATE}.low='much': give a number"),
        ({RATE: {"low": 0.0, "high": 1.0, "log": True}}, "low"),
        ({"options.r": {"low": 0, "high": 8, "log": True}}, "space.options.r="),
        ({RATE: {"low": 0.1, "high": 1.0, "log": True, "step": 0.1}}, f"space.{RATE}="),
        ({RATE: {"low": 0.1, "high": 0.55, "step": 0.1}}, f"space.{RATE}.high=0.55: steps of 0.1 from 0.1 do not end"),
        ({RATE: {"low": 0.1, "high": 1.0, "steps": 0.1}}, f"the nearest is 'space.{RATE}.step'"),
        ({RATE: {"choices": []}}, f"space.{RATE}.choices=[]: give a list of at least one"),
        ({RATE: {"choices": [1e-3, 1e-3]}}, f"space.{RATE}.choices=0.001: it is there twice"),
        ({RATE: {"choices": [[1]]}}, f"space.{RATE}.choices=[1]: a choice is a number"),
        ({RATE: {"choices": [1], "log": True}}, "choices cannot be combined"),
        ({"training.learning_rat": {"choices": [1]}}, f"a grid has no such key; the nearest is '{RATE}'"),
        ({RATE: {"low": -1.0, "high": 1.0}}, f"{RATE}=-1.0: give a positive number"),
        ({"training.batch_size": {"low": 1.5, "high": 2.5}}, "space.training.batch_size=1.5: give a whole number"),
        ({"training.seed": {"choices": [0, 1]}}, "space.training.seed=0: seeds are given by"),
    ],
)
def test_a_space_that_cannot_work_is_one_clear_error(space, message, tmp_path):
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
            f"space.{RATE}={{'low': 1e-05, 'high': 0.1, 'log': True}}: a grid needs choices or a ste",
        ),
        (
            {"sampler": "grid", "space": {RATE: {"choices": RATES}}},
            "trials=4: sampler: grid tries each of the 3 points",
        ),
        ({"select": {"over": {}}}, "select={'over': {}}: only a grid has it; a search has space instead"),
        ({"trails": 5}, "trails=5: a search has no such key; the nearest is 'trials'"),
    ],
    ids=str,
)
def test_a_search_file_that_cannot_work_is_one_clear_error(changes, message, tmp_path):
    with pytest.raises(ConfigError) as raised:
        make_search(search_values(tmp_path, **changes))
    assert message in str(raised.value)


def test_arguments_win_over_overrides_and_these_over_the_file_and_nest_the_space(tmp_path):
    file = write_yaml(tmp_path / "search.yaml", search_values(tmp_path / "out"))
    overrides = [
        "trials=7",
        "training.max_steps=9",
        f"space.{RATE}.low=1e-4",
        f"space.{DECAY}={{choices: [0.0, 0.1]}}",
    ]
    search = load_search(file, overrides, storage="sqlite:///x.db", trials=8, processes=3)
    assert (search.trials, search.grid.storage, search.grid.processes) == (8, "sqlite:///x.db", 3)
    assert search.grid.training.max_steps == 9
    assert list(search.space) == [RATE, DECAY]
    assert search.space[RATE].low == 1e-4
    same = load_search(file, [overrides[1]], space=search.described)
    assert same.searched() == search.searched(), "however it is written, it is the same search"
    assert (same.grid.study_name, same.sampler, same.grid.storage) == ("mine-lora-r8", "random", None)


def test_an_option_or_a_task_that_cannot_work_is_refused_before_anything_is_written(tmp_path):
    search = make_search(search_values(tmp_path / "out", space={"options.rr": {"choices": [1, 2]}}))
    with pytest.raises(ConfigError, match=r"methods\.lora-r8: .*rr"):
        run_search(search)
    with pytest.raises(DataError, match=r"^tasks\.mine\.train='absent\.jsonl'"):
        run_search(make_search(search_values(tmp_path / "out", model="minilm")))
    assert not (tmp_path / "out").exists()


# The storage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "storage='nonsense': not a database URL; write sqlite:///FILE or postgresql://"),
        ("oracel://host/db", "storage='oracel://host/db': not a database URL"),
        ("postgresql://me:s3cret@127.0.0.1:1/db", "storage='postgresql://me:***@127.0.0.1:1/db': cannot be reached ("),
        ("mysql+nodriver://me:s3cret@127.0.0.1/db", "not a database URL"),
        ("mysql+pymysql://me:s3cret@127.0.0.1/db", "@127.0.0.1/db': its driver is missing (pymysql)"),
    ],
)
def test_a_storage_that_cannot_work_is_one_clear_error_without_its_password(url, message, tmp_path):
    with pytest.raises(ConfigError) as raised:
        open_storage(url, tmp_path, heartbeat=20)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "s3cret" not in str(raised.value)
    assert "s3cret" not in without_password(url)


def test_a_file_that_is_no_database_and_no_journal_is_one_clear_error(tmp_path):
    (tmp_path / "study.journal").write_text("not a database, but long enough to be looked at as one\n" * 20)
    with pytest.raises(ConfigError, match=r"study\.journal.*file is not a database"):
        open_storage(f"sqlite:///{tmp_path / 'study.journal'}", tmp_path, heartbeat=20)
    with pytest.raises(ConfigError, match=r"study\.journal there is not a study's journal"):
        open_storage(None, tmp_path, heartbeat=20)


# What the study says ------------------------------------------------------------------------------------------------


def frozen(
    number: int, state: TrialState, retries: list[int] | None = None, error: str | None = None, key: str = "one"
) -> FrozenTrial:
    trial = create_trial(
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


def test_trials_and_retries_that_two_machines_enqueued_at_once_count_once():
    study = Study(
        frozen(0, TrialState.FAIL),
        frozen(1, TrialState.WAITING, key="two"),
        frozen(2, TrialState.COMPLETE, retries=[0]),
        frozen(3, TrialState.WAITING, retries=[0]),
        frozen(4, TrialState.FAIL, error="bad data", key="two"),
    )
    one, two = scheduled_in(study).values()
    assert (one.score, one.tries, one.decided, one.waits) == (0.2, 2, True, False)
    assert (two.error, two.decided, two.waits) == ("bad data", True, False)


def test_a_trial_is_lost_only_until_it_was_tried_three_times():
    trials = [frozen(0, TrialState.FAIL), frozen(1, TrialState.FAIL, [0]), frozen(2, TrialState.FAIL, [0, 1])]
    seen = [scheduled_in(Study(*trials[:count]))["one"] for count in (1, 2, 3)]
    assert [one.is_lost for one in seen] == [True, True, False]
    assert [one.error for one in seen] == [None, None, "its process or machine died, 3 times in a row"]


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_of_many_machines_that_claim_a_trial_at_once_one_gets_it(tmp_path, kind):
    storage = f"sqlite:///{tmp_path / 'study.db'}" if kind == "sqlite" else None
    search = make_search(search_values(tmp_path / "out", trials=15, storage=storage))
    engines = [Engine(search.grid, search.sampled_trial) for _ in range(4)]
    engines[0]._enqueue({attributes[KEY]: attributes for attributes in search.scheduled()})
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


def test_a_search_runs_each_of_n_trials_once_and_reports_the_best(tmp_path, log):
    outcome = searched(tmp_path / "out", trials=6)
    assert sorted(runs_in(log).items()) == [(f"search/mine-lora-r8/{n:04d}", 1) for n in range(6)]
    rates = [one.last.params[RATE] for one in outcome.trials]
    assert len(set(rates)) == 6
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert scores(outcome) == [score_of(rate) for rate in rates]
    record = json.loads((tmp_path / "out" / "search.json").read_text())
    assert [entry["score"] for entry in record["tried"]] == scores(outcome)
    assert record["best"] == max(record["tried"], key=lambda entry: entry["score"])
    assert (record["scored_on"], record["task"], record["method"]) == ("held_out", "mine", "lora-r8")
    for entry in record["tried"]:
        trial = json.loads((tmp_path / "out" / entry["run"] / "trial.json").read_text())
        assert trial["purpose"] == "select"
        assert trial["training"]["learning_rate"] == entry["values"][RATE]


def test_random_points_depend_on_the_seed_alone(tmp_path, log):
    one = searched(tmp_path / "one", processes=1)
    two = searched(tmp_path / "two", processes=3, storage=f"sqlite:///{tmp_path / 'two.db'}")
    other = searched(tmp_path / "three", sampler_seed=1)
    assert scores(one) == scores(two)
    assert set(scores(one)).isdisjoint(scores(other))


def test_tpe_gives_each_trial_values_of_its_own(tmp_path, log):
    outcome = searched(tmp_path / "out", sampler="tpe", trials=14, processes=3)
    assert len({one.last.params[RATE] for one in outcome.trials}) == 14


def test_a_finished_search_needs_no_data_and_more_trials_run_only_what_is_new(tmp_path, log):
    first = searched(tmp_path / "out", trials=2)
    assert scores(run_search(make_search(search_values(tmp_path / "out", trials=2)))) == scores(first)
    with pytest.raises(DataError, match=r"^tasks\.mine\.train"):
        run_search(make_search(search_values(tmp_path / "out", trials=3)))
    more = searched(tmp_path / "out", trials=3)
    assert scores(more)[:2] == scores(first)
    (tmp_path / "out" / "study.journal").unlink()
    assert scores(searched(tmp_path / "out", trials=3)) == scores(more), "told by its results"
    assert list(runs_in(log).values()) == [1, 1, 1]


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_two_processes_on_one_file_try_every_point_of_a_grid_once(tmp_path, log, kind):
    storage = f"sqlite:///{tmp_path / 'study.db'}" if kind == "sqlite" else None
    space = {RATE: {"choices": RATES}, DECAY: {"choices": [0.0, 0.01, 0.02]}}
    values = search_values(tmp_path / "out", sampler="grid", trials=None, space=space, storage=storage)
    file = write_yaml(tmp_path / "search.yaml", values)
    machines = [start_machine(file, log, seconds=0.1) for _ in range(2)]
    assert [output_of(machine) for machine in machines] == ["", ""]
    assert sorted(runs_in(log).values()) == [1] * 9
    tried = json.loads((tmp_path / "out" / "search.json").read_text())["tried"]
    assert sorted((entry["values"][RATE], entry["values"][DECAY]) for entry in tried) == [
        (rate, decay) for rate in RATES for decay in (0.0, 0.01, 0.02)
    ]


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


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_the_trial_of_a_machine_that_died_is_taken_up_again(tmp_path, log, kind):
    storage = f"sqlite:///{tmp_path / 'study.db'}" if kind == "sqlite" else None
    search = make_search(search_values(tmp_path / "out", trials=2, storage=storage))
    engine = Engine(search.grid, search.sampled_trial)
    engine._enqueue({attributes[KEY]: attributes for attributes in search.scheduled()})
    assert engine._claim(engine.study.get_trials()[0])
    outcome = run_search(search, module=FAKE)
    # A journal knows that the machine is gone; in a database, signs of life were missing.
    assert [one.tries for one in outcome.trials] == ([2, 1] if storage else [1, 1])
    assert list(runs_in(log).values()) == [1, 1]


def test_an_interrupt_hands_back_the_running_trials(tmp_path, log, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "60")
    search = make_search(search_values(tmp_path / "out", trials=3))

    class Interrupts:
        def on_progress(self, progress: object) -> None:
            if len(runs_in(log)) == 2:
                raise KeyboardInterrupt

        def on_end(self, *_: object) -> None:
            pytest.fail("no trial ends")

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_search(search, Interrupts(), module=FAKE)
    assert time.monotonic() - began < 30, "the trials were not waited for"
    study = optuna.load_study(study_name="mine-lora-r8", storage=open_storage(None, tmp_path / "out", 1))
    assert [trial.state for trial in study.get_trials()] == [TrialState.WAITING] * 3
    begun = [trial.params[RATE] for trial in study.get_trials()[:2]]
    monkeypatch.setenv("FAKE_SECONDS", "0")
    outcome = run_search(search, module=FAKE)
    assert [one.last.params[RATE] for one in outcome.trials[:2]] == begun
    assert [one.tries for one in outcome.trials] == [1, 1, 1]


# Machines that do not agree -----------------------------------------------------------------------------------------


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
    one = searched(tmp_path / "one", trials=1, storage=storage)
    with pytest.raises(ConfigError) as raised:
        searched(tmp_path / "two", trials=1, storage=storage, **changes)
    assert f"0000 was run with another {key}; use the same file on all machines" in str(raised.value)
    assert not (tmp_path / "two" / "runs").exists()
    worker = make_search(search_values(tmp_path / "two", trials=2, storage=storage, **changes))
    with Engine(make_search(search_values(tmp_path / "one", trials=2, storage=storage)).grid) as engine:
        engine._enqueue({one[KEY]: one for one in make_search(search_values(tmp_path, trials=2)).scheduled()})
    with pytest.raises(ConfigError, match=f"its trials have another {key}; use the same file"):
        serve(worker, 1, module=FAKE)
    two = searched(tmp_path / "two", trials=1, storage=storage, processes=3, heartbeat=2)
    assert scores(one) == scores(two), "where a machine writes and how many processes it has is its own affair"
    assert sum(runs_in(log).values()) == 1


def test_an_output_that_holds_another_searchs_trials_is_refused(tmp_path, log):
    searched(tmp_path / "out", trials=1)
    with pytest.raises(ConfigError, match=r"search\.json there is of study 'mine-lora-r8'"):
        searched(tmp_path / "out", trials=1, study="other")
    with pytest.raises(ConfigError, match=r"0000 \(training\.learning_rate\)"):
        searched(tmp_path / "out", trials=1, sampler_seed=1)
    assert sum(runs_in(log).values()) == 1


# With the real training ---------------------------------------------------------------------------------------------


def test_the_command_trains_for_real_and_never_opens_what_is_reported(tmp_path, capsys):
    from aroma.cli import main

    values = search_values(tmp_path / "out", **trainable(tmp_path, rates=[1e-6, 5e-2]))
    with pytest.raises(DataError, match=r"test\.jsonl"):
        load_task(TaskSpec(name="mine", **values["tasks"]["mine"]))
    file = write_yaml(tmp_path / "search.yaml", values)
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
