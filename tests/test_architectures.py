"""BERT, RoBERTa, BERT that tags tokens, GPT-2, Llama, T5, ViT: train, grow, save, reload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from aroma import Event, aroma_layers, verify_adapter
from models import ARCHITECTURES, adapted, base, batch, grow, logits, ranks
from quick import slow_but

STEPS = 14

LIMITS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"outer_tolerance": 0.025},
    "gpt2": {"r": 2, "lora_alpha": 3},
    "llama": {"inner_criterion": "update_change", "reset": "zero"},
    "t5": {"max_components": 2},
    "vit": {"inner_tolerance": None, "outer_tolerance": None, "max_components": 3, "lora_dropout": 0.1},
}
"""Methods that between them take every way through the outer check."""


@pytest.mark.parametrize("name", slow_but(["bert", "gpt2", "llama"], ARCHITECTURES))
def test_train_grow_save_reload(tmp_path: Path, name: str) -> None:
    inputs, unseen = batch(name), batch(name, seed=12)
    model = adapted(name, **LIMITS[name])
    assert set(ranks(model).values()) == {0}
    events: list[Event] = []
    growth, losses = grow(model, inputs, STEPS, on_event=events.append)

    merged = [event for event in events if event.kind == "merged"]
    assert {event.module for event in merged} <= set(aroma_layers(model))
    assert len({event.step for event in merged}) >= 2, "outer steps, not one"
    assert ("frozen" in {event.kind for event in events}) == (name in ("roberta", "t5", "vit"))
    component = model.peft_config["default"].r
    finished = {name: layer.finished("default").rank for name, layer in aroma_layers(model).items()}
    for module in finished:
        assert finished[module] == component * len([event for event in merged if event.module == module])
    assert growth.controller.total_rank == sum(ranks(model).values()) >= sum(finished.values()) > 0
    assert max(ranks(model).values()) >= 2 * component
    assert min(losses[-3:]) < losses[0] - 0.1

    model.save_pretrained(tmp_path / "adapter")
    assert verify_adapter(tmp_path / "adapter")["controller"]["global_step"] == STEPS
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(base(name), tmp_path / "adapter")
    assert type(loaded.base_model).__name__ == "LoraModel"
    for examples in (inputs, unseen):
        expected = logits(model, examples)
        torch.testing.assert_close(logits(loaded, examples), expected, rtol=1e-5, atol=5e-6)
        assert (expected - logits(base(name), examples)).abs().max() > 0.05

    again = adapted(name, **{**LIMITS[name], "component_seed": 77})
    again.load_adapter(str(tmp_path / "adapter"), "default")
    torch.testing.assert_close(logits(again, unseen), logits(model, unseen), rtol=1e-5, atol=5e-6)
    assert ranks(again) == ranks(model)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_bfloat16_base_grows_float32_components(tmp_path: Path, name: str) -> None:
    model, inputs = adapted(name, base(name, dtype=torch.bfloat16)), batch(name)
    growth, losses = grow(model, inputs, 9)
    assert growth.controller.total_rank > 0
    assert losses[-1] < losses[0]
    for layer in aroma_layers(model).values():
        finished = layer.finished("default")
        assert finished.A.dtype == finished.B.dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(name, dtype=torch.bfloat16), tmp_path)
    expected = logits(model, inputs).float()
    # Rounded to bfloat16 after every layer, the answers agree to a small part of what the adapter does to them.
    change = (expected - logits(base(name), inputs)).abs()
    difference = (logits(loaded, inputs).float() - expected).abs()
    assert difference.max() < 0.05 * change.max()
    assert difference.mean() < 0.05 * change.mean()
