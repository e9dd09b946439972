"""An experiment for PEFT's method comparison has the ranks of an adapter, and a model trains by it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import aroma
from models import base, batch

MAKE = str(Path(__file__).parents[1] / "method_comparison" / "make.py")


def test_an_experiment_has_the_ranks_of_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base("llama"), config)
    found = aroma.compress(model, None, size=0.5)
    ranks = {name: rank for name, (_, rank) in found.ranks.items() if rank}
    model.save_pretrained(tmp_path / "adapter")
    words = ["make.py", str(tmp_path / "adapter"), str(tmp_path / "out"), "--learning-rate", "0.01"]
    monkeypatch.setattr("sys.argv", words)
    runpy.run_path(MAKE, run_name="__main__")
    written = json.loads((tmp_path / "out" / "training_params.json").read_text())
    assert written == {"optimizer_kwargs": {"lr": 0.01, "weight_decay": 0.1}}

    # As run.py reads it.
    fresh = get_peft_model(base("llama"), LoraConfig.from_pretrained(str(tmp_path / "out")))
    layers = {name: layer for name, layer in fresh.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks
    assert len({*ranks.values()}) > 1
    assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
    optimizer = torch.optim.AdamW([one for one in fresh.parameters() if one.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        loss = fresh(**batch("llama")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises(SystemExit):
        runpy.run_path(MAKE, run_name="__main__")
