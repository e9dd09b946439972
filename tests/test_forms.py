"""Plain LoRA on convolutions and embeddings, as compressing leaves it: read back, and exported with one rank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from aroma import AromaConfig
from aroma.errors import CheckpointError, ConfigError
from aroma.export import export_uniform
from aroma.files import read_tensors, write_tensors
from aroma.saved import read_adapter

LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "conv1d": lambda: nn.Conv1d(4, 7, 3),
    "conv2d": lambda: nn.Conv2d(4, 7, (3, 2), stride=2),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "embedding": lambda: nn.Embedding(9, 5),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({name: make() for name, make in LAYERS.items()})


@pytest.fixture
def saved(tmp_path: Path) -> tuple[PeftModel, Path]:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=[*LAYERS], rank_pattern={"conv2d": 2})
    model = get_peft_model(net(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def delta(model: PeftModel, name: str) -> torch.Tensor:
    return model.base_model.model[name].get_delta_weight("default").detach()


def test_each_update_is_that_of_peft(saved: tuple[PeftModel, Path], tmp_path: Path) -> None:
    model, folder = saved
    updates = read_adapter(folder).updates
    assert {name: update.rank for name, update in updates.items()} == {**dict.fromkeys(LAYERS, 3), "conv2d": 2}
    for name, update in updates.items():
        product, expected = update.B @ update.A, delta(model, name)
        product = product.T if name == "embedding" else product.reshape(expected.shape)  # a row for each token
        torch.testing.assert_close(product, expected)
    assert export_uniform(folder, tmp_path / "out") == 8
    served = PeftModel.from_pretrained(net(), tmp_path / "out")
    for name in LAYERS:
        torch.testing.assert_close(delta(served, name), delta(model, name))


@pytest.mark.parametrize("side", ["conv2d.lora_B.weight", "embedding.lora_embedding_A"])
def test_factors_that_do_not_fit_are_refused(saved: tuple[PeftModel, Path], tmp_path: Path, side: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved[1], folder)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith(side))
    write_tensors(folder / "adapter_model.safetensors", {**tensors, name: torch.ones(4, 5, *tensors[name].shape[2:])})
    with pytest.raises(CheckpointError, match="no fitting B"):
        read_adapter(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "linear"])
def test_the_papers_rule_refuses_what_is_not_linear(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^target_modules='{name}': it is a \w+, .*; aroma.compress"):
        get_peft_model(net(), AromaConfig(target_modules=[name]))
    with pytest.raises(ConfigError, match=r"^target_modules='pool.out_proj'"):
        get_peft_model(nn.ModuleDict({"pool": nn.MultiheadAttention(4, 2)}), AromaConfig())
