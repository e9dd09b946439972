"""Grids: from a file to trials, what is chosen, what is run, skipped, refused and reported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from aroma.cli import main
from aroma.errors import ConfigError, DataError
from aroma_lab.study.grid import check_methods, expand, load_grid, make_grid
from aroma_lab.study.run import list_grid, run_grid
from aroma_lab.study.selection import (
    beyond,
    candidates,
    choose,
    chosen_settings,
    edges,
    finals,
    first_of,
    widened,
    write_selection,
)
from fake_trial import score_of
from study_files import (
    DECAY,
    FAKE,
    RATE,
    TESTS,
    environment,
    grid_values,
    output_of,
    runs_in,
    start_machine,
    write_yaml,
)

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

EXAMPLES = [
    path
    for path in sorted((TESTS.parent / "examples" / "lab").glob("*.yaml"))
    if "space" not in yaml.safe_load(path.read_text())  # a search
]
TASKS = {"mrpc": None, "rte": {"max_length": 128}}
METHODS = {"lora": {"kind": "lora", "r": 8}, "head": {"kind": "head_only"}}
BAD = {"kind": "x", "fail": "raise", "until": "absent"}


@pytest.fixture
def out(monkeypatch, tmp_path) -> Path:
    """The output folder of a grid whose trials are stand-ins."""
    for key, value in environment(tmp_path / "log.txt").items():
        monkeypatch.setenv(key, value)
    return tmp_path / "out"


def fake_grid(output, **changes):
    return make_grid(grid_values(output, **changes))


def whole_grid(**changes):
    return make_grid({**grid_values(Path("out"), tasks=TASKS, methods=METHODS), **changes})


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
    changes = {"select": select, "overrides": overrides, "processes": 3}
    grid = whole_grid(**changes)
    assert load_grid(write_yaml(tmp_path / "grid.yaml", grid.as_dict())) == grid
    assert whole_grid(**changes, storage="postgresql://me:s3cret@host/db").as_dict() == grid.as_dict()


def test_overrides_win_over_the_file_and_arguments_over_both(tmp_path):
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
    ]
    grid = load_grid(path, overrides, processes=3, storage=None)
    assert (grid.seeds, grid.training.learning_rate, grid.training.max_steps) == ((3,), 1e-4, 10)
    assert grid.methods == {"lora-0.5": {"kind": "lora", "r": 4}, "lora": {"kind": "lora", "alpha": 10.0}}
    assert grid.tasks["mrpc"].max_length == 64
    assert grid.select.over == {RATE: [1e-3]}
    assert grid.processes == 3
    assert grid.training.threads == 1, "unless the grid says otherwise"
    assert whole_grid(training={"threads": None}).training.threads is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "sedes=[1]: a grid has no such key; the nearest is 'seeds'"),
        ({"model": ""}, "model='': give it"),
        ({"processes": 0}, "processes=0: give 1 or more"),
        ({"tasks": {}}, "tasks={}: give at least one"),
        ({"tasks": {"mr/pc": {}}}, "tasks.mr/pc.name='mr/pc': it names folders"),
        ({"tasks": {"select": {}}}, "tasks='select': it would share a folder"),
        (
            {"tasks": {"mrpc": {"maxlength": 3}}},
            "tasks.mrpc.maxlength=3: a grid has no such key; the nearest is 'task",
        ),
        ({"methods": {"lora": {"r": 8}}}, "methods.lora.kind=None: give a text"),
        ({"methods": {"lo/ra": {"kind": "lora"}}}, "methods='lo/ra': it names folders"),
        ({"methods": {"lora": 8}}, "methods={'lora': 8}: give a mapping of values"),
        ({"methods": {"lora": {"kind": "lora", "r": float("nan")}}}, "methods.lora.r=nan: give a finite number"),
        ({"training": {"batch_size": 0}}, "training.batch_size=0: give 1 or more"),
        ({"training": {"batchsize": 8}}, "training.batchsize=8: a grid has no such key; the nearest is 'training.bat"),
        ({"training": {"seed": 8}}, "training.seed=8: seeds are given by `seeds`"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: give at least one, 0 or more, each once"),
        ({"seeds": ["a"]}, "seeds=['a']: give a list of whole numbers"),
        ({"overrides": {"task": "rte"}}, "overrides={'task': 'rte'}: give a list"),
        ({"overrides": [{"task": "rt"}]}, "overrides[0].task='rt': the grid has no such task; it has mrpc, rte"),
        (
            {"overrides": [{"methods": "head"}]},
            "overrides[0].methods='head': a grid has no such key; the nearest is 'overrides[0].method'",
        ),
        (
            {"overrides": [{"tasks": "rte"}]},
            "overrides[0].tasks='rte': a grid has no such key; the nearest is 'overrides[0].task'",
        ),
        ({"overrides": [{"training.max_steps": "x"}]}, "overrides[0].training.max_steps='x': give a whole number"),
        ({"select": {}}, "select.over=None: name what to try"),
        ({"select": {"over": {RATE: 1e-3}}}, f"select.over.{RATE}=0.001: give a list"),
        ({"select": {"over": {RATE: [1, "x"]}}}, f"select.over.{RATE}='x': give a n"),
        ({"select": {"over": {"options.r": [1, 1]}}}, "select.over.options.r=[1, 1]: it has a value twice"),
    ],
    ids=str,
)
def test_a_value_that_cannot_work_is_refused_by_key_value_and_remedy(changes, message):
    with pytest.raises(ConfigError) as caught:
        whole_grid(**changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("select", [None, {"over": {"options.dropout": [0.0, 0.1]}}], ids=["", "select"])
@pytest.mark.parametrize(("method", "named"), [({"kind": "lora", "rr": 8}, "rr"), ({"kind": "lorra"}, "lorra")])
def test_a_wrong_option_or_kind_is_refused_under_its_label_before_anything_is_written(tmp_path, method, named, select):
    grid = fake_grid(tmp_path / "out", methods={"mine": method}, select=select)
    with pytest.raises(ConfigError, match=rf"^methods\.mine: .*{named}"):
        run_grid(grid)
    assert not (tmp_path / "out").exists()


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


def test_a_selection_tries_the_product_and_what_is_tried_wins_over_its_overrides_and_these_over_the_grids():
    select = {
        "over": {RATE: [1e-4, 1e-3], "options.r": [1, 2]},
        "seed": 100,
        "training": {"max_steps": 4},
        "overrides": [{"method": "lora", "options.dropout": 0.5, RATE: 9.0}],
    }
    grid = whole_grid(select=select, overrides=[{"training.max_steps": 7, "options.r": 5}])
    tried = candidates(grid)
    assert len(tried) == 2 * 2 * 4
    assert [trial.name for trial, _ in tried[:4]] == [
        f"select/mrpc/lora/learning_rate={rate},r={r}" for rate in (0.0001, 0.001) for r in (1, 2)
    ]
    for trial, values in tried:
        assert (trial.purpose, trial.training.seed, trial.training.max_steps) == ("select", 100, 4)
        assert (trial.training.learning_rate, trial.options["r"]) == tuple(values.values())
        assert trial.options.get("dropout") == (0.5 if trial.method == "lora" else None)
    assert expand(grid)[0].options == {"r": 5}, "reported trials have none of it"
    odd = {"options.target": ["a/b", "a:b"], "task.label": ["x"]}
    names = [trial.name for trial, _ in candidates(whole_grid(select={"over": odd}))]
    assert len(set(names)) == len(names) == 8
    assert all(".." not in name and ":" not in name and name.count("/") == 3 for name in names)


def test_the_best_score_is_chosen_of_equal_ones_the_lower_loss_and_never_a_failed_one():
    grid = whole_grid(tasks={"mrpc": None}, select={"over": {RATE: [1, 2, 3]}})
    tried = candidates(grid)
    one, two, three = (f"select/mrpc/lora/learning_rate={n}.0" for n in (1, 2, 3))
    even, worse, lower = (0.5, 0.7), (0.4, 0.1), (0.5, 0.6)
    assert choose(grid, tried, {one: even, two: worse, three: lower})["mrpc"]["lora"]["chosen"] == {RATE: 3.0}
    selection = choose(grid, tried, {one: even, three: even})
    all_tried = [[{RATE: 1.0}, 0.5], [{RATE: 2.0}, None], [{RATE: 3.0}, 0.5]]
    assert selection["mrpc"]["lora"] == {"chosen": {RATE: 1.0}, "tried": all_tried}
    assert selection["mrpc"]["head"]["chosen"] is None
    trials = expand(grid, chosen_settings(selection))
    assert [trial.name for trial in trials] == ["mrpc/lora/seed-0", "mrpc/lora/seed-1"]
    assert {(trial.training.learning_rate, trial.training.max_steps) for trial in trials} == {(1.0, 10)}


def test_by_loss_the_lowest_loss_is_chosen_of_equal_ones_the_best_score():
    grid = whole_grid(tasks={"mrpc": None}, select={"over": {RATE: [1, 2, 3]}, "by": "loss", "widen": 1})
    tried = candidates(grid)
    names = [f"select/mrpc/lora/learning_rate={n}.0" for n in (1, 2, 3)]
    outcomes = dict(zip(names, [(0.9, 0.7), (0.5, 0.3), (0.6, 0.3)], strict=True))
    all_tried = [[{RATE: 1.0}, 0.7], [{RATE: 2.0}, 0.3], [{RATE: 3.0}, 0.3]]
    assert choose(grid, tried, outcomes)["mrpc"]["lora"] == {"chosen": {RATE: 3.0}, "tried": all_tried}
    assert [values for _, values in widened(grid, tried, outcomes)] == [{RATE: 4.5}], "at the edge by loss"
    outcomes[names[2]] = (0.6, 0.31)
    assert choose(grid, tried, outcomes)["mrpc"]["lora"]["chosen"] == {RATE: 2.0}
    assert make_grid(grid.as_dict()) == grid


HEAD_RATE = "training.head_learning_rate"


def test_a_grid_lists_several_pairs_of_rates_and_its_selection_picks_the_best_pair_of_each_method():
    over = {RATE: [1e-3, 3e-3], HEAD_RATE: [2e-3, 6e-3]}
    only = [{"method": "head", "over": {RATE: None}}, {"task": "rte", "method": "lora", "over": {RATE: [0.5]}}]
    grid = whole_grid(select={"over": over, "overrides": only})
    tried = candidates(grid)
    points = {(trial.task.name, trial.method): [] for trial, _ in tried}
    for trial, values in tried:
        assert trial.training.head_learning_rate == values[HEAD_RATE]
        points[trial.task.name, trial.method].append(tuple(values.values()))
    pairs = [(rate, head) for rate in (1e-3, 3e-3) for head in (2e-3, 6e-3)]
    assert points["mrpc", "lora"] == pairs
    assert points["mrpc", "head"] == points["rte", "head"] == [(2e-3,), (6e-3,)], "nothing else has a rate"
    assert points["rte", "lora"] == [(0.5, 2e-3), (0.5, 6e-3)]
    scores = {"select/mrpc/lora/learning_rate=0.003,head_learning_rate=0.002": (0.9, 0.0)}
    outcomes = {trial.name: scores.get(trial.name, (0.5, 0.0)) for trial, _ in tried}
    chosen = chosen_settings(choose(grid, tried, outcomes))
    assert chosen["mrpc"]["lora"] == {RATE: 3e-3, HEAD_RATE: 2e-3}
    assert chosen["mrpc"]["head"] == {HEAD_RATE: 2e-3}
    for trial in expand(grid, chosen):
        assert trial.training.head_learning_rate == 2e-3
    same = load_grid_again(grid)
    assert candidates(same) == tried


def load_grid_again(grid):
    return make_grid(yaml.safe_load(yaml.safe_dump(grid.as_dict(), sort_keys=False)))


@pytest.mark.parametrize(
    ("values", "value", "further"),
    [
        ([1e-3, 3e-3, 1e-2], 3e-3, None),
        ([1e-3, 3e-3, 1e-2], 1e-2, 0.0333),
        ([1e-3, 3e-3, 1e-2], 1e-3, 3.33e-4),
        ([1e-3], 1e-3, None),
        ([0.0, 0.1], 0.1, 0.2),
        ([0.0, 0.1], 0.0, None),
        ([-2.0, 0.5], -2.0, -4.5),
        ([1, 4, 16], 16, 64),
        ([1, 2], 1, None),
    ],
    ids=str,
)
def test_beyond_an_edge_the_values_go_on_as_they_came(values, value, further):
    assert beyond(values, value) == further
    assert type(beyond(values, value)) in (type(None), *map(type, values))


def test_an_edge_is_one_of_numbers_alone():
    tried = [{"a": 1, "b": "x", "c": True, "d": 0.1}, {"a": 2, "b": "y", "c": False, "d": 0.1}]
    assert edges(tried, tried[1]) == {"a": 4}
    lists = [{"a": one, "t": targets} for one, targets in ((1, ["query"]), (2, ["query", "key"]))]
    assert edges(lists, lists[1]) == {"a": 4}
    assert edges(tried, {}) == {}


def test_a_selection_is_widened_one_key_at_a_time_and_never_beyond_its_bound():
    select = {"over": {RATE: [1e-3, 2e-3], HEAD_RATE: [1e-3, 2e-3]}, "widen": 1}
    grid = whole_grid(tasks={"mrpc": None}, methods={"lora": {"kind": "lora"}}, select=select)
    tried = candidates(grid)
    best = tried[3].trial.name
    outcomes = {trial.name: (1.0 if trial.name == best else 0.5, 0.0) for trial, _ in tried}
    further = widened(grid, tried, outcomes)
    assert [values for _, values in further] == [{RATE: 4e-3, HEAD_RATE: 2e-3}, {RATE: 2e-3, HEAD_RATE: 4e-3}]
    assert {trial.purpose for trial, _ in further} == {"select"}
    both = [*tried, *further]
    assert widened(grid, both, outcomes) == [], "two that failed: nothing lies at an edge any more"
    beside = widened(grid, both, outcomes | {further[0].trial.name: (2.0, 0.0)})
    assert {values[RATE] for _, values in beside} == {4e-3}, "the bound"
    assert [values[HEAD_RATE] for _, values in beside] == [1e-3, 4e-3]
    assert widened(whole_grid(select={**select, "widen": 0}), tried, outcomes) == []


def test_a_widened_selection_compares_its_best_values_with_all_next_to_them():
    select = {"over": {RATE: [1e-3, 2e-3, 4e-3], HEAD_RATE: [1e-3, 2e-3]}, "by": "loss", "widen": 1}
    grid = whole_grid(tasks={"mrpc": None}, methods={"lora": {"kind": "lora"}}, select=select)
    losses = {(2e-3, 2e-3): 0.6, (2e-3, 4e-3): 0.5, (4e-3, 4e-3): 0.4, (1e-3, 4e-3): 0.7}
    tried, rounds = candidates(grid), []
    while True:
        pairs = {one.trial.name: (one.values[RATE], one.values[HEAD_RATE]) for one in tried}
        outcomes = {name: (0.5, losses.get(pair, 1.0)) for name, pair in pairs.items()}
        further = widened(grid, tried, outcomes)
        if not further:
            break
        rounds.append([(values[RATE], values[HEAD_RATE]) for _, values in further])
        tried = [*tried, *further]
    way = [[(2e-3, 4e-3)], [(1e-3, 4e-3), (4e-3, 4e-3)], [(8e-3, 4e-3)]]
    assert rounds == way, "to the best, and around it"
    assert choose(grid, tried, outcomes)["mrpc"]["lora"]["chosen"] == {RATE: 4e-3, HEAD_RATE: 4e-3}


def test_the_two_best_are_run_with_further_seeds_and_the_mean_decides_between_them():
    select = {"over": {RATE: [1, 2, 3]}, "by": "loss", "seed": 100, "again": [101, 102]}
    grid = whole_grid(tasks={"mrpc": None}, methods={"lora": {"kind": "lora"}}, select=select)
    assert make_grid(grid.as_dict()) == grid
    tried = candidates(grid)
    outcomes = {trial.name: (0.5, loss) for (trial, _), loss in zip(tried, (0.1, 0.3, 0.2), strict=True)}
    assert finals(grid, tried[:1], outcomes) == [], "there is nothing to decide"
    assert finals(grid, tried, {tried[0].trial.name: (0.5, 0.1)}) == [], "the others have failed"
    further = finals(grid, tried, outcomes)
    assert [(values[RATE], trial.training.seed) for trial, values in further] == [
        (rate, seed) for seed in (101, 102) for rate in (1.0, 3.0)
    ]
    assert [trial.name for trial, _ in further[:2]] == [
        f"select/mrpc/lora/learning_rate={rate},seed=101" for rate in (1.0, 3.0)
    ]
    for trial, values in further:
        first = next(one for one, same in tried if same == values)
        assert trial.as_dict() == {
            **first.as_dict(),
            "name": trial.name,
            "training": {**first.as_dict()["training"], "seed": trial.training.seed},
        }
    tried = [*tried, *further]
    outcomes |= {trial.name: (0.5, 1.0 if values[RATE] == 1 else 0.4) for trial, values in further}
    last = finals(grid, tried, outcomes)
    assert {values[RATE] for _, values in last} == {2.0}, "the first has collapsed"
    tried = [*tried, *last]
    outcomes |= {trial.name: (0.5, 0.6) for trial, _ in last}
    assert finals(grid, tried, outcomes) == []
    means = [[{RATE: 1.0}, pytest.approx(0.7)], [{RATE: 2.0}, pytest.approx(0.5)], [{RATE: 3.0}, pytest.approx(1 / 3)]]
    assert choose(grid, tried, outcomes)["mrpc"]["lora"] == {"chosen": {RATE: 3.0}, "tried": means}
    del outcomes[further[-1].trial.name]  # it has failed
    assert choose(grid, tried, outcomes)["mrpc"]["lora"]["chosen"] == {RATE: 2.0}


def test_runs_with_further_seeds_have_names_of_their_own():
    over = {"options.target": ["a" * 50, "a" * 50 + "b"]}  # folder names hold 40 characters of each
    grid = whole_grid(tasks={"mrpc": None}, select={"over": over, "again": [7]})
    tried = candidates(grid)
    further = finals(grid, tried, {trial.name: (0.5, 0.1) for trial, _ in tried})
    names = {trial.name for trial, _ in [*tried, *further]}
    assert len(names) == 4 * len(grid.methods)
    assert all(first_of(trial.name) in {one.trial.name for one in tried} for trial, _ in further)


def test_a_selection_ends_where_no_value_lies_beyond():
    key = "training.min_lr_ratio"
    grid = whole_grid(
        tasks={"mrpc": None}, methods={"lora": {"kind": "lora"}}, select={"over": {key: [0.1, 1.0]}, "widen": 1}
    )
    tried = candidates(grid)
    assert widened(grid, tried, {trial.name: (values[key], 0.0) for trial, values in tried}) == []


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"over": {RATE: [1e-3]}, "widen": -1}, "select.widen=-1: give 0 or more"),
        ({"over": {RATE: [1e-3]}, "seed": 1, "again": [2, 1]}, "select.again=[2, 1]: give different seeds"),
        ({"over": {RATE: [1e-3]}, "again": 101}, "select.again=101: give a list of whole numbers"),
        ({"over": {RATE: [1e-3]}, "again": [-2]}, "select.again=[-2]: give different seeds, 0 or more"),
        ({"over": {RATE: [1e-3]}, "by": "f1"}, "select.by='f1': give one of score, loss"),
        ({"over": {RATE: None}}, f"select.over.{RATE}=None: give a list of values to try"),
        (
            {"over": {RATE: [1e-3]}, "overrides": [{"method": "lora", "over": {HEAD_RATE: [1e-3]}}]},
            f"select.overrides[0].over.{HEAD_RATE}=[0.001]: it replaces a list of select.over, which has {RATE}",
        ),
        (
            {"over": {RATE: [1e-3]}, "overrides": [{"over": {RATE: 3}}]},
            f"select.overrides[0].over.{RATE}=3: give a list of values to try",
        ),
    ],
    ids=str,
)
def test_a_selection_that_cannot_be_is_refused(select, message):
    with pytest.raises(ConfigError) as caught:
        whole_grid(select=select)
    assert str(caught.value).startswith(message)


def test_only_a_selection_has_other_values_to_try():
    with pytest.raises(ConfigError, match="over"):
        whole_grid(overrides=[{"method": "lora", "over": {RATE: [1e-3]}}])


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


def test_what_another_grid_or_the_user_made_is_not_overwritten(out):
    run(fake_grid(out, seeds=[0]))
    before = steps(out, "mrpc/a/seed-0")
    with pytest.raises(ConfigError) as caught:
        run(fake_grid(out, seeds=[0, 1], training={"max_steps": 20, "weight_decay": 0.1}))
    for part in ("mrpc/a/seed-0 (", "training.max_steps", DECAY, "mrpc/b/seed-0"):
        assert part in str(caught.value)
    assert steps(out, "mrpc/a/seed-0") == before
    assert not (out / "runs/mrpc/a/seed-1").exists(), "nothing was run"
    (out / "grid.yaml").write_text("# mine\n")
    with pytest.raises(ConfigError, match=r"grid\.yaml there is your own"):
        run(fake_grid(out))
    assert (out / "grid.yaml").read_text() == "# mine\n"


def test_a_trial_that_failed_is_run_anew_when_the_grid_changes(out):
    assert len(run(fake_grid(out, methods={"bad": {**BAD, "fail": "exit"}}, seeds=[0])).failed) == 1
    outcome = run(fake_grid(out, methods={"bad": {"kind": "x"}}, seeds=[0]))
    assert outcome.finished == ["mrpc/bad/seed-0"]
    assert steps(out, "mrpc/bad/seed-0")[0] == "step 1"  # not from the checkpoint of another trial
    assert trial_json(out, "mrpc/bad/seed-0")["options"] == {}


# Several machines ---------------------------------------------------------------------------------------------------


def machines(tmp_path, count, **changes):
    """Write one file a machine: each has an output folder of its own, and all share a database."""
    shared = {"storage": f"sqlite:///{tmp_path / 'shared.db'}", "study": "shared", "heartbeat": 1, **changes}
    return [write_yaml(tmp_path / f"{n}.yaml", grid_values(tmp_path / f"out-{n}", **shared)) for n in range(count)]


@pytest.mark.slow
def test_a_worker_on_another_machine_helps_and_both_know_what_was_chosen(out, tmp_path):
    log = tmp_path / "log.txt"
    methods = {label: {"kind": "x", "pause": 0.06} for label in "ab"}
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
    files = machines(tmp_path, 2, methods={"bad": BAD, "good": {"kind": "x"}}, seeds=[0])
    one, two = map(load_grid, files)
    assert len(run(one).failed) == 1
    (failure,) = run(two).failed
    assert (failure.name, failure.path) == ("mrpc/bad/seed-0", None)
    assert failure.message.startswith("DataError: no such file (on ")
    with pytest.raises(ConfigError, match=r"mrpc/good/seed-0 was run with another training\.max_steps; use the same"):
        run(load_grid(files[1], ["training.max_steps=11"]))
    assert not (tmp_path / "out-1" / "runs").exists()


# Tasks that cannot be loaded ----------------------------------------------------------------------------------------


MESSAGES = {
    "source": str(TESTS.parent / "examples" / "lab" / "messages"),
    "train": "train.jsonl",
    "reported": {"test": "test.jsonl"},
    "label": "topic",
    "max_length": 32,
}


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
def test_a_task_that_cannot_be_loaded_is_refused_before_anything_is_run(tmp_path, task, error, message, select):
    head = {"head": {"kind": "head_only"}}
    grid = fake_grid(tmp_path / "out", tasks={"messages": {**MESSAGES, **task}}, methods=head, select=select)
    with pytest.raises(error) as caught:
        run_grid(grid)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_decided_trial_needs_its_data_no_more(out):
    task = {**MESSAGES, "source": "/nope"}
    grid = fake_grid(out, tasks={"messages": task}, methods={"head": {"kind": "head_only"}}, seeds=[0])
    assert len(run(grid).finished) == 1, "with a stand-in"
    assert run_grid(grid).skipped == ["messages/head/seed-0"]
    shutil.rmtree(out)
    with pytest.raises(DataError, match="source='/nope'"):
        run_grid(grid)


# Choosing -----------------------------------------------------------------------------------------------------------


def test_the_chosen_settings_are_run_and_written_and_a_part_is_run_as_if_in_one(out):
    select = {"over": {RATE: [5e-4, 1e-3, 2e-3]}, "seed": 7, "training": {"max_steps": 2}}
    grid = fake_grid(out, select=select)
    assert {state for _, state in list_grid(grid)} == {"new"}
    assert not out.exists(), "a list writes nothing"
    first = run(grid, methods=["b"])
    assert len(first.finished) == 3 + 2
    assert all("/b/" in name for name in first.finished)
    assert list(json.loads((out / "selection.json").read_text())["mrpc"]) == ["b"]
    assert list(yaml.safe_load((out / "grid.yaml").read_text())["methods"]) == ["a", "b"]
    assert [state for _, state in list_grid(grid, methods=["b"])] == ["finished"] * 5
    second = run(grid)
    assert (len(second.skipped), len(second.finished)) == (5, 5)
    selection = json.loads((out / "selection.json").read_text())
    assert selection["mrpc"]["a"]["chosen"] == selection["mrpc"]["b"]["chosen"] == {RATE: 1e-3}
    assert [score for _, score in selection["mrpc"]["a"]["tried"]] == [score_of(rate) for rate in (5e-4, 1e-3, 2e-3)]
    assert trial_json(out, "mrpc/a/seed-1")["training"]["learning_rate"] == 1e-3
    purposes = [trial_json(out, name)["purpose"] for name in (first.finished[0], "mrpc/a/seed-1")]
    assert purposes == ["select", "report"]
    changed = fake_grid(out, select=select, training={"max_steps": 11, "warmup_steps": 1})
    assert [state for _, state in list_grid(changed)] == ["finished"] * 6 + ["conflict"] * 4
    for refused in (partial(run, grid), partial(list_grid, grid)):
        with pytest.raises(ConfigError, match=r"--methods='c'.*a, b"):
            refused(methods=["c"])


@pytest.mark.parametrize(
    ("widen", "rates", "chosen"),
    [
        pytest.param(0, [1e-4, 2e-4], 2e-4, marks=pytest.mark.slow),
        (2, [1e-4, 2e-4, 4e-4, 8e-4], 8e-4),
        pytest.param(5, [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3], 8e-4, marks=pytest.mark.slow),
    ],
)
def test_a_selection_at_the_edge_of_its_values_tries_further_ones_and_goes_on_where_it_was(out, widen, rates, chosen):
    select = {"over": {RATE: [1e-4, 2e-4]}, "widen": widen}
    grid = fake_grid(out, methods={"a": {"kind": "x"}}, select=select)
    run(grid)
    selection = json.loads((out / "selection.json").read_text())["mrpc"]["a"]
    assert selection == {"chosen": {RATE: chosen}, "tried": [[{RATE: rate}, score_of(rate)] for rate in rates]}
    assert trial_json(out, "mrpc/a/seed-1")["training"]["learning_rate"] == chosen
    assert [state for _, state in list_grid(grid)] == ["finished"] * (len(rates) + 2)
    again = run(grid)
    assert (len(again.skipped), again.finished, again.failed) == (len(rates) + 2, [], [])
    last = f"select/mrpc/a/learning_rate={rates[-1]}"
    shutil.rmtree(out / "runs" / last)
    assert {name for name, state in list_grid(grid) if state == "new"} >= {last}
    assert run(grid).finished == [last]
    assert json.loads((out / "selection.json").read_text())["mrpc"]["a"] == selection


@pytest.mark.parametrize("selection", [{}, {"mrpc": {}}])
def test_a_selection_of_nothing_is_json_all_the_same(tmp_path, selection):
    write_selection(tmp_path / "selection.json", selection)

    assert json.loads((tmp_path / "selection.json").read_text()) == selection


def test_what_was_chosen_has_a_line_for_each_method(tmp_path):
    entry = {"chosen": {"training.learning_rate": 0.01}, "tried": [[{"training.learning_rate": 0.01}, None]]}
    selection = {"mrpc": {"a": entry, "b": entry | {"chosen": None}}, "rte": {"a": entry}}

    write_selection(tmp_path / "selection.json", selection)

    text = (tmp_path / "selection.json").read_text()
    assert json.loads(text) == selection
    assert sum("tried" in line for line in text.splitlines()) == text.count("tried") == 3


def test_the_best_of_a_selection_are_run_with_further_seeds_and_what_has_finished_is_skipped(out):
    rates = (1e-4, 5e-4, 2e-3)
    assert sorted(rates, key=score_of) == [2e-3, 1e-4, 5e-4]
    grid = fake_grid(out, methods={"a": {"kind": "x"}}, select={"over": {RATE: [*rates]}, "again": [1, 2]})
    further = {f"select/mrpc/a/learning_rate={rate},seed={seed}" for rate in rates[:2] for seed in (1, 2)}
    finished = {*run(grid).finished}
    assert further < finished
    assert len(finished) == len(rates) + len(further) + 2
    assert trial_json(out, "mrpc/a/seed-1")["training"]["learning_rate"] == 5e-4
    assert [state for _, state in list_grid(grid)] == ["finished"] * len(finished)
    assert {*run(grid).skipped} == finished
    shutil.rmtree(out / "runs" / min(further))
    assert run(grid).finished == [min(further)]


def test_a_method_without_a_chosen_setting_is_reported(out):
    methods = {"bad": BAD, "good": {"kind": "x"}}
    outcome = run(fake_grid(out, methods=methods, select={"over": {RATE: [5e-4, 1e-3]}}))
    failed = {failure.name: failure for failure in outcome.failed}
    reported = [f"mrpc/bad/seed-{seed}" for seed in (0, 1)]
    assert sorted(failed) == [*reported, *(f"select/mrpc/bad/learning_rate={rate}" for rate in (0.0005, 0.001))]
    assert (
        "no setting of its selection finished with every seed (DataError: no such file)" in failed[reported[0]].message
    )
    assert failed[reported[0]].path.exists()
    assert {"mrpc/good/seed-0", "mrpc/good/seed-1"} < set(outcome.finished)


# The command --------------------------------------------------------------------------------------------------------


def test_a_watcher_sees_every_trial_and_never_more_than_the_processes(out):
    seen = []
    methods = {"a": {"kind": "x", "pause": 0.1}, "b": {**BAD, "fail": "exit"}}
    run(fake_grid(out, methods=methods), watch=seen.append)
    ended = [one for progress in seen for one in progress.ended]
    assert sorted(one.name for one in ended) == [f"mrpc/{m}/seed-{seed}" for m in "ab" for seed in (0, 1)]
    assert all((one.failure is None) != (one.score is None) for one in ended)
    assert {progress.total for progress in seen} == {4}
    assert max(len(progress.running) for progress in seen) == 2
    assert any(one.step > 0 and one.planned == 10 for progress in seen for one in progress.running)
    decided = [progress.done + progress.failed for progress in seen]
    assert decided == sorted(decided)
    assert decided[-1] == 4


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
    for text in ("failed: mrpc/bad/seed-0: DataError: no such file", "bad/seed-0/failure.json", "--retry-failed"):
        assert text in printed.out
    assert "of 2 · mrpc/bad/seed-0 · failed: DataError: no such file · " in printed.err
    assert "of 2 · mrpc/good/seed-0 · score " in printed.err
    states = [line.split()[0] for line in said(0, "--list", "seeds=[0, 1]").out.splitlines()[:-1]]
    assert states == ["failed", "finished", "new", "new"]
    assert said(2, "sedes=[1]").err == "error: sedes=[1]: a grid has no such key; the nearest is 'seeds'\n"
    printed = said(0, "methods.bad.fail=null", "--retry-failed", "--workers", "2")
    assert "Trials finished: 1 now, 1 earlier; failed: 0." in printed.out
    code = "import sys; from aroma.cli import main; main(sys.argv[1:]); print({'torch', 'pandas'} & {*sys.modules})"
    command = [sys.executable, "-c", code, "lab", "run", file, "--list"]
    assert subprocess.check_output(command, text=True).splitlines()[-1] == "set()", "a list loads no heavy library"


@pytest.mark.parametrize("selects", [False, True])
def test_a_run_too_short_for_growth_is_refused_before_anything_runs(tmp_path, selects):
    short = {"max_steps": 5, "warmup_steps": 2}
    changes = {"select": {"over": {RATE: [1e-3]}, "training": short}} if selects else {"training": short}
    grid = make_grid(grid_values(tmp_path, methods={"grown": {"kind": "aroma"}}, **changes))
    trials = [trial for trial, _ in candidates(grid)] if selects else expand(grid)
    place = r"methods\.grown, in select" if selects else r"methods\.grown"
    with pytest.raises(ConfigError, match=rf"^{place}: inner_check_interval=10: it is longer than the run of 5"):
        check_methods(trials)
