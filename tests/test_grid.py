"""Grids: from a file to trials, what is chosen, what is run, skipped, refused and reported."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from aroma.cli import main
from aroma.errors import ConfigError, DataError
from aroma_lab.cli.lab_progress import GridProgress, duration
from aroma_lab.grid.expand import check_methods, check_tasks, expand
from aroma_lab.grid.lock import exclusive
from aroma_lab.grid.reader import load_grid, make_grid
from aroma_lab.grid.run import run_grid
from aroma_lab.grid.select import Outcome, candidates, choose, chosen_settings
from aroma_lab.grid.spec import Part
from aroma_lab.grid.status import Ended, GridStatus, Pace, Running
from aroma_lab.grid.survey import due, survey
from aroma_lab.grid.worker import worker_environment
from aroma_lab.run.trial import save_trial

TESTS = Path(__file__).parent
EXAMPLES = [
    path
    for path in sorted((TESTS.parent / "examples" / "lab").glob("*.yaml"))
    if "space" not in yaml.safe_load(path.read_text())  # a search
]

MINIMAL = {
    "output": "out",
    "model": "minilm",
    "tasks": {"mrpc": None, "rte": {"max_length": 128}},
    "methods": {"lora-r8": {"kind": "lora", "r": 8}, "head": {"kind": "head_only"}},
    "training": {"max_steps": 10, "warmup_steps": 1},
    "seeds": [0, 1],
}


@pytest.fixture
def counting_workers(monkeypatch, tmp_path):
    """Workers that only count steps; a grid in the returned folder."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    for user in ("run", "survey"):
        monkeypatch.setattr(f"aroma_lab.grid.{user}.check_methods", lambda trials: None)
    return tmp_path / "out"


def counting_grid(output, **changes):
    values = {
        **MINIMAL,
        "output": str(output),
        "processes": 2,
        "tasks": {"mrpc": None},
        "methods": {"a": {"kind": "x"}, "b": {"kind": "x"}},
    }
    return make_grid({**values, **changes})


def run(grid, **options):
    return run_grid(grid, module="grid_worker", **options)


def steps(output, name):
    return (Path(output) / "runs" / name / "steps.log").read_text().splitlines()


def trial_json(output, name):
    return json.loads((Path(output) / "runs" / name / "trial.json").read_text())


# From a file to a grid ----------------------------------------------------------------------------------------------


def test_the_examples_are_grids_and_say_how_they_are_run():
    assert "minilm-tiny.yaml" in [path.name for path in EXAMPLES]
    for path in EXAMPLES:
        grid = load_grid(path)
        trials = expand(grid)
        assert len(trials) == len(grid.tasks) * len(grid.methods) * len(grid.seeds)
        check_methods(trials)
        assert f"aroma lab run examples/lab/{path.name}" in path.read_text()


def test_the_resolved_grid_is_read_back_as_it_was(tmp_path):
    select = {"over": {"training.learning_rate": [1e-3, 2e-3]}, "seed": 9, "training": {"max_steps": 3}}
    overrides = [{"task": "rte", "method": ["head"], "options.x": [1, "a"], "task.max_length": 99}]
    grid = make_grid({**MINIMAL, "select": select, "overrides": overrides, "processes": 3})
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid.as_dict(), sort_keys=False))
    assert load_grid(path) == grid
    assert grid.overrides[0].methods == ("head",)


def test_overrides_are_stronger_and_read_as_yaml(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "methods": {"lora-0.5": {"kind": "lora"}, "lora": {"kind": "lora"}}}))
    grid = load_grid(
        path,
        [
            "seeds=[3]",
            "training.learning_rate=1e-4",
            "methods.lora-0.5.r=4",
            "methods.lora.alpha=1e1",
            "tasks.mrpc.max_length=64",
            "select.over.training.learning_rate=[1e-3]",
        ],
    )
    assert grid.seeds == (3,)
    assert grid.training.learning_rate == 1e-4
    assert grid.training.max_steps == 10
    assert grid.methods["lora-0.5"].options == {"r": 4}
    assert grid.methods["lora"].options == {"alpha": 10.0}
    assert grid.tasks["mrpc"].max_length == 64
    assert grid.select.over == {"training.learning_rate": [1e-3]}


def test_a_worker_has_one_thread_unless_the_grid_says_otherwise():
    assert make_grid(MINIMAL).training.threads == 1
    assert make_grid({**MINIMAL, "training": {"threads": None}}).training.threads is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "sedes=[1]: a grid has no such key; the nearest is 'seeds'"),
        ({"output": None}, "output=None: give a text"),
        ({"model": ""}, "model='': give it"),
        ({"processes": 0}, "processes=0: give 1 or more"),
        ({"tasks": {}}, "tasks={}: give at least one, as mrpc: {}"),
        ({"tasks": {"mr/pc": {}}}, "tasks='mr/pc': it names folders"),
        ({"tasks": {"select": {}}}, "tasks='select': it would share a folder"),
        ({"tasks": {1: {}}}, "tasks: the key 1 is no text; quote it"),
        ({"tasks": {"mrpc": {"name": "rte"}}}, "tasks.mrpc.name='rte': a grid has no such key"),
        (
            {"tasks": {"mrpc": {"maxlength": 3}}},
            "tasks.mrpc.maxlength=3: a grid has no such key; the nearest is 'tasks",
        ),
        ({"tasks": {"mrpc": {"reported": "test"}}}, "tasks.mrpc.reported='test': give a mapping of texts or null"),
        ({"methods": {"lora": {"r": 8}}}, "methods.lora.kind=None: give a text"),
        ({"methods": {"lora": 8}}, "methods.lora=8: give a mapping of keys"),
        ({"methods": {"lora": {"kind": "lora", "r": float("nan")}}}, "methods.lora.r=nan: give a finite number"),
        ({"training": {"batch_size": 0}}, "training.batch_size=0: give 1 or more"),
        (
            {"training": {"batchsize": 8}},
            "training.batchsize=8: a grid has no such key; the nearest is 'training.batch",
        ),
        ({"training": {"seed": 8}}, "training.seed=8: a grid has `seeds`"),
        ({"seeds": []}, "seeds=[]: give at least one"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: give at least one, 0 or more, each once"),
        ({"seeds": 3}, "seeds=3: give a list of whole numbers, as [0, 1, 2]"),
        ({"seeds": ["a"]}, "seeds=['a']: give a list of whole numbers"),
        ({"overrides": {"task": "rte"}}, "overrides={'task': 'rte'}: give a list"),
        ({"overrides": [{"task": "rt"}]}, "overrides[0].task='rt': the grid has no such task; it has mrpc, rte"),
        ({"overrides": [{"methods": "head"}]}, "overrides[0].methods='head': a grid has no such key; the nearest is "),
        ({"overrides": [{"training.max_step": 3}]}, "overrides[0].training.max_step=3: a grid has no such key"),
        ({"overrides": [{"training.max_steps": "x"}]}, "overrides[0].training.max_steps='x': give a whole number"),
        ({"overrides": [{"training.seed": 3}]}, "overrides[0].training.seed=3: seeds are given by `seeds`"),
        ({"select": {}}, "select.over=None: name what is tried"),
        (
            {"select": {"over": {"training.learning_rate": 1e-3}}},
            "select.over.training.learning_rate=0.001: give a list",
        ),
        (
            {"select": {"over": {"training.learning_rate": [1, "x"]}}},
            "select.over.training.learning_rate='x': give a n",
        ),
        ({"select": {"over": {"options.r": [1, 1]}}}, "select.over.options.r=[1, 1]: a value is there twice"),
        ({"select": {"ower": {}}}, "select.ower={}: a grid has no such key; the nearest is 'select.over'"),
        ({"select": {"over": {"options.r": [1]}, "seed": -1}}, "select.seed=-1: give 0 or more"),
    ],
    ids=lambda value: json.dumps(value, default=str)[:40] if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_by_key_value_and_remedy(changes, message):
    with pytest.raises(ConfigError) as caught:
        make_grid({**MINIMAL, **changes})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "methods: {a: {kind: x}}\nmethods: {b: {kind: x}}",
            "the key 'methods' is given twice, the second time in line 2",
        ),
        ("methods: [a: b", "not YAML"),
        ("- a", "it holds a list; a grid is a mapping of keys"),
    ],
)
def test_a_file_that_is_no_grid_is_refused(tmp_path, text, message):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_grid(path)


def test_an_override_through_a_value_is_refused(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match=r"^seeds\.first=3: 'seeds' holds \[0, 1\], which has no keys"):
        load_grid(path, ["seeds.first=3"])


def test_a_wrong_option_or_kind_is_refused_under_its_label():
    with pytest.raises(ConfigError, match=r"^methods\.lora-r8: .*rr"):
        check_methods(expand(make_grid({**MINIMAL, "methods": {"lora-r8": {"kind": "lora", "rr": 8}}})))
    with pytest.raises(ConfigError, match=r"^methods\.mine: .*lorra"):
        check_methods(expand(make_grid({**MINIMAL, "methods": {"mine": {"kind": "lorra"}}})))


def test_what_is_listed_is_refused_as_if_it_were_run(tmp_path):
    for method, message in (({"kind": "lorra"}, "lorra"), ({"kind": "lora", "r": 0}, "r=0")):
        grid = make_grid({**MINIMAL, "output": str(tmp_path / "out"), "methods": {"mine": method}})
        with pytest.raises(ConfigError, match=rf"^methods\.mine: .*{message}"):
            survey(grid)
    tried = {"select": {"over": {"options.rr": [1, 2]}}, "methods": {"mine": {"kind": "lora"}}}
    with pytest.raises(ConfigError, match=r"^methods\.mine: .*rr"):
        survey(make_grid({**MINIMAL, "output": str(tmp_path / "out"), **tried}))


# From a grid to trials ----------------------------------------------------------------------------------------------


def test_trials_come_seed_by_seed_and_are_resolved():
    trials = expand(make_grid(MINIMAL))
    assert [trial.name for trial in trials] == [
        f"{task}/{method}/seed-{seed}" for seed in (0, 1) for task in ("mrpc", "rte") for method in ("lora-r8", "head")
    ]
    first = trials[0]
    assert (first.model, first.task.name, first.method, first.kind) == ("minilm", "mrpc", "lora-r8", "lora")
    assert first.options == {"r": 8}
    assert first.purpose == "report"
    assert [trial.training.seed for trial in trials] == [0] * 4 + [1] * 4
    assert {trial.training.max_steps for trial in trials} == {10}
    assert [trial.task.max_length for trial in trials[1:4]] == [256, 128, 128]


def test_later_overrides_win_where_they_hold():
    overrides = [
        {"training.max_steps": 20, "task.max_length": 64},
        {"task": "rte", "training.max_steps": 30, "options.r": 2},
        {"task": ["rte"], "method": "lora-r8", "training.max_steps": 40, "model": "other"},
    ]
    made = {trial.name: trial for trial in expand(make_grid({**MINIMAL, "overrides": overrides, "seeds": [0]}))}
    steps_of = {name: trial.training.max_steps for name, trial in made.items()}
    assert steps_of == {
        "mrpc/lora-r8/seed-0": 20,
        "mrpc/head/seed-0": 20,
        "rte/lora-r8/seed-0": 40,
        "rte/head/seed-0": 30,
    }
    assert made["rte/lora-r8/seed-0"].options == {"r": 2}
    assert made["mrpc/lora-r8/seed-0"].options == {"r": 8}
    assert [trial.model for trial in made.values()] == ["minilm", "minilm", "other", "minilm"]
    assert {trial.task.max_length for trial in made.values()} == {64}


SELECT = {
    "over": {"training.learning_rate": [1e-4, 1e-3], "options.r": [1, 2]},
    "seed": 100,
    "training": {"max_steps": 4},
}


def test_a_selection_tries_the_product_on_held_out_examples():
    grid = make_grid({**MINIMAL, "select": SELECT, "overrides": [{"training.max_steps": 7, "options.r": 5}]})
    tried = candidates(grid)
    assert len(tried) == 2 * 2 * 4
    assert [one.trial.name for one in tried[:4]] == [
        f"select/mrpc/lora-r8/learning_rate={rate},r={r}" for rate in (0.0001, 0.001) for r in (1, 2)
    ]
    assert {one.trial.purpose for one in tried} == {"select"}
    assert {one.trial.training.seed for one in tried} == {100}
    assert {one.trial.training.max_steps for one in tried} == {4}
    assert [(one.trial.training.learning_rate, one.trial.options["r"]) for one in tried[:4]] == [
        (1e-4, 1),
        (1e-4, 2),
        (1e-3, 1),
        (1e-3, 2),
    ]


def test_the_trials_of_a_selection_can_differ_by_method_and_what_is_tried_is_strongest():
    overrides = [{"method": "lora-r8", "options.dropout": 0.5, "training.learning_rate": 9.0}]
    select = {"over": {"training.learning_rate": [1e-3]}, "training": {"max_steps": 3}, "overrides": overrides}
    grid = make_grid({**MINIMAL, "select": select})
    assert make_grid(grid.as_dict()) == grid
    by_method = {one.method: one.trial for one in candidates(grid) if one.task == "mrpc"}
    assert by_method["lora-r8"].options == {"r": 8, "dropout": 0.5}
    assert by_method["head"].options == {}
    assert {trial.training.learning_rate for trial in by_method.values()} == {1e-3}
    assert {trial.training.max_steps for trial in by_method.values()} == {3}
    assert expand(grid)[0].options == {"r": 8}, "reported trials have none of it"
    with pytest.raises(ConfigError, match=r"select.overrides\[0\].method='x': the grid has no such method"):
        make_grid({**MINIMAL, "select": {**select, "overrides": [{"method": "x"}]}})


def test_values_that_no_folder_can_be_called_have_names_of_their_own():
    over = {"options.target": ["a/b", "a:b"], "task.label": ["x"]}
    names = [one.trial.name for one in candidates(make_grid({**MINIMAL, "select": {"over": over}}))]
    assert len(set(names)) == len(names) == 8
    assert all(".." not in name and ":" not in name and name.count("/") == 3 for name in names)


def test_the_best_score_is_chosen_of_equal_ones_the_lower_loss_and_never_a_failed_one():
    grid = make_grid({**MINIMAL, "tasks": {"mrpc": None}, "select": {"over": {"training.learning_rate": [1, 2, 3]}}})
    tried = candidates(grid)
    prefix = "select/mrpc/lora-r8/learning_rate="
    even = Outcome.of({"score": 0.5, "held_out_loss": 0.7})
    selection = choose(tried, {f"{prefix}1.0": even, f"{prefix}3.0": even})
    lower = Outcome.of({"score": 0.5, "held_out_loss": 0.6})
    worse = Outcome.of({"score": 0.4, "held_out_loss": 0.1})
    other = choose(tried, {f"{prefix}1.0": even, f"{prefix}2.0": worse, f"{prefix}3.0": lower})
    assert other["mrpc"]["lora-r8"]["chosen"] == {"training.learning_rate": 3.0}
    assert selection["mrpc"]["lora-r8"] == {
        "chosen": {"training.learning_rate": 1.0},
        "tried": [
            [{"training.learning_rate": 1.0}, 0.5],
            [{"training.learning_rate": 2.0}, None],
            [{"training.learning_rate": 3.0}, 0.5],
        ],
    }
    assert selection["mrpc"]["head"]["chosen"] is None
    chosen = chosen_settings(selection)
    assert chosen == {"mrpc": {"lora-r8": {"training.learning_rate": 1.0}}}
    trials = expand(grid, chosen)
    assert [trial.name for trial in trials] == ["mrpc/lora-r8/seed-0", "mrpc/lora-r8/seed-1"]
    assert {trial.training.learning_rate for trial in trials} == {1.0}
    assert {trial.training.max_steps for trial in trials} == {10}


# The time left ------------------------------------------------------------------------------------------------------


def test_the_time_left_by_hand():
    a, b = expand(make_grid({**MINIMAL, "tasks": {"mrpc": None}, "seeds": [0]}))  # 10 steps each
    pace = Pace()
    assert pace.seconds_left([], [a], processes=1) is None  # nothing is known
    assert pace.seconds_left([Running(a, 4, 10, 3.0)], [a, b], processes=1) == pytest.approx(3 * (6 + 10 + 10))
    pace.add(a, planned=10, seconds=20)  # 2 s a step, from a finished trial: stronger than a running one's 3 s
    assert pace.seconds_left([Running(a, 4, 10, 3.0)], [a], processes=1) == pytest.approx(2 * (6 + 10))
    assert pace.seconds_left([Running(b, 4, 10, 5.0)], [a], processes=2) == pytest.approx(30)  # b alone takes 5 × 6
    assert pace.seconds_left([], [], processes=2) == 0


def test_runs_by_epochs_take_their_number_of_steps_from_others_of_the_task():
    values = {**MINIMAL, "training": {"epochs": 2}, "seeds": [0]}
    a, _, other, _ = expand(make_grid(values))
    pace = Pace()
    pace.add(a, planned=50, seconds=100)
    assert pace.seconds_left([], [a, a], processes=1) == pytest.approx(200)
    assert pace.seconds_left([], [a, other], processes=1) is None
    assert pace.seconds_left([Running(other, 0, 30, None)], [], processes=1) == pytest.approx(60)


# Running ------------------------------------------------------------------------------------------------------------


def test_all_trials_are_run_once(counting_workers):
    grid = counting_grid(counting_workers)
    names = [trial.name for trial in expand(grid)]
    outcome = run(grid)
    assert sorted(outcome.finished) == sorted(names)
    assert (outcome.failed, outcome.skipped) == ([], [])
    assert load_grid(counting_workers / "grid.yaml") == grid
    again = run(grid)
    assert (again.finished, again.failed, again.skipped) == ([], [], names)
    assert all(steps(counting_workers, name) == [f"step {n}" for n in range(1, 11)] + ["finished"] for name in names)


def test_a_worker_is_pinned_to_its_threads(counting_workers):
    run(counting_grid(counting_workers, training={"max_steps": 1, "threads": 3}, seeds=[0]))
    environment = json.loads((counting_workers / "runs/mrpc/a/seed-0/environment.json").read_text())
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"


def test_without_a_number_of_threads_the_environment_is_left_alone(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert worker_environment(None)["OMP_NUM_THREADS"] == "7"
    assert worker_environment(1)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "DataError: no such file"),
        ("exit", "WorkerEnded: the worker ended with code 3 and left no result"),
        ("kill", "WorkerKilled: the worker was ended by SIGKILL; the kernel does so where memory runs out"),
    ],
)
def test_a_failing_trial_is_reported_and_stops_no_other(counting_workers, how, message, tmp_path):
    mended = tmp_path / "mended"
    methods = {"bad": {"kind": "x", "fail": how, "until": str(mended)}, "good": {"kind": "x"}}
    grid = counting_grid(counting_workers, methods=methods, seeds=[0])
    for _ in range(2):  # the second time it is not run again, and reported again
        outcome = run(grid)
        assert [(failure.name, failure.message) for failure in outcome.failed] == [("mrpc/bad/seed-0", message)]
        assert outcome.finished + outcome.skipped == ["mrpc/good/seed-0"]
    failure = json.loads(outcome.failed[0].path.read_text())
    assert how == "raise" or failure["traceback"] == ["about to end"]
    assert steps(counting_workers, "mrpc/bad/seed-0") == [f"step {n}" for n in range(1, 6)]

    mended.touch()
    outcome = run(grid, retry_failed=True)
    assert (outcome.finished, outcome.failed) == (["mrpc/bad/seed-0"], [])
    assert not (counting_workers / "runs/mrpc/bad/seed-0/failure.json").exists()


def test_a_finished_trial_of_another_grid_is_refused_by_its_key(counting_workers):
    run(counting_grid(counting_workers, seeds=[0]))
    before = steps(counting_workers, "mrpc/a/seed-0")
    with pytest.raises(ConfigError) as caught:
        run(counting_grid(counting_workers, seeds=[0, 1], training={"max_steps": 20, "weight_decay": 0.1}))
    for part in ("mrpc/a/seed-0 (", "training.max_steps", "training.weight_decay", "mrpc/b/seed-0"):
        assert part in str(caught.value)
    assert steps(counting_workers, "mrpc/a/seed-0") == before
    assert not (counting_workers / "runs/mrpc/a/seed-1").exists()  # nothing was run


def test_a_trial_that_failed_is_run_anew_when_the_grid_changes(counting_workers):
    methods = {"bad": {"kind": "x", "fail": "exit", "until": "absent"}}
    assert len(run(counting_grid(counting_workers, methods=methods, seeds=[0])).failed) == 1
    outcome = run(counting_grid(counting_workers, methods={"bad": {"kind": "x"}}, seeds=[0]))
    assert outcome.finished == ["mrpc/bad/seed-0"]
    assert steps(counting_workers, "mrpc/bad/seed-0")[0] == "step 1"  # not from the checkpoint of another trial
    assert trial_json(counting_workers, "mrpc/bad/seed-0")["options"] == {}


def test_a_grid_file_of_the_users_is_not_overwritten(counting_workers):
    counting_workers.mkdir()
    (counting_workers / "grid.yaml").write_text("# mine\n")
    with pytest.raises(ConfigError, match=r"grid\.yaml there is a file of your own"):
        run(counting_grid(counting_workers))
    assert [path.name for path in counting_workers.iterdir()] == ["grid.yaml"]


def test_two_runners_on_one_grid_are_refused(counting_workers):
    with exclusive(counting_workers), pytest.raises(ConfigError, match="this grid is being run already"):
        run(counting_grid(counting_workers))
    assert len(run(counting_grid(counting_workers, seeds=[0])).finished) == 2  # given back


# Tasks that cannot be loaded


@pytest.fixture
def no_worker(monkeypatch):
    """Real workers, of which none may be started."""
    monkeypatch.setattr("aroma_lab.grid.pool.Worker", lambda *args, **kwargs: pytest.fail("a worker was started"))


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ({"source": "/nope"}, DataError, "tasks.messages.source='/nope': no such folder"),
        ({"metric": "foo"}, ConfigError, "tasks.messages.metric='foo': no metric"),
        ({"label": "nope"}, DataError, "tasks.messages.train="),
        ({"reported": {"test": "nope.jsonl"}}, DataError, "tasks.messages.reported.test='nope.jsonl'"),
        ({"max_length": 9999}, ConfigError, "tasks.messages: data.max_length=9999"),
        ({"kind": "commonsense", "metric": "foo"}, ConfigError, "tasks.messages.metric='foo': no metric of commons"),
        ({"kind": "commonsense", "train": "nope.json"}, DataError, "tasks.messages.train="),
    ],
    ids=str,
)
@pytest.mark.parametrize("select", [None, {"over": {"training.learning_rate": [1e-3, 2e-3]}}], ids=["", "select"])
def test_a_task_that_cannot_be_loaded_is_refused_before_anything_is_run(
    no_worker, tmp_path, task, error, message, select
):
    grid = messages_grid(tmp_path / "out", {**MESSAGES, **task}, select=select)
    with pytest.raises(error) as caught:
        run_grid(grid)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("select", [None, {"over": {"task.label": ["topic"]}}], ids=["", "select"])
def test_what_is_over_needs_its_data_no_more(no_worker, tmp_path, select):
    task = {**MESSAGES, "source": "/nope", "label": None}
    grid = messages_grid(tmp_path / "out", task, select=select)
    tried = [candidate.trial for candidate in candidates(grid)]
    pretend_finished(tmp_path / "out", tried)
    chosen = {"messages": {"head": {"task.label": "topic"}}} if select else None
    trials = expand(grid, chosen)
    pretend_finished(tmp_path / "out", trials[:1])
    with pytest.raises(DataError, match="source='/nope'"):
        run_grid(grid)
    pretend_finished(tmp_path / "out", trials[1:])
    assert run_grid(grid).skipped == [trial.name for trial in [*tried, *trials]]


def test_a_trial_that_failed_needs_its_data_only_to_be_run_again(no_worker, tmp_path):
    grid = messages_grid(tmp_path / "out", {**MESSAGES, "source": "/nope"}, seeds=[0])
    (trial,) = expand(grid)
    pretend_finished(tmp_path / "out", [trial], "failure.json", {"error": "DataError", "message": "no such file"})
    assert [failure.message for failure in run_grid(grid).failed] == ["DataError: no such file"]
    with pytest.raises(DataError, match="source='/nope'"):
        run_grid(grid, retry_failed=True)


def test_every_task_is_loaded_once_and_with_what_is_reported_if_any_trial_reports_it(monkeypatch, tmp_path):
    loaded = []
    monkeypatch.setattr("aroma_lab.run.work.work_of", loaded.append)
    select = {"over": {"training.learning_rate": [1e-3, 2e-3]}}
    grid = make_grid({**MINIMAL, "output": str(tmp_path / "out"), "select": select})
    tried = candidates(grid)
    check_tasks(due(grid, tried))
    assert [(trial.task.name, trial.purpose) for trial in loaded] == [("mrpc", "report"), ("rte", "report")]
    loaded.clear()
    check_tasks([candidate.trial for candidate in tried])
    assert [(trial.task.name, trial.purpose) for trial in loaded] == [("mrpc", "select"), ("rte", "select")]
    changed = make_grid({**MINIMAL, "output": str(tmp_path / "out"), "select": {"over": {"task.label": ["a", "b"]}}})
    labels = [trial.task.label for trial in due(changed, candidates(changed))]
    assert set(labels) == {"a", "b"}, "what is tried stands for what is chosen"


MESSAGES = {
    "source": str(TESTS.parent / "examples" / "lab" / "messages"),
    "train": "train.jsonl",
    "reported": {"test": "test.jsonl"},
    "label": "topic",
    "max_length": 32,
}


def messages_grid(output, task, **changes):
    values = {
        **MINIMAL,
        "output": str(output),
        "tasks": {"messages": task},
        "methods": {"head": {"kind": "head_only"}},
    }
    return make_grid({**values, **changes})


RESULT = {"score": 0.5, "held_out_loss": 0.5, "planned_steps": 10, "wall_seconds": 1.0}


def pretend_finished(output, trials, name="result.json", content=RESULT):
    for trial in trials:
        folder = output / "runs" / trial.name
        folder.mkdir(parents=True, exist_ok=True)
        save_trial(trial, folder / "trial.json")
        (folder / name).write_text(json.dumps(content))


# Choosing


def test_what_a_selection_chose_is_run_and_written(counting_workers):
    select = {"over": {"training.learning_rate": [5e-4, 1e-3, 2e-3]}, "seed": 7, "training": {"max_steps": 2}}
    grid = counting_grid(counting_workers, select=select)
    outcome = run(grid)
    assert len(outcome.finished) == 6 + 4
    assert all(name.startswith("select/") for name in outcome.finished[:6])
    selection = json.loads((counting_workers / "selection.json").read_text())
    chosen = {"training.learning_rate": 1e-3}  # where the counting worker scores best
    assert selection["mrpc"]["a"]["chosen"] == selection["mrpc"]["b"]["chosen"] == chosen
    assert [score for _, score in selection["mrpc"]["a"]["tried"]] == pytest.approx([2 / 3, 1, 1 / 2])
    assert trial_json(counting_workers, "mrpc/a/seed-1")["training"]["learning_rate"] == 1e-3
    assert trial_json(counting_workers, "mrpc/a/seed-1")["purpose"] == "report"
    assert trial_json(counting_workers, "select/mrpc/a/learning_rate=0.0005")["purpose"] == "select"
    assert len(run(grid).skipped) == 10


def test_a_part_is_run_alone_and_the_rest_later_as_if_in_one(counting_workers):
    select = {"over": {"training.learning_rate": [5e-4, 1e-3]}, "seed": 7, "training": {"max_steps": 2}}
    grid = counting_grid(counting_workers, select=select)
    first = run(grid, part=Part(methods=("b",)))
    assert len(first.finished) == 4
    assert all("/b/" in name for name in first.finished)
    assert list(json.loads((counting_workers / "selection.json").read_text())["mrpc"]) == ["b"]
    assert list(yaml.safe_load((counting_workers / "grid.yaml").read_text())["methods"]) == ["a", "b"]
    assert [state for _, state in survey(grid, Part(tasks=("mrpc",), methods=("b",)))] == ["finished"] * 4
    second = run(grid)
    assert len(second.skipped) == 4
    assert all("/a/" in name for name in second.finished)
    assert list(json.loads((counting_workers / "selection.json").read_text())["mrpc"]) == ["a", "b"]
    third = run(grid, part=Part(methods=("a",)))
    assert not third.finished
    assert list(json.loads((counting_workers / "selection.json").read_text())["mrpc"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("part", "message"),
    [(Part(tasks=("cola",)), "--tasks='cola'.*mrpc"), (Part(methods=("c",)), "--methods='c'.*a, b")],
)
def test_a_part_that_the_grid_has_not_is_refused(counting_workers, part, message):
    grid = counting_grid(counting_workers)
    for refused in (partial(run, grid, part=part), partial(survey, grid, part)):
        with pytest.raises(ConfigError, match=message):
            refused()
    assert not counting_workers.exists()


def test_a_method_without_a_chosen_setting_is_reported(counting_workers):
    methods = {"bad": {"kind": "x", "fail": "raise", "until": "absent"}, "good": {"kind": "x"}}
    select = {"over": {"training.learning_rate": [5e-4, 1e-3]}}
    outcome = run(counting_grid(counting_workers, methods=methods, select=select, seeds=[0, 1]))
    assert sorted(failure.name for failure in outcome.failed) == [
        "mrpc/bad/seed-0",
        "mrpc/bad/seed-1",
        "select/mrpc/bad/learning_rate=0.0005",
        "select/mrpc/bad/learning_rate=0.001",
    ]
    reported = next(failure for failure in outcome.failed if failure.name == "mrpc/bad/seed-0")
    assert "no run of its selection finished (DataError: no such file)" in reported.message
    assert reported.path.exists()
    assert {"mrpc/good/seed-0", "mrpc/good/seed-1"} < set(outcome.finished)


class Notes:
    def __init__(self):
        self.statuses, self.ends = [], []

    def on_status(self, status):
        self.statuses.append(status)

    def on_end(self, ended):
        self.ends.append(ended)


def test_a_watcher_sees_every_trial_and_never_more_than_the_processes(counting_workers):
    notes = Notes()
    methods = {"a": {"kind": "x", "pause": 0.05}, "b": {"kind": "x", "fail": "exit", "until": "absent"}}
    run(counting_grid(counting_workers, methods=methods), watcher=notes)
    assert sorted(ended.name for ended in notes.ends) == [f"mrpc/{m}/seed-{seed}" for m in "ab" for seed in (0, 1)]
    assert {ended.score is None for ended in notes.ends if ended.failure} == {True}
    assert {status.total for status in notes.statuses} == {4}
    assert max(len(status.running) for status in notes.statuses) == 2
    assert any(one.step > 0 and one.planned == 10 for status in notes.statuses for one in status.running)
    assert any(status.seconds_left is not None for status in notes.statuses)
    done = [status.done + status.failed for status in notes.statuses]
    assert done == sorted(done)


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def grid_file(counting_workers, monkeypatch, tmp_path):
    monkeypatch.setattr("aroma_lab.grid.run.run_grid", partial(run_grid, module="grid_worker"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "grid.yaml"
    methods = {"bad": {"kind": "x", "fail": "raise", "until": "absent"}, "good": {"kind": "x"}}
    path.write_text(yaml.safe_dump({**MINIMAL, "tasks": {"mrpc": None}, "methods": methods, "seeds": [0]}))
    return str(path)


def test_the_command_reports_failures_and_its_code_is_1(grid_file, capsys):
    assert main(["lab", "run", grid_file]) == 1
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        "Trials finished: 1 now, 0 earlier; failed: 1. Left in out: runs/, grid.yaml.",
        "failed: mrpc/bad/seed-0: DataError: no such file",
        "        out/runs/mrpc/bad/seed-0/failure.json",
        "Once the cause is mended: the same command with --retry-failed.",
    ]
    assert "1 of 2 · mrpc/bad/seed-0 · failed: DataError: no such file · " in output.err
    assert "2 of 2 · mrpc/good/seed-0 · score 0.6667 · " in output.err

    assert main(["lab", "run", grid_file, "methods.bad.fail=null", "--retry-failed", "--processes", "2"]) == 0
    assert "Trials finished: 1 now, 1 earlier; failed: 0." in capsys.readouterr().out


def test_the_command_lists_trials_and_runs_nothing(grid_file, capsys):
    assert main(["lab", "run", grid_file, "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "new         mrpc/bad/seed-0",
        "new         mrpc/good/seed-0",
        "2 trials: 2 new",
    ]
    assert not Path("out").exists()
    main(["lab", "run", grid_file])
    capsys.readouterr()
    main(["lab", "run", grid_file, "seeds=[0, 1]", "--list"])
    assert capsys.readouterr().out.splitlines() == [
        "failed      mrpc/bad/seed-0",
        "finished    mrpc/good/seed-0",
        "new         mrpc/bad/seed-1",
        "new         mrpc/good/seed-1",
        "4 trials: 1 failed, 1 finished, 2 new",
    ]


def test_the_survey_knows_what_the_selection_chose(counting_workers):
    select = {"over": {"training.learning_rate": [5e-4, 1e-3]}, "training": {"max_steps": 2}}
    grid = counting_grid(counting_workers, select=select, seeds=[0])
    assert {state for _, state in survey(grid)} == {"new"}
    run(grid)
    assert [state for _, state in survey(grid)] == ["finished"] * 6
    changed = counting_grid(counting_workers, select=select, seeds=[0], training={"max_steps": 11, "warmup_steps": 1})
    assert [state for _, state in survey(changed)] == ["finished"] * 4 + ["conflict"] * 2


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3540, "59 min"), (3590, "1 h 0 min"), (7800, "2 h 10 min")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_on_a_terminal_every_running_trial_has_a_bar():
    first, second = expand(make_grid({**MINIMAL, "tasks": {"mrpc": None}, "seeds": [0]}))
    running = (Running(first, 4, 10, 1.0), Running(second, 0, None, None))
    paper = io.StringIO()
    console = Console(file=paper, force_terminal=True, width=150, highlight=False, markup=False)
    with GridProgress(console) as progress:
        progress.on_status(GridStatus(total=9, done=3, failed=1, running=running, seconds_left=7800))
        progress._bars.refresh()
        shown = paper.getvalue()
        progress.on_end(Ended("mrpc/lora-r8/seed-0", None, 0.5, 12.0))
    for text in (
        "3 of 9 done, 1 failed · about 2 h 10 min left",
        "mrpc/lora-r8/seed-0",
        "step 4 of 10",
        "mrpc/head/seed-0",
        "starting",
    ):
        assert text in shown
    assert "5 of 9 · mrpc/lora-r8/seed-0 · score 0.5000 · 12 s · about 2 h 10 min left" in paper.getvalue()


def test_an_error_of_the_command_is_one_line_and_code_2(grid_file, capsys):
    assert main(["lab", "run", grid_file, "sedes=[1]"]) == 2
    assert capsys.readouterr().err == "error: sedes=[1]: a grid has no such key; the nearest is 'seeds'\n"
