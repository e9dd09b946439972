"""Recipes: deltas on defaults, and every way to get one wrong."""

from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from aroma.errors import ConfigError
from aroma.tuner import AromaConfig
from aroma.tuner.config import METHOD_FIELDS
from aroma_lab.run.recipe import (
    AdapterSpec,
    Recipe,
    differing_keys,
    load_recipe,
    make_recipe,
    recipe_help,
    recipe_keys,
    save_recipe,
)
from aroma_lab.tasks.model import adapter_config

EXAMPLES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml"))
MINIMAL = {"model.name": "bert", "data.train": "train.csv"}


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {name: bert}\ndata:\n  train: train.csv\ntraining:\n  batch_size: 8\n  learning_rate: 1e-4\n"
    )
    return path


def test_a_recipe_is_a_delta_on_the_defaults(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.training.batch_size == 8
    assert recipe.training.learning_rate == 1e-4  # plain YAML would read the text "1e-4"
    assert recipe.adapter == AdapterSpec()
    assert recipe.data.text == "text"


def test_overrides_are_stronger_and_read_as_yaml(recipe_file):
    recipe = load_recipe(
        recipe_file,
        [
            "training.batch_size=16",
            "adapter.target_modules=[query, value]",
            "adapter.inner_tolerance=null",
            "output=o",
        ],
    )
    assert recipe.training.batch_size == 16
    assert recipe.adapter.target_modules == ["query", "value"]
    assert recipe.adapter.inner_tolerance is None
    assert recipe.output == "o"


def test_an_empty_section_has_its_defaults(recipe_file):
    recipe_file.write_text("model: {name: bert}\ndata: {train: t.csv}\nadapter:\ntraining:\n")
    assert load_recipe(recipe_file) == make_recipe({"model.name": "bert", "data.train": "t.csv"})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trainig.batch_size", "training.batch_size"),
        ("training.batchsize", "training.batch_size"),
        ("batch_size", "training.batch_size"),
        ("adapter.outer_tolerence", "adapter.outer_tolerance"),
        ("training.lora_alpha", "adapter.lora_alpha"),
        ("outptu", "output"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(recipe_file, key, nearest):
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file, [f"{key}=3"])
    assert str(caught.value).startswith(f"{key}=3: ")
    assert f"the nearest is {nearest!r}" in str(caught.value)


def test_an_unknown_key_in_the_file_is_refused_too(recipe_file):
    recipe_file.write_text(recipe_file.read_text() + "  epoch: 3\n")
    with pytest.raises(ConfigError, match=r"training\.epoch=3: .*'training\.epochs'"):
        load_recipe(recipe_file)


@pytest.mark.parametrize(
    ("key", "text", "shown", "expected"),
    [
        ("training.batch_size", "1.5", "1.5", "a whole number"),
        ("training.batch_size", "true", "True", "a whole number"),
        ("training.batch_size", "null", "None", "cannot be null"),
        ("training.learning_rate", "fast", "'fast'", "a number"),
        ("training.bf16", "1", "1", "true or false"),
        ("training.threads", "two", "'two'", "a whole number or null"),
        ("training.scheduler", "linaer", "'linaer'", "one of cosine_with_min_lr, cosine, linear"),
        ("data.text", "3", "3", "a text"),
        ("data.task", "ranking", "'ranking'", "one of classification, regression"),
        ("adapter.target_modules", "{a: 1}", "{'a': 1}", "a text or a list of texts"),
        ("adapter.reset", "half", "'half'", "one of prune, zero, none"),
    ],
)
def test_a_wrong_type_names_field_value_and_expectation(recipe_file, key, text, shown, expected):
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file, [f"{key}={text}"])
    message = str(caught.value)
    assert message.startswith(f"{key}={shown}: give ")
    assert expected in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.name", None),
        ("data.train", None),
        ("data.validation_fraction", 1.0),
        ("data.max_length", 2),
        ("training.batch_size", 0),
        ("training.gradient_accumulation_steps", 0),
        ("training.max_steps", 0),
        ("training.epochs", 0.0),
        ("training.learning_rate", 0.0),
        ("training.head_learning_rate", -1.0),
        ("training.warmup_steps", -1),
        ("training.weight_decay", -0.1),
        ("training.min_lr_ratio", 1.5),
        ("training.save_steps", 0),
        ("training.threads", 0),
    ],
)
def test_a_value_out_of_range_is_refused(key, value):
    with pytest.raises(ConfigError) as caught:
        make_recipe({**MINIMAL, key: value})
    assert str(caught.value).startswith(f"{key}={value!r}: ")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"training.checkpoint": "best"}, r"training\.eval_steps=None"),
        ({"training.checkpoint": "best", "training.eval_steps": 30}, r"training\.save_steps=500.*eval_steps=30"),
        ({"data.label": "text"}, r"data\.label='text'"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(values, field):
    with pytest.raises(ConfigError, match=field):
        make_recipe({**MINIMAL, **values})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "holds a list"),
        (b"a: [1\n", "not YAML"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"training: 3\n", "it is a section"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_a_missing_file_and_a_lone_key_are_refused(tmp_path, recipe_file):
    with pytest.raises(ConfigError, match=r"recipe='.*absent\.yaml': cannot be read"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="override='resume': write KEY=VALUE"):
        load_recipe(recipe_file, ["resume"])


def test_every_key_is_documented():
    helped = {key: meaning for key, _, meaning in recipe_help()}
    assert set(helped) == set(recipe_keys())
    assert len(helped) == 66
    assert all(helped.values())


def test_the_adapter_section_is_the_config_with_its_defaults():
    own = {field.name: field.default for field in fields(AdapterSpec)}
    theirs = {field.name: field.default for field in fields(AromaConfig)}
    assert set(own) == {*METHOD_FIELDS, "target_modules", "exclude_modules"}
    assert own == {name: theirs[name] for name in own}
    hints = get_type_hints(AromaConfig)
    for name in set(METHOD_FIELDS):
        assert get_type_hints(AdapterSpec)[name] == hints[name], name


def test_the_adapter_section_makes_a_config_and_its_errors_come_through():
    recipe = make_recipe({**MINIMAL, "training.seed": 7, "adapter.r": 2})
    config = adapter_config(recipe.adapter, recipe.training)
    assert (config.r, config.component_seed, config.task_type) == (2, 7, "SEQ_CLS")
    bad = make_recipe({**MINIMAL, "adapter.outer_tolerance": -1.0})
    with pytest.raises(ConfigError, match=r"outer_tolerance=-1\.0"):
        adapter_config(bad.adapter, bad.training)


def test_a_resolved_recipe_comes_back_equal(tmp_path):
    recipe = make_recipe({**MINIMAL, "adapter.target_modules": ["query"], "training.max_steps": 10})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert written["training"]["warmup_steps"] == 100  # defaults are written out


def test_differing_keys_name_all_but_the_output():
    one = make_recipe({**MINIMAL, "output": "a"})
    other = make_recipe({**MINIMAL, "training.seed": 1, "adapter.r": 2, "output": "b"})
    assert differing_keys(one, one) == []
    assert differing_keys(one, other) == ["adapter.r", "training.seed"]


INNER_STEPS = {
    "llama3-8b-commonsense-r1": 1000,
    "llama3-8b-commonsense-r8": 2000,
    "mrpc": 200,
    "own-files": 83,
    "relora-mrpc": 375,
    "smollm2-commonsense": 40,
    "stsb": 1000,
}


def test_there_are_seven_example_recipes():
    assert {path.stem for path in EXAMPLES} == set(INNER_STEPS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_recipe_is_valid_and_names_its_command(path):
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)
    assert f"aroma train examples/recipes/{path.name}" in path.read_text()
    assert recipe.output == f"runs/{path.stem}"
    steps = adapter_config(recipe.adapter, recipe.training).resolve_inner_steps(recipe.training.max_steps or 1000)
    assert steps == INNER_STEPS[path.stem]
