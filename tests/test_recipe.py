"""Recipes: deltas on defaults, every way to get one wrong, and the trial that each of them is."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from aroma.errors import ConfigError
from aroma.tuner import AromaConfig
from aroma_lab.run.recipe import load_recipe, make_recipe, recipe_help, run_recipe, save_recipe, trial_of
from aroma_lab.run.run import run_trial
from aroma_lab.run.trial import Trial
from aroma_lab.specs import ModelSpec, TaskSpec, TrainSpec, adapter_keys
from aroma_lab.study.grid import expand, load_grid
from trial_runs import GROWING, read, save_material

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
    assert recipe.training == TrainSpec(batch_size=16, learning_rate=1e-4)  # plain YAML would read the text "1e-4"
    assert recipe.adapter == {"target_modules": ["query", "value"], "inner_tolerance": None}
    assert recipe.data == TaskSpec(train="train.csv")
    assert recipe.output == "o"
    assert load_recipe(recipe_file).training.batch_size == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=3", "the nearest is 'training.batch_size'"),
        ("adapter.outer_tolerence=3", "the nearest is 'adapter.outer_tolerance'"),
        ("training.batch_size=1.5", "training.batch_size=1.5: give a whole number"),
        ("training.scheduler=linaer", "give one of cosine_with_min_lr, cosine, linear"),
        ("adapter.target_modules={a: 1}", "adapter.target_modules={'a': 1}: give a list of texts or a text"),
        ("training.batch_size.x=3", "'batch_size' holds 8, which has no keys; give it as a whole"),
        ("training.a.b=3", "training.a={'b': 3}: a recipe has no such key; the nearest is 'training."),
        ("training=3", "training=3: it is a section; give it keys, as training.NAME"),
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


def test_every_key_is_documented():
    helped = {key: meaning for key, _, meaning in recipe_help()}
    sections = {"model": ModelSpec, "data": TaskSpec, "training": TrainSpec}
    keys = {f"{section}.{name}" for section, kind in sections.items() for name in kind.__dataclass_fields__}
    keys.remove("data.name")
    assert set(helped) == keys | {f"adapter.{name}" for name in adapter_keys()} | {"output"}
    assert all(helped.values())


def test_a_resolved_recipe_and_its_trial_come_back_equal(tmp_path):
    values = {"data.kind": "causal_lm", "training.packing": True, "model.gguf_file": "m.gguf"}
    values |= {"adapter.target_modules": ["query"], "data.source": "org/chats", "training.seed": 3}
    recipe = make_recipe({**MINIMAL, **values})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    trial = trial_of(recipe)
    assert trial_of(load_recipe(tmp_path / "recipe.yaml")) == trial == Trial.from_dict(asdict(trial))
    assert (trial.name, trial.gguf_file, trial.options["component_seed"]) == ("chats/aroma/seed-3", "m.gguf", 3)
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert (written["training"]["warmup_steps"], written["adapter"]["r"]) == (100, 1)  # defaults are written out


def test_a_recipe_and_the_grid_of_its_one_cell_give_the_same_adapter(tmp_path):
    material = save_material(tmp_path / "material")
    training = {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 2, "threads": 1}
    training |= {"head_learning_rate": 5e-3}
    reported = {"test": str(material / "test.jsonl")}
    words = {"train": str(material / "train.jsonl"), "max_length": 16, "held_out": 0.2, "reported": reported}
    recipe = {
        "model": {"name": str(material / "model")},
        "data": words,
        "adapter": {**GROWING, "target_modules": "all-linear"},
        "training": {**training, "seed": 5},
        "output": str(tmp_path / "recipe"),
    }
    grid = {
        "model": str(material / "model"),
        "tasks": {"words": words},
        "methods": {"mine": {"kind": "aroma", **GROWING, "target_modules": "all-linear"}},
        "training": training,
        "seeds": [5],
        "output": str(tmp_path / "grid"),
    }
    for name, content in (("recipe", recipe), ("grid", grid)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    ours = run_recipe(load_recipe(tmp_path / "recipe.yaml"), progress=False)
    (cell,) = expand(load_grid(tmp_path / "grid.yaml"))
    theirs = run_trial(cell, tmp_path / "grid" / "run", keep_checkpoints=True)
    assert ours.keys() == theirs.keys()
    same = ("held_out", "reported", "score", "ranks", "singular_values", "inner_checks", "resolved_options")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert ours["total_rank"] > 0
    tensors, expected = (
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("recipe", "grid/run")
    )
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    assert read(tmp_path / "recipe" / "curve.json") == read(tmp_path / "grid" / "run" / "curve.json")


def test_the_example_recipes_are_valid_and_name_their_command():
    assert len(EXAMPLES) == 7
    for path in EXAMPLES:
        recipe = load_recipe(path)
        assert f"aroma train examples/recipes/{path.name}" in path.read_text()
        assert recipe.output == f"runs/{path.stem}"
        assert AromaConfig(**trial_of(recipe).options).resolve_inner_steps(recipe.training.max_steps or 1000) >= 40
