"""Grids: from a file to trials, what is chosen, what is run, skipped, refused and reported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import yaml

from aroma.cli import main
from aroma.errors import ConfigError, DataError
from aroma_lab.study.grid import check_trials, expand, load_grid, make_grid
from aroma_lab.study.run import list_grid, run_grid
from aroma_lab.study.selection import select
from fake_trial import score_of
from study_files import DECAY, RATE, TESTS, grid_values, runs_in, whole_grid, write_yaml

EXAMPLES = sorted((TESTS.parent / "examples" / "lab").glob("*.yaml"))
BAD = {"kind": "x", "fail": "raise", "until": "absent"}


@pytest.fixture
def out(tmp_path) -> Path:
    """The output folder of a grid whose trials are stand-ins."""
    return tmp_path / "out"


def fake_grid(output, **changes):
    return make_grid(grid_values(output, **changes))


run = partial(run_grid, runner="fake_trial")


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
        check_trials(trials, [])
        assert f"aroma lab run examples/lab/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    "path", sorted((TESTS.parent / "results" / "lab").glob("*/grid.yaml")), ids=lambda path: path.parent.name
)
def test_the_grids_of_the_results_load_and_their_selections_are_of_them(path):
    grid, chosen = load_grid(path), path.with_name("selection.json")
    for task, methods in json.loads(chosen.read_text() if chosen.exists() else "{}").items():
        for method, entry in methods.items():
            assert {json.dumps(one.values) for one in select(grid, task, method, {}.get).tried} <= {
                json.dumps(values) for values, _ in entry["tried"]
            }


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(tmp_path):
    methods = {"lora-0.5": {"kind": "lora"}, "lora": {"kind": "lora"}}
    path = write_yaml(tmp_path / "grid.yaml", grid_values(tmp_path, methods=methods))
    overrides = [
        "seeds=[3]",
        f"{RATE}=1e-4",
        "methods.lora-0.5.r=4",
        "methods.lora.alpha=1e1",
        "tasks.mrpc.max_length=64",
        f"select.over.{RATE}=[1e-3]",
        "processes=2",
        "processes=3",
    ]
    grid = load_grid(path, overrides)
    trial = expand(grid)[0]
    assert (grid.seeds, trial.training.learning_rate, trial.training.max_steps) == ([3], 1e-4, 10)
    assert grid.methods == {"lora-0.5": {"kind": "lora", "r": 4}, "lora": {"kind": "lora", "alpha": 10.0}}
    assert trial.task.max_length == 64
    assert grid.select.over == {RATE: [1e-3]}
    assert grid.processes == 3
    assert trial.training.threads == 1, "unless the grid says otherwise"
    assert expand(whole_grid(training={"threads": None}))[0].training.threads is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "sedes=[1]: a grid has no such key; the nearest is 'seeds'"),
        ({"tasks": {"mr/pc": {}}}, "tasks.mr/pc.name='mr/pc': it names folders"),
        ({"methods": {"lora": {"r": 8}}}, "methods.lora.kind=None: give a value of type str"),
        ({"training": {"batchsize": 8}}, "training.batchsize=8: a grid has no such key; the nearest is 'training.bat"),
        ({"training": {"seed": 8}}, "training.seed=8: a grid has no such key"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: give at least one, 0 or more, each once"),
        ({"overrides": [{"task": "rt"}]}, "overrides[0].task='rt': the grid has no such task; it has mrpc, rte"),
        ({"select": {}}, "select.over=None: name what to try"),
        ({"overrides": [{"task": "rte", RATE: "x"}]}, f"{RATE}='x': give a value of type float"),
        ({"select": {"over": {RATE: 1}}}, f"select.over={{'{RATE}': 1}}: name what to try"),
    ],
    ids=str,
)
def test_a_value_that_cannot_work_is_refused_by_key_value_and_remedy(changes, message):
    with pytest.raises(ConfigError) as caught:
        whole_grid(**changes)
    assert str(caught.value).startswith(message)


# From a grid to trials ----------------------------------------------------------------------------------------------


def test_trials_come_seed_by_seed_and_later_overrides_win_where_they_apply():
    overrides = [
        {"training.max_steps": 20, "task.max_length": 64},
        {"task": "rte", "training.max_steps": 30, "options.r": 2},
        {"task": ["rte"], "method": "lora", "training.max_steps": 40, "model": "other"},
    ]
    trials = expand(whole_grid(overrides=overrides))
    assert [trial.name for trial in trials] == [
        f"{task}/{method}/seed-{seed}" for seed in (0, 1) for task in ("mrpc", "rte") for method in ("lora", "head")
    ]
    assert [trial.training.seed for trial in trials] == [0] * 4 + [1] * 4
    assert [trial.training.max_steps for trial in trials[:4]] == [20, 20, 40, 30]
    assert [trial.options for trial in trials[:4]] == [{"r": 8}, {}, {"r": 2}, {"r": 2}]
    assert [trial.model for trial in trials[:4]] == ["minilm", "minilm", "other", "minilm"]
    assert {trial.task.max_length for trial in trials} == {64}
    assert [trial.task.max_length for trial in expand(whole_grid())[1:4]] == [256, 128, 128]
    assert (trials[1].task.name, trials[1].method, trials[1].kind) == ("mrpc", "head", "head_only")


def test_a_task_names_the_folder_of_data_that_a_person_gives():
    tasks = {"mrpc": {"source": "{data}/mrpc"}, "other": {"source": "/data/{}"}}
    trials = expand(whole_grid(tasks=tasks, data="/mine"))
    assert {trial.task.source for trial in trials} == {"/mine/mrpc", "/data/{}"}
    with pytest.raises(
        ConfigError, match=r"data=None: tasks\.mrpc\.source='\{data\}/mrpc' is below it; give the folder"
    ):
        expand(whole_grid(tasks=tasks))


# Running ------------------------------------------------------------------------------------------------------------


def test_all_trials_are_run_once_and_a_removed_folder_is_run_again(out):
    grid = fake_grid(out, training={"max_steps": 10})
    names = [trial.name for trial in expand(grid)]
    outcome = run(grid)
    assert outcome == (names, {}, [])
    assert load_grid(out / "grid.yaml") == grid
    shutil.rmtree(out / "runs" / names[2])
    assert run(grid) == ([names[2]], {}, [*names[:2], names[3]])
    assert all(steps(out, name) == [f"step {n}" for n in range(1, 11)] + ["finished"] for name in names)


@pytest.mark.parametrize(
    ("how", "message", "tries"),
    [
        ("raise", "DataError: no such file", 1),
        ("exit", "WorkerKilled: its process was ended 3 times, the last time with exit code 3", 3),
        ("kill", "WorkerKilled: its process was ended 3 times, the last time by SIGKILL, as when memory runs out", 3),
    ],
)
def test_a_failing_trial_is_reported_and_stops_no_other(out, how, message, tries, tmp_path):
    mended, name = tmp_path / "mended", "mrpc/bad/seed-0"
    methods = {"bad": {"kind": "x", "fail": how, "until": str(mended)}, "good": {"kind": "x"}}
    grid = fake_grid(out, methods=methods, seeds=[0])
    for _ in range(2):  # the second time it is not run again, and reported again
        outcome = run(grid)
        assert [*outcome.failed] == [name]
        assert outcome.failed[name].startswith(message)
        assert outcome.finished + outcome.skipped == ["mrpc/good/seed-0"]
    failure = json.loads((out / "runs" / name / "failure.json").read_text())
    assert how == "raise" or failure["traceback"] == ["about to end"]
    # Another worker may have taken it up once more before the last death was noticed.
    assert tries <= runs_in(tmp_path / "log.txt")[name] <= tries + (tries > 1)
    mended.touch()
    assert run(grid, retry_failed=True) == ([name], {}, ["mrpc/good/seed-0"])


def test_what_another_grid_or_the_user_made_is_not_overwritten(out):
    run(fake_grid(out, seeds=[0]))
    before = steps(out, "mrpc/a/seed-0")
    changed = fake_grid(out, seeds=[0, 1], training={"max_steps": 20, "weight_decay": 0.1})
    assert [state for _, state in list_grid(changed)] == ["conflict"] * 2 + ["new"] * 2
    with pytest.raises(ConfigError, match=rf"mrpc/a/seed-0 was made with another .*training\.max_steps, .*{DECAY}"):
        run(changed)
    assert steps(out, "mrpc/a/seed-0") == before
    assert not (out / "runs/mrpc/a/seed-1").exists(), "nothing was run"
    (out / "grid.yaml").write_text("# mine\n")
    with pytest.raises(ConfigError, match=r"grid\.yaml there is your own"):
        run(fake_grid(out))
    assert (out / "grid.yaml").read_text() == "# mine\n"


def test_a_trial_that_failed_is_run_anew_when_the_grid_changes(out):
    assert len(run(fake_grid(out, methods={"bad": BAD}, seeds=[0])).failed) == 1
    outcome = run(fake_grid(out, methods={"bad": {"kind": "x"}}, seeds=[0]))
    assert outcome.finished == ["mrpc/bad/seed-0"]
    assert steps(out, "mrpc/bad/seed-0")[0] == "step 1"  # not from the checkpoint of another trial
    assert trial_json(out, "mrpc/bad/seed-0")["options"] == {}


# What cannot work ---------------------------------------------------------------------------------------------------


MESSAGES = {
    "source": str(TESTS.parent / "examples" / "lab" / "messages"),
    "train": "train.jsonl",
    "reported": {"test": "test.jsonl"},
    "label": "topic",
    "max_length": 32,
}


@pytest.mark.parametrize(
    ("task", "method", "error", "message"),
    [
        ({"source": "/nope"}, {}, DataError, "tasks.messages.source='/nope': no such folder"),
        ({"reported": {"test": "nope.jsonl"}}, {}, DataError, "tasks.messages.reported.test='nope.jsonl'"),
        ({"max_length": 9999}, {}, ConfigError, "tasks.messages.max_length=9999"),
        ({}, {"kind": "lora", "rr": 8}, ConfigError, "methods.mine: options.rr=8"),
        ({}, {"kind": "lorra"}, ConfigError, "methods.mine: kind='lorra'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("select", [None, {"over": {RATE: [1e-3, 2e-3]}}], ids=["", "select"])
def test_what_cannot_work_is_refused_under_its_label_before_anything_is_written(
    tmp_path, task, method, error, message, select
):
    methods = {"mine": method or {"kind": "head_only"}}
    grid = fake_grid(tmp_path / "out", tasks={"messages": {**MESSAGES, **task}}, methods=methods, select=select)
    with pytest.raises(error) as caught:
        run_grid(grid)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "out").exists()


# Choosing -----------------------------------------------------------------------------------------------------------


def test_the_chosen_settings_are_run_and_written_and_a_part_is_run_as_if_in_one(out):
    rule = {"over": {RATE: [5e-4, 1e-3, 2e-3]}, "seed": 7, "training": {"max_steps": 2}}
    grid = fake_grid(out, select=rule)
    assert [state for _, state in list_grid(grid)] == ["new"] * 6
    assert not out.exists(), "a list writes nothing"
    first = run(grid, methods=["b"])
    assert len(first.finished) == 3 + 2
    assert all("/b/" in name for name in first.finished)
    assert list(json.loads((out / "selection.json").read_text())["mrpc"]) == ["b"]
    assert list(yaml.safe_load((out / "grid.yaml").read_text())["methods"]) == ["a", "b"]
    assert [state for _, state in list_grid(grid.part(methods=["b"]))] == ["finished"] * 5
    second = run(grid)
    assert (len(second.skipped), len(second.finished)) == (5, 5)
    entries = json.loads((out / "selection.json").read_text())["mrpc"]
    assert entries["a"]["chosen"] == entries["b"]["chosen"] == {RATE: 1e-3}
    assert [score for _, score in entries["a"]["tried"]] == [score_of(rate) for rate in (5e-4, 1e-3, 2e-3)]
    assert trial_json(out, "mrpc/a/seed-1")["training"]["learning_rate"] == 1e-3
    purposes = [trial_json(out, name)["purpose"] for name in (first.finished[0], "mrpc/a/seed-1")]
    assert purposes == ["select", "report"]
    for refused in (partial(run, grid), grid.part):
        with pytest.raises(ConfigError, match=r"--methods='c'.*a, b"):
            refused(methods=["c"])


def test_a_selection_is_widened_and_run_with_further_seeds_and_goes_on_where_it_was(out):
    rates = [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]
    rule = {"over": {RATE: rates[:2]}, "widen": 5, "again": [1]}
    grid = fake_grid(out, methods={"a": {"kind": "x"}}, select=rule)
    finished = run(grid).finished
    further = [f"select/mrpc/a/learning_rate={rate},seed=1" for rate in (8e-4, 4e-4)]
    assert finished == [
        *(f"select/mrpc/a/learning_rate={rate}" for rate in rates),
        *further,
        "mrpc/a/seed-0",
        "mrpc/a/seed-1",
    ]
    text = (out / "selection.json").read_text()
    entry = {"chosen": {RATE: 8e-4}, "tried": [[{RATE: rate}, pytest.approx(score_of(rate))] for rate in rates]}
    assert json.loads(text)["mrpc"]["a"] == entry
    assert trial_json(out, "mrpc/a/seed-1")["training"]["learning_rate"] == 8e-4
    assert run(grid) == ([], {}, finished)
    shutil.rmtree(out / "runs" / further[1])
    assert ("new", 1) in Counter(state for _, state in list_grid(grid)).items()
    assert run(grid).finished == [further[1]]
    assert (out / "selection.json").read_text() == text


# The command --------------------------------------------------------------------------------------------------------


def test_the_command_runs_lists_and_reports(out, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aroma_lab.study.run.run_grid", run)
    monkeypatch.chdir(tmp_path)
    values = grid_values(Path("out"), methods={"bad": BAD, "good": {"kind": "x"}}, seeds=[0])
    file = str(write_yaml(tmp_path / "grid.yaml", values))

    def said(code, *options):
        assert main(["lab", "run", file, *options]) == code
        return capsys.readouterr()

    assert said(0, "--list").out.splitlines()[-1] == "2 trials: 2 new"
    assert not out.exists()
    printed = said(1)
    assert "Trials finished: 1 now, 0 earlier; failed: 1." in printed.out
    for text in ("failed: mrpc/bad/seed-0: DataError: no such file", "out/runs/TRIAL/failure.json", "--retry-failed"):
        assert text in printed.out
    assert "of 2 · mrpc/bad/seed-0 · failed: DataError: no such file\n" in printed.err
    assert " · 2 of 2 · mrpc/" in printed.err
    assert "of 2 · mrpc/good/seed-0 · score " in printed.err
    states = [line.split()[0] for line in said(0, "--list", "seeds=[0, 1]").out.splitlines()[:-1]]
    assert states == ["failed", "finished", "new", "new"]
    assert said(2, "sedes=[1]").err == "error: sedes=[1]: a grid has no such key; the nearest is 'seeds'\n"
    printed = said(0, "methods.bad.fail=null", "--retry-failed", "--workers", "2")
    assert "Trials finished: 1 now, 1 earlier; failed: 0." in printed.out
    code = "import sys; from aroma.cli import main; main(sys.argv[1:]); print({'torch', 'pandas'} & {*sys.modules})"
    command = [sys.executable, "-c", code, "lab", "run", file, "--list"]
    assert subprocess.check_output(command, text=True).splitlines()[-1] == "set()", "a list loads no heavy library"
