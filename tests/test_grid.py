"""Grids: from a file to trials, what is chosen, what is run, skipped, refused and reported."""

from __future__ import annotations

import io
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from aroma.cli import main
from aroma.errors import ConfigError, DataError
from aroma_lab.cli.lab_progress import StudyProgress
from aroma_lab.run.trial import save_trial
from aroma_lab.study.engine import Progress
from aroma_lab.study.grid import check_methods, expand, load_grid, make_grid
from aroma_lab.study.process import Running
from aroma_lab.study.run import list_grid, run_grid
from aroma_lab.study.selection import Outcome, candidates, choose, chosen_settings
from fake_trial import score_of
from study_files import FAKE, RATE, TESTS, environment, grid_values, output_of, runs_in, start_machine, write_yaml

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

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
def out(monkeypatch, tmp_path) -> Path:
    """The output folder of a grid whose trials are stand-ins."""
    for key, value in environment(tmp_path / "log.txt").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("aroma_lab.study.run.check_methods", lambda trials: None)
    return tmp_path / "out"


def fake_grid(output, **changes):
    return make_grid(grid_values(output, **changes))


run = partial(run_grid, module=FAKE)


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


def test_the_resolved_grid_is_read_back_as_it_was_and_has_no_password(tmp_path):
    select = {"over": {RATE: [1e-3, 2e-3]}, "seed": 9, "training": {"max_steps": 3}}
    overrides = [{"task": "rte", "method": ["head"], "options.x": [1, "a"], "task.max_length": 99}]
    values = {**MINIMAL, "select": select, "overrides": overrides, "processes": 3}
    grid = make_grid(values)
    assert load_grid(write_yaml(tmp_path / "grid.yaml", grid.as_dict())) == grid
    assert grid.overrides[0].methods == ("head",)
    assert make_grid({**values, "storage": "postgresql://me:s3cret@host/db"}).as_dict() == grid.as_dict()


def test_overrides_win_over_the_file_and_arguments_over_both(tmp_path):
    methods = {"lora-0.5": {"kind": "lora"}, "lora": {"kind": "lora"}}
    path = write_yaml(tmp_path / "grid.yaml", {**MINIMAL, "methods": methods})
    overrides = [
        "seeds=[3]",
        f"{RATE}=1e-4",
        "methods.lora-0.5.r=4",
        "methods.lora.alpha=1e1",
        "tasks.mrpc.max_length=64",
        f"select.over.{RATE}=[1e-3]",
        "processes=2",
    ]
    grid = load_grid(path, overrides, processes=3, storage=None)
    assert (grid.seeds, grid.training.learning_rate, grid.training.max_steps) == ((3,), 1e-4, 10)
    assert grid.methods["lora-0.5"].options == {"r": 4}
    assert grid.methods["lora"].options == {"alpha": 10.0}
    assert grid.tasks["mrpc"].max_length == 64
    assert grid.select.over == {RATE: [1e-3]}
    assert grid.processes == 3
    assert grid.training.threads == 1, "unless the grid says otherwise"
    assert make_grid({**MINIMAL, "training": {"threads": None}}).training.threads is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "sedes=[1]: a grid has no such key; the nearest is 'seeds'"),
        ({"output": None}, "output=None: give a text"),
        ({"model": ""}, "model='': give it"),
        ({"processes": 0}, "processes=0: give 1 or more"),
        ({"tasks": {}}, "tasks={}: give at least one"),
        ({"tasks": {"mr/pc": {}}}, "tasks='mr/pc': it names folders"),
        ({"tasks": {"select": {}}}, "tasks='select': it would share a folder"),
        (
            {"tasks": {"mrpc": {"maxlength": 3}}},
            "tasks.mrpc.maxlength=3: a grid has no such key; the nearest is 'task",
        ),
        ({"tasks": {"mrpc": {"reported": "test"}}}, "tasks.mrpc.reported='test': give a mapping of texts or null"),
        ({"methods": {"lora": {"r": 8}}}, "methods.lora.kind=None: give a text"),
        ({"methods": {"lora": 8}}, "methods={'lora': 8}: give a mapping of values"),
        ({"methods": {"lora": {"kind": "lora", "r": float("nan")}}}, "methods.lora.r=nan: give a finite number"),
        ({"training": {"batch_size": 0}}, "training.batch_size=0: give 1 or more"),
        ({"training": {"batchsize": 8}}, "training.batchsize=8: a grid has no such key; the nearest is 'training.bat"),
        ({"training": {"seed": 8}}, "training.seed=8: a grid has `seeds`"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: give at least one, 0 or more, each once"),
        ({"seeds": ["a"]}, "seeds=['a']: give a list of whole numbers"),
        ({"overrides": {"task": "rte"}}, "overrides={'task': 'rte'}: give a list"),
        ({"overrides": [{"task": "rt"}]}, "overrides[0].task='rt': the grid has no such task; it has mrpc, rte"),
        ({"overrides": [{"methods": "head"}]}, "overrides[0].methods='head': a grid has no such key; the nearest is "),
        ({"overrides": [{"training.max_steps": "x"}]}, "overrides[0].training.max_steps='x': give a whole number"),
        ({"overrides": [{"training.seed": 3}]}, "overrides[0].training.seed=3: seeds are given by `seeds`"),
        ({"select": {}}, "select.over=None: name what to try"),
        ({"select": {"over": {RATE: 1e-3}}}, f"select.over.{RATE}=0.001: give a list"),
        ({"select": {"over": {RATE: [1, "x"]}}}, f"select.over.{RATE}='x': give a n"),
        ({"select": {"over": {"options.r": [1, 1]}}}, "select.over.options.r=[1, 1]: it has a value twice"),
        ({"select": {"ower": {}}}, "select.ower={}: a grid has no such key; the nearest is 'select.over'"),
    ],
    ids=lambda value: json.dumps(value, default=str)[:40] if isinstance(value, dict) else "",
)
def test_a_value_that_cannot_work_is_refused_by_key_value_and_remedy(changes, message):
    with pytest.raises(ConfigError) as caught:
        make_grid({**MINIMAL, **changes})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("methods: {a: {kind: x}}\nmethods: {}", [], "the key 'methods' is given twice, the second time in line 2"),
        ("methods: [a: b", [], "not YAML"),
        ("- a", [], "it holds a list; a grid is a mapping of keys"),
        ("seeds: [0, 1]", ["seeds.first=3"], r"^seeds\.first=3: 'seeds' holds \[0, 1\], which has no keys"),
    ],
)
def test_a_file_that_is_no_grid_is_refused(tmp_path, text, overrides, message):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_grid(path, overrides)


@pytest.mark.parametrize("select", [None, {"over": {"options.dropout": [0.0, 0.1]}}], ids=["", "select"])
@pytest.mark.parametrize(("method", "named"), [({"kind": "lora", "rr": 8}, "rr"), ({"kind": "lorra"}, "lorra")])
def test_a_wrong_option_or_kind_is_refused_under_its_label_before_anything_is_written(tmp_path, method, named, select):
    grid = make_grid({**MINIMAL, "output": str(tmp_path / "out"), "methods": {"mine": method}, "select": select})
    with pytest.raises(ConfigError, match=rf"^methods\.mine: .*{named}"):
        run_grid(grid)
    assert not (tmp_path / "out").exists()


# From a grid to trials ----------------------------------------------------------------------------------------------


def test_trials_come_seed_by_seed_and_are_resolved():
    trials = expand(make_grid(MINIMAL))
    assert [trial.name for trial in trials] == [
        f"{task}/{method}/seed-{seed}" for seed in (0, 1) for task in ("mrpc", "rte") for method in ("lora-r8", "head")
    ]
    first = trials[0]
    assert (first.model, first.task.name, first.method, first.kind) == ("minilm", "mrpc", "lora-r8", "lora")
    assert (first.options, first.purpose) == ({"r": 8}, "report")
    assert [trial.training.seed for trial in trials] == [0] * 4 + [1] * 4
    assert [trial.task.max_length for trial in trials[1:4]] == [256, 128, 128]


def test_later_overrides_win_where_they_apply():
    overrides = [
        {"training.max_steps": 20, "task.max_length": 64},
        {"task": "rte", "training.max_steps": 30, "options.r": 2},
        {"task": ["rte"], "method": "lora-r8", "training.max_steps": 40, "model": "other"},
    ]
    made = {trial.name: trial for trial in expand(make_grid({**MINIMAL, "overrides": overrides, "seeds": [0]}))}
    assert {name: trial.training.max_steps for name, trial in made.items()} == {
        "mrpc/lora-r8/seed-0": 20,
        "mrpc/head/seed-0": 20,
        "rte/lora-r8/seed-0": 40,
        "rte/head/seed-0": 30,
    }
    assert [trial.options.get("r") for trial in made.values()] == [8, None, 2, 2]
    assert [trial.model for trial in made.values()] == ["minilm", "minilm", "other", "minilm"]
    assert {trial.task.max_length for trial in made.values()} == {64}


def test_a_selection_tries_the_product_and_what_is_tried_wins_over_its_overrides_and_these_over_the_grids():
    select = {
        "over": {RATE: [1e-4, 1e-3], "options.r": [1, 2]},
        "seed": 100,
        "training": {"max_steps": 4},
        "overrides": [{"method": "lora-r8", "options.dropout": 0.5, RATE: 9.0}],
    }
    grid = make_grid({**MINIMAL, "select": select, "overrides": [{"training.max_steps": 7, "options.r": 5}]})
    assert make_grid(grid.as_dict()) == grid
    tried = candidates(grid)
    assert len(tried) == 2 * 2 * 4
    assert [one.trial.name for one in tried[:4]] == [
        f"select/mrpc/lora-r8/learning_rate={rate},r={r}" for rate in (0.0001, 0.001) for r in (1, 2)
    ]
    for one in tried:
        assert (one.trial.purpose, one.trial.training.seed, one.trial.training.max_steps) == ("select", 100, 4)
        assert (one.trial.training.learning_rate, one.trial.options["r"]) == tuple(one.values.values())
        assert one.trial.options.get("dropout") == (0.5 if one.method == "lora-r8" else None)
    assert expand(grid)[0].options == {"r": 5}, "reported trials have none of it"


def test_values_that_no_folder_can_be_called_have_names_of_their_own():
    over = {"options.target": ["a/b", "a:b"], "task.label": ["x"]}
    names = [one.trial.name for one in candidates(make_grid({**MINIMAL, "select": {"over": over}}))]
    assert len(set(names)) == len(names) == 8
    assert all(".." not in name and ":" not in name and name.count("/") == 3 for name in names)


def test_the_best_score_is_chosen_of_equal_ones_the_lower_loss_and_never_a_failed_one():
    grid = make_grid({**MINIMAL, "tasks": {"mrpc": None}, "select": {"over": {RATE: [1, 2, 3]}}})
    tried = candidates(grid)
    one, two, three = (f"select/mrpc/lora-r8/learning_rate={n}.0" for n in (1, 2, 3))
    even, worse, lower = Outcome(0.5, -0.7), Outcome(0.4, -0.1), Outcome(0.5, -0.6)
    assert choose(tried, {one: even, two: worse, three: lower})["mrpc"]["lora-r8"]["chosen"] == {RATE: 3.0}
    selection = choose(tried, {one: even, three: even})
    assert selection["mrpc"]["lora-r8"] == {
        "chosen": {RATE: 1.0},
        "tried": [[{RATE: 1.0}, 0.5], [{RATE: 2.0}, None], [{RATE: 3.0}, 0.5]],
    }
    assert selection["mrpc"]["head"]["chosen"] is None
    trials = expand(grid, chosen_settings(selection))
    assert [trial.name for trial in trials] == ["mrpc/lora-r8/seed-0", "mrpc/lora-r8/seed-1"]
    assert {(trial.training.learning_rate, trial.training.max_steps) for trial in trials} == {(1.0, 10)}


# Running ------------------------------------------------------------------------------------------------------------


def test_all_trials_are_run_once_and_a_removed_folder_is_run_again(out):
    grid = fake_grid(out, training={"max_steps": 10})
    names = [trial.name for trial in expand(grid)]
    outcome = run(grid)
    assert sorted(outcome.finished) == sorted(names)
    assert (outcome.failed, outcome.skipped) == ([], [])
    assert load_grid(out / "grid.yaml") == grid
    shutil.rmtree(out / "runs" / names[2])
    again = run(grid)
    assert (again.finished, again.failed) == ([names[2]], [])
    (out / "study.journal").unlink()
    assert run(grid).skipped == names, "the results are enough"
    assert all(steps(out, name) == [f"step {n}" for n in range(1, 11)] + ["finished"] for name in names)


@pytest.mark.parametrize(
    ("how", "message", "tries"),
    [
        ("raise", "DataError: no such file", 1),
        ("exit", "WorkerEnded: the process ended with code 3 and left no result", 1),
        ("kill", "WorkerKilled: the process was ended by SIGKILL; the kernel does so when memory runs out", 3),
    ],
)
def test_a_failing_trial_is_reported_and_stops_no_other(out, how, message, tries, tmp_path):
    mended = tmp_path / "mended"
    methods = {"bad": {"kind": "x", "fail": how, "until": str(mended)}, "good": {"kind": "x"}}
    grid = fake_grid(out, methods=methods, seeds=[0])
    for _ in range(2):  # the second time it is not run again, and reported again
        outcome = run(grid)
        assert [failure.name for failure in outcome.failed] == ["mrpc/bad/seed-0"]
        assert outcome.failed[0].message.endswith(message)
        assert outcome.finished + outcome.skipped == ["mrpc/good/seed-0"]
    failure = json.loads(outcome.failed[0].path.read_text())
    assert how == "raise" or failure["traceback"] == ["about to end"]
    assert runs_in(tmp_path / "log.txt")["mrpc/bad/seed-0"] == tries

    mended.touch()
    outcome = run(grid, retry_failed=True)
    assert (outcome.finished, outcome.failed) == (["mrpc/bad/seed-0"], [])
    assert not (out / "runs/mrpc/bad/seed-0/failure.json").exists()


def test_a_trial_whose_process_is_killed_is_taken_up_again_from_its_checkpoint(out):
    methods = {"bad": {"kind": "x", "fail": "kill once", "until": "absent"}}
    outcome = run(fake_grid(out, methods=methods, seeds=[0], training={"max_steps": 14}))
    assert outcome.finished == ["mrpc/bad/seed-0"]
    assert steps(out, "mrpc/bad/seed-0") == [f"step {n}" for n in [*range(1, 8), *range(6, 15)]] + ["finished"]


def test_a_finished_trial_of_another_grid_is_refused_by_its_key(out):
    run(fake_grid(out, seeds=[0]))
    before = steps(out, "mrpc/a/seed-0")
    with pytest.raises(ConfigError) as caught:
        run(fake_grid(out, seeds=[0, 1], training={"max_steps": 20, "weight_decay": 0.1}))
    for part in ("mrpc/a/seed-0 (", "training.max_steps", "training.weight_decay", "mrpc/b/seed-0"):
        assert part in str(caught.value)
    assert steps(out, "mrpc/a/seed-0") == before
    assert not (out / "runs/mrpc/a/seed-1").exists()  # nothing was run


def test_a_trial_that_failed_is_run_anew_when_the_grid_changes(out):
    methods = {"bad": {"kind": "x", "fail": "exit", "until": "absent"}}
    assert len(run(fake_grid(out, methods=methods, seeds=[0])).failed) == 1
    outcome = run(fake_grid(out, methods={"bad": {"kind": "x"}}, seeds=[0]))
    assert outcome.finished == ["mrpc/bad/seed-0"]
    assert steps(out, "mrpc/bad/seed-0")[0] == "step 1"  # not from the checkpoint of another trial
    assert trial_json(out, "mrpc/bad/seed-0")["options"] == {}


def test_files_of_the_users_are_not_overwritten(out):
    mine = out / "grid.yaml"
    out.mkdir()
    mine.write_text("# mine\n")
    with pytest.raises(ConfigError, match=r"grid\.yaml there is your own"):
        run(fake_grid(out))
    assert [path.name for path in out.iterdir()] == ["grid.yaml"]


def test_two_commands_on_one_output_share_its_trials(out, tmp_path):
    values = grid_values(out, methods={"a": {"kind": "x", "pause": 0.02}, "b": {"kind": "x", "pause": 0.02}})
    file, log = write_yaml(tmp_path / "grid.yaml", values), tmp_path / "log.txt"
    machines = [start_machine(file, log) for _ in range(2)]
    for machine in machines:
        finished, skipped, failed = map(int, output_of(machine).split())
        assert (finished + skipped, failed) == (4, 0)
    assert list(runs_in(log).values()) == [1] * 4


# Several machines ---------------------------------------------------------------------------------------------------


def machines(tmp_path, count, **changes):
    """Write one file a machine: each has an output folder of its own, and all share a database."""
    shared = {"storage": f"sqlite:///{tmp_path / 'shared.db'}", "study": "shared", "heartbeat": 1, **changes}
    return [write_yaml(tmp_path / f"{n}.yaml", grid_values(tmp_path / f"out-{n}", **shared)) for n in range(count)]


def test_a_worker_on_another_machine_helps_and_both_know_what_was_chosen(out, tmp_path):
    log = tmp_path / "log.txt"
    methods = {label: {"kind": "x", "pause": 0.1} for label in "ab"}
    files = machines(tmp_path, 2, methods=methods, select={"over": {RATE: [1e-3, 1e-2]}}, processes=1)
    worker = start_machine(files[1], log, role="work")
    runner = start_machine(files[0], log)
    assert output_of(runner) == "8 0 0\n"
    assert 1 <= int(output_of(worker)) <= 7
    assert list(runs_in(log).values()) == [1] * 8
    selection = json.loads((tmp_path / "out-0" / "selection.json").read_text())
    assert [one["chosen"] for one in selection["mrpc"].values()] == [{RATE: 1e-3}] * 2
    third = load_grid(files[0], [f"output={tmp_path / 'out-2'}"])
    assert {state for _, state in list_grid(third)} == {"finished"}
    assert (len(run(third).skipped), sum(runs_in(log).values())) == (8, 8)


def test_another_grid_in_a_shared_study_is_refused_and_failures_of_other_machines_are_known(out, tmp_path):
    methods = {"bad": {"kind": "x", "fail": "raise", "until": "absent"}, "good": {"kind": "x"}}
    one, two = (load_grid(file) for file in machines(tmp_path, 2, methods=methods, seeds=[0]))
    assert len(run(one).failed) == 1
    (failure,) = run(two).failed
    assert (failure.name, failure.path) == ("mrpc/bad/seed-0", None)
    assert failure.message.startswith("DataError: no such file (on ")
    with pytest.raises(ConfigError, match=r"mrpc/good/seed-0 was run with another training\.max_steps; use the same"):
        run(load_grid(tmp_path / "1.yaml", ["training.max_steps=11"]))
    assert not (tmp_path / "out-1" / "runs").exists()


# Tasks that cannot be loaded ----------------------------------------------------------------------------------------


MESSAGES = {
    "source": str(TESTS.parent / "examples" / "lab" / "messages"),
    "train": "train.jsonl",
    "reported": {"test": "test.jsonl"},
    "label": "topic",
    "max_length": 32,
}
HEAD = {"head": {"kind": "head_only"}}


@pytest.fixture
def no_trial(monkeypatch):
    monkeypatch.setattr("aroma_lab.study.engine.TrialProcess", lambda *args: pytest.fail("a trial was started"))


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ({"source": "/nope"}, DataError, "tasks.messages.source='/nope': no such folder"),
        ({"metric": "foo"}, ConfigError, "tasks.messages.metric='foo': no metric"),
        ({"reported": {"test": "nope.jsonl"}}, DataError, "tasks.messages.reported.test='nope.jsonl'"),
        ({"max_length": 9999}, ConfigError, "tasks.messages: data.max_length=9999"),
        ({"kind": "commonsense", "train": "nope.json"}, DataError, "tasks.messages.train="),
    ],
    ids=str,
)
@pytest.mark.parametrize("select", [None, {"over": {RATE: [1e-3, 2e-3]}}], ids=["", "select"])
def test_a_task_that_cannot_be_loaded_is_refused_before_anything_is_run(
    no_trial, tmp_path, task, error, message, select
):
    grid = fake_grid(tmp_path / "out", tasks={"messages": {**MESSAGES, **task}}, methods=HEAD, select=select)
    with pytest.raises(error) as caught:
        run_grid(grid)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "out").exists()


RESULT = {"score": 0.5, "held_out_loss": 0.5, "planned_steps": 10, "wall_seconds": 1.0}


def pretend(output, trials, name="result.json", content=RESULT):
    for trial in trials:
        folder = output / "runs" / trial.name
        folder.mkdir(parents=True, exist_ok=True)
        save_trial(trial, folder / "trial.json")
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("select", [None, {"over": {"task.label": ["topic"]}}], ids=["", "select"])
def test_a_decided_trial_needs_its_data_no_more(no_trial, tmp_path, select):
    out, task = tmp_path / "out", {**MESSAGES, "source": "/nope", "label": None}
    grid = fake_grid(out, tasks={"messages": task}, methods=HEAD, select=select)
    tried = [candidate.trial for candidate in candidates(grid)]
    pretend(out, tried)
    trials = expand(grid, {"messages": {"head": {"task.label": "topic"}}} if select else None)
    pretend(out, trials[:1])
    with pytest.raises(DataError, match="source='/nope'"):
        run_grid(grid)
    pretend(out, trials[1:], "failure.json", {"error": "DataError", "message": "no such file"})
    outcome = run_grid(grid)
    assert outcome.skipped == [trial.name for trial in [*tried, *trials[:1]]]
    assert [failure.message for failure in outcome.failed] == ["DataError: no such file"]
    with pytest.raises(DataError, match="source='/nope'"):
        run_grid(grid, retry_failed=True)


# Choosing -----------------------------------------------------------------------------------------------------------


def test_the_chosen_settings_are_run_and_written(out):
    select = {"over": {RATE: [5e-4, 1e-3, 2e-3]}, "seed": 7, "training": {"max_steps": 2}}
    grid = fake_grid(out, select=select)
    assert {state for _, state in list_grid(grid)} == {"new"}
    assert not out.exists(), "a list writes nothing"
    outcome = run(grid)
    assert len(outcome.finished) == 6 + 4
    assert all(name.startswith("select/") for name in outcome.finished[:6])
    selection = json.loads((out / "selection.json").read_text())
    assert selection["mrpc"]["a"]["chosen"] == selection["mrpc"]["b"]["chosen"] == {RATE: 1e-3}
    assert [score for _, score in selection["mrpc"]["a"]["tried"]] == [score_of(rate) for rate in (5e-4, 1e-3, 2e-3)]
    assert trial_json(out, "mrpc/a/seed-1")["training"]["learning_rate"] == 1e-3
    assert [trial_json(out, name)["purpose"] for name in (outcome.finished[0], "mrpc/a/seed-1")] == [
        "select",
        "report",
    ]
    assert len(run(grid).skipped) == 10
    assert [state for _, state in list_grid(grid)] == ["finished"] * 10
    changed = fake_grid(out, select=select, training={"max_steps": 11, "warmup_steps": 1})
    assert [state for _, state in list_grid(changed)] == ["finished"] * 6 + ["conflict"] * 4


def test_a_part_is_run_alone_and_the_rest_later_as_if_in_one(out):
    grid = fake_grid(out, select={"over": {RATE: [5e-4, 1e-3]}, "seed": 7, "training": {"max_steps": 2}})
    first = run(grid, methods=["b"])
    assert len(first.finished) == 4
    assert all("/b/" in name for name in first.finished)
    assert list(json.loads((out / "selection.json").read_text())["mrpc"]) == ["b"]
    assert list(yaml.safe_load((out / "grid.yaml").read_text())["methods"]) == ["a", "b"]
    assert [state for _, state in list_grid(grid, tasks=["mrpc"], methods=["b"])] == ["finished"] * 4
    second = run(grid)
    assert len(second.skipped) == 4
    assert all("/a/" in name for name in second.finished)
    assert not run(grid, methods=["a"]).finished
    assert list(json.loads((out / "selection.json").read_text())["mrpc"]) == ["a", "b"]
    for refused in (partial(run, grid), partial(list_grid, grid)):
        with pytest.raises(ConfigError, match=r"--methods='c'.*a, b"):
            refused(methods=["c"])


def test_a_method_without_a_chosen_setting_is_reported(out):
    methods = {"bad": {"kind": "x", "fail": "raise", "until": "absent"}, "good": {"kind": "x"}}
    outcome = run(fake_grid(out, methods=methods, select={"over": {RATE: [5e-4, 1e-3]}}))
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


# The command --------------------------------------------------------------------------------------------------------


class Notes:
    def __init__(self):
        self.progress, self.ends = [], {}

    def on_progress(self, progress):
        self.progress.append(progress)

    def on_end(self, name, failure, score, seconds):
        self.ends[name] = (failure, score)


def test_a_watcher_sees_every_trial_and_never_more_than_the_processes(out):
    notes = Notes()
    methods = {"a": {"kind": "x", "pause": 0.1}, "b": {"kind": "x", "fail": "exit", "until": "absent"}}
    run(fake_grid(out, methods=methods), watcher=notes)
    assert sorted(notes.ends) == [f"mrpc/{m}/seed-{seed}" for m in "ab" for seed in (0, 1)]
    assert all((failure is None) != (score is None) for failure, score in notes.ends.values())
    assert {progress.total for progress in notes.progress} == {4}
    assert max(len(progress.running) for progress in notes.progress) == 2
    assert any(one.step > 0 and one.planned == 10 for progress in notes.progress for one in progress.running)
    assert any(progress.seconds_left is not None for progress in notes.progress)
    decided = [progress.done + progress.failed for progress in notes.progress]
    assert decided == sorted(decided)
    assert decided[-1] == 4


@pytest.fixture
def grid_file(out, monkeypatch, tmp_path):
    monkeypatch.setattr("aroma_lab.study.run.run_grid", run)
    monkeypatch.chdir(tmp_path)
    methods = {"bad": {"kind": "x", "fail": "raise", "until": "absent"}, "good": {"kind": "x"}}
    return str(write_yaml(tmp_path / "grid.yaml", grid_values(Path("out"), methods=methods, seeds=[0])))


def test_the_command_reports_failures_and_its_code_is_1(grid_file, capsys):
    assert main(["lab", "run", grid_file]) == 1
    output = capsys.readouterr()
    assert "Trials finished: 1 now, 0 earlier; failed: 1." in output.out
    assert "failed: mrpc/bad/seed-0: DataError: no such file" in output.out
    assert "out/runs/mrpc/bad/seed-0/failure.json" in output.out
    assert "--retry-failed" in output.out
    assert "of 2 · mrpc/bad/seed-0 · failed: DataError: no such file · " in output.err
    assert "of 2 · mrpc/good/seed-0 · score " in output.err
    assert main(["lab", "run", grid_file, "methods.bad.fail=null", "--retry-failed", "--workers", "2"]) == 0
    assert "Trials finished: 1 now, 1 earlier; failed: 0." in capsys.readouterr().out


def test_the_command_lists_trials_and_runs_nothing(grid_file, capsys):
    def listed(*options):
        assert main(["lab", "run", grid_file, "--list", *options]) == 0
        return capsys.readouterr().out.splitlines()

    assert listed()[-1] == "2 trials: 2 new"
    assert not Path("out").exists()
    main(["lab", "run", grid_file])
    capsys.readouterr()
    assert [line.split() for line in listed("seeds=[0, 1]")[:-1]] == [
        ["failed", "mrpc/bad/seed-0"],
        ["finished", "mrpc/good/seed-0"],
        ["new", "mrpc/bad/seed-1"],
        ["new", "mrpc/good/seed-1"],
    ]


def test_an_error_of_the_command_is_one_line_and_code_2(grid_file, capsys):
    assert main(["lab", "run", grid_file, "sedes=[1]"]) == 2
    assert capsys.readouterr().err == "error: sedes=[1]: a grid has no such key; the nearest is 'seeds'\n"


def test_a_list_loads_no_heavy_library(grid_file):
    import subprocess
    import sys

    code = (
        "import sys; from aroma.cli import main; main(sys.argv[1:]); "
        "print({'torch', 'transformers', 'pandas'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, "lab", "run", grid_file, "--list"]
    assert subprocess.check_output(command, text=True).splitlines()[-1] == "set()"


def test_on_a_terminal_every_running_trial_has_a_bar():
    running = (Running("mrpc/lora/seed-0", 4, 10), Running("mrpc/head/seed-0", 0, None))
    paper = io.StringIO()
    console = Console(file=paper, force_terminal=True, width=150, highlight=False, markup=False)
    with StudyProgress(console) as progress:
        progress.on_progress(Progress(total=9, done=3, failed=1, running=running, seconds_left=7800))
        progress._bars.refresh()
        progress.on_end("mrpc/lora/seed-0", None, 0.5, 12.0)
    for text in ("3 of 9 done, 1 failed · about 2 h 10 min left", "step 4 of 10", "mrpc/head/seed-0", "starting"):
        assert text in paper.getvalue()
    assert "5 of 9 · mrpc/lora/seed-0 · score 0.5000 · 12 s · about 2 h 10 min left" in paper.getvalue()
