"""Bases that accelerate offloads or splits: pairs train beside them, and norms are taken one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from aroma import aroma_layers, attach, save_adapter
from aroma.criteria import difference, pair_norms
from models import adapted, base, batch, grow, logits, ranks, train, trainable
from trainer_runs import assert_same

STEPS = 10
CPU = torch.device("cpu")
SPLIT = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}

OFFLOADED: dict[str, Callable[[Path], Any]] = {
    "device_map": lambda folder: base("llama", device_map=SPLIT, offload_folder=str(folder)),
    "cpu_offload": lambda folder: cpu_offload(base("llama"), CPU),
    "disk_offload": lambda folder: disk_offload(base("llama"), str(folder), CPU),
}


@pytest.mark.parametrize("kind", OFFLOADED)
def test_an_offloaded_base_trains_like_one_in_memory(kind: str, tmp_path: Path) -> None:
    expected = adapted("llama", inner_criterion="update_change")
    inside, expected_losses = grow(expected, batch("llama"), STEPS)
    model = adapted("llama", OFFLOADED[kind](tmp_path / "weights"), inner_criterion="update_change")
    away = [layer for layer in aroma_layers(model).values() if layer.base_layer.weight.is_meta]
    assert len(away) == (7 if kind == "device_map" else 14)
    assert {p.device for p in trainable(model)} == {CPU}
    growth, losses = grow(model, batch("llama"), STEPS)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert ranks(model) == ranks(expected)
    assert max(ranks(model).values()) > 1
    assert all(layer.base_layer.weight.is_meta for layer in away), "put away again"
    assert growth.controller.relative_updates() == pytest.approx(inside.controller.relative_updates(), rel=1e-5)

    save_adapter(model, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(base("llama"), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(plain, batch("llama")), logits(model, batch("llama")), rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch("llama")), logits(plain, batch("llama")), rtol=1e-4, atol=1e-4)


def test_a_run_over_an_offloaded_base_resumes(tmp_path: Path) -> None:
    def begin(resume: Path | None = None) -> tuple[Any, torch.optim.Optimizer]:
        model = adapted("llama", cpu_offload(base("llama"), CPU))
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        if resume is not None:
            set_peft_model_state_dict(model, load_peft_weights(str(resume), device="cpu"))
            optimizer.load_state_dict(torch.load(resume / "optimizer.pt", weights_only=True))
        attach(model, optimizer, total_steps=STEPS, resume_from=None if resume is None else str(resume))
        return model, optimizer

    whole, optimizer = begin()
    train(whole, batch("llama"), optimizer, 6)
    save_adapter(whole, tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    losses = train(whole, batch("llama"), optimizer, STEPS - 6)
    resumed, optimizer = begin(tmp_path)
    assert train(resumed, batch("llama"), optimizer, STEPS - 6) == losses
    components = [{n: t for n, t in m.state_dict().items() if "lora_" in n} for m in (resumed, whole)]
    assert_same(*components)


# Two devices, without any: tensors without data that know their device, and refuse to meet one of another ------------


def on(device: str, *shape: int) -> Tensor:
    return torch.empty(shape, device=device)


def spread() -> list[tuple[Tensor, Tensor]]:
    return [(on(device, 6, 1), on(device, 1, 5)) for device in ("cuda:0", "cuda:1", "cuda:0")]


MEASURES: dict[str, Callable[[], Any]] = {
    "pair norms": lambda: pair_norms(spread()),
    "update_change after a move": lambda: pair_norms(
        [difference(pair, (on("cpu", 6, 1), on("cpu", 1, 5))) for pair in spread()]
    ),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_measurements_gather_what_lies_on_several_devices(measure: str) -> None:
    # The number itself is asked for last, once everything is on one device; there are no data to tell it.
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        MEASURES[measure]()
