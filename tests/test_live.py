"""A configuration is data: what lives with a model is kept apart from it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from aroma import AromaConfig, aroma_layers, verify_adapter
from aroma.errors import ConfigError
from models import METHOD, adapted, base, batch, grow


def live_adapter(model: Any, adapter_name: str = "default") -> Any:
    from aroma.tuner import live_adapter

    return live_adapter(model, adapter_name)


def written(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())


# What a model does to its configuration: nothing ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_adapting_growing_and_saving_leave_the_configuration_as_it_was(tmp_path: Path, name: str) -> None:
    model = adapted(name, component_seed=None)
    config = model.peft_config["default"]
    before = {**vars(config)}
    grow(model, batch(name), 6)
    model.save_pretrained(tmp_path)
    assert {**vars(config), "base_model_name_or_path": before["base_model_name_or_path"]} == before
    assert config.component_seed is None
    assert not config.fan_in_fan_out
    assert written(tmp_path)["fan_in_fan_out"] == (name == "gpt2")


def test_the_seed_in_use_is_saved_and_a_configuration_may_serve_twice(tmp_path: Path) -> None:
    config = AromaConfig(**{**METHOD, "component_seed": None}, task_type="SEQ_CLS")
    for seed in (11, 12):
        torch.manual_seed(seed)
        model = get_peft_model(base("bert"), config)
        assert (live_adapter(model).seed, live_adapter(model).chose_seed) == (seed, False)
        model.save_pretrained(tmp_path / str(seed))
        assert verify_adapter(tmp_path / str(seed))["config"]["component_seed"] == seed


# Where it is found ---------------------------------------------------------------------------------------------------


def test_copies_and_pickles_are_not_driven_by_the_controller_of_the_original() -> None:
    model = adapted("bert")
    growth, _ = grow(model, batch("bert"), 3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert live_adapter(twin) is not live_adapter(model)
        assert live_adapter(twin).controller is None
        assert live_adapter(twin).method() == live_adapter(model).method()
        assert live_adapter(twin).config is twin.peft_config["default"]
    assert live_adapter(model).controller is growth.controller
    growth.detach()
    del growth
    assert live_adapter(model).controller is None


def test_a_later_adapter_has_its_own_and_takes_it_along() -> None:
    model = adapted("bert")
    torch.manual_seed(4)
    model.add_adapter("other", AromaConfig(task_type="SEQ_CLS", inference_mode=True))
    assert (live_adapter(model).seed, live_adapter(model, "other").seed) == (METHOD["component_seed"], 4)
    starts = [layer.pair("other")[1].detach() for layer in aroma_layers(model).values()]
    torch.manual_seed(4)
    again = adapted("bert", component_seed=None)
    assert all(map(torch.equal, starts, (layer.pair("default")[1] for layer in aroma_layers(again).values())))
    model.delete_adapter("other")
    with pytest.raises(ConfigError, match="adapter_name='other'"):
        live_adapter(model, "other")
