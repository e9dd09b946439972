"""Recipes: deltas on defaults, every way to get one wrong, and the trial that each of them is."""

from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from aroma.errors import ConfigError
from aroma.tuner import AromaConfig
from aroma_lab.run.recipe import load_recipe, make_recipe, save_recipe
from aroma_lab.specs import ADAPTER_KEYS, TaskSpec, TrainSpec
from aroma_lab.study.grid import expand, make_grid

EXAMPLES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml"))
MINIMAL = {"model.name": "bert", "data.train": "train.csv"}


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {name: bert}\ndata:\n  train: train.csv\nadapter:\ntraining:\n  batch_size: 8\n  learning_rate: 1e-4\n"
    )
    return path


def test_a_recipe_is_a_delta_on_the_defaults_and_overrides_are_stronger(recipe_file):
    overrides = ["training.batch_size=16", "adapter.target_modules=[query, value]", "adapter.inner_tolerance=null"]
    recipe = load_recipe(recipe_file, [*overrides, "output=o"])
    assert recipe.trial.training == TrainSpec(
        batch_size=16, learning_rate=1e-4
    )  # plain YAML would read the text "1e-4"
    defaults = {name: default for name, (_, default) in ADAPTER_KEYS.items()}
    assert recipe.trial.options == {**defaults, "target_modules": ["query", "value"], "inner_tolerance": None}
    assert recipe.trial.task == TaskSpec(name="train", train="train.csv", reported={})
    assert recipe.output == "o"
    assert load_recipe(recipe_file).trial.training.batch_size == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=3", "the nearest is 'training.batch_size'"),
        ("adapter.outer_tolerence=3", "the nearest is 'adapter.outer_tolerance'"),
        ("training.batch_size=1.5", "training.batch_size=1.5: give a value of type int"),
        ("training.scheduler=linaer", "give a value of type Literal['cosine_with_min_lr', 'cosine', 'linear'"),
        ("adapter.target_modules={a: 1}", "adapter.target_modules={'a': 1}: give a value of type "),
        ("training.batch_size.x=3", "'batch_size' holds 8, which has no keys; give it as a whole"),
        ("training.a.b=3", "training.a={'b': 3}: a recipe has no such key; the nearest is 'training."),
        ("resume", "override='resume': write KEY=VALUE"),
    ],
)
def test_a_wrong_override_names_key_value_and_remedy(recipe_file, override, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"model.name": None}, r"model\.name=None"),
        ({"data.train": None}, r"data\.train=None"),
        ({"data.held_out": 1.0}, r"data\.held_out=1\.0"),
        ({"data.max_length": 2}, r"data\.max_length=2"),
        ({"training.batch_size": 0}, r"training\.batch_size=0"),
        ({"training.checkpoint": "best"}, r"training\.eval_steps=None"),
        ({"training.checkpoint": "best", "training.eval_steps": 30}, r"training\.save_steps=500.*eval_steps=30"),
        ({"model.dtype": "float16"}, r"model\.dtype='float16'"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused(values, field):
    with pytest.raises(ConfigError, match=field):
        make_recipe({**MINIMAL, **values})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"- a\n- b\n", "holds a list"),
        (b"a: [1\n", "not YAML"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_a_resolved_recipe_and_its_trial_come_back_equal(tmp_path):
    values = {"data.kind": "causal_lm", "training.packing": True, "model.gguf_file": "m.gguf"}
    values |= {"adapter.target_modules": ["query"], "data.source": "org/chats", "training.seed": 3}
    recipe = make_recipe({**MINIMAL, **values})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    trial = recipe.trial
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert (trial.name, trial.gguf_file) == ("chats/aroma/seed-3", "m.gguf")
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert (written["training"]["warmup_steps"], written["adapter"]["r"]) == (0.06, 1)  # defaults are written out


def test_a_recipe_is_the_trial_of_a_grid_s_cell():
    task = {"train": "words.jsonl", "max_length": 16, "held_out": 0.2, "reported": {"test": "test.jsonl"}}
    training = {"max_steps": 12, "head_learning_rate": 5e-3, "threads": 1}
    recipe = make_recipe({"model": {"name": "m"}, "data": task, "training": {**training, "seed": 5}})
    methods = {"mine": {"kind": "aroma", "r": 2}}
    grid = {"output": "o", "model": "m", "tasks": {"words": task}, "methods": methods, "training": training}
    (cell,) = expand(make_grid({**grid, "seeds": [5]}))
    trial = recipe.trial
    assert replace(cell, name=trial.name, method=trial.method, options=trial.options) == trial


def test_the_example_recipes_are_valid_and_name_their_command():
    assert len(EXAMPLES) == 7
    for path in EXAMPLES:
        recipe = load_recipe(path)
        assert f"aroma train examples/recipes/{path.name}" in path.read_text()
        assert recipe.output == f"runs/{path.stem}"
        assert AromaConfig(**recipe.trial.options).resolve_inner_steps(recipe.trial.training.max_steps or 1000) >= 40


def test_the_keys_of_the_adapter_are_fields_of_the_configuration():
    hints = get_type_hints(AromaConfig)
    found = {one.name: (hints[one.name], getattr(AromaConfig(), one.name)) for one in fields(AromaConfig)}
    assert {name: found[name] for name in ADAPTER_KEYS} == ADAPTER_KEYS
    assert {*AromaConfig.__annotations__} < {*ADAPTER_KEYS}
