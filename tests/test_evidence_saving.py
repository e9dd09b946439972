"""What grows by evidence is plain LoRA at any moment, and what is said of it is true then."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

import models
from aroma import aroma_layers, save_adapter, verify_adapter
from aroma.export import export_merged, export_uniform
from evidence_runs import PHASES, STEPS, ModelLoop, bear_everywhere, grown
from models import base, batch, logits
from quick import slow_but

MOMENTS = {"nothing yet": 0, **PHASES, "the end": STEPS}


def loop(name: str, **changes: Any) -> ModelLoop:
    return ModelLoop(grown(name, **changes), name)


def holes(training: ModelLoop) -> None:
    """Empty the first slot of every other matrix, as no rule does now, and leave the others in use."""
    controller = training.growth.controller
    for matrix in controller.modules[::2]:
        b, a = (part.detach().clone() for part in matrix.pair)
        if matrix.born[0] is not None and matrix.born[1] is not None:
            b[:, 0], a[0] = 0, 0
            matrix.born[0] = None
            matrix.layer.start_pair("default", a, b)


def updates(model: Any) -> dict[str, Tensor]:
    """ΔW by the product itself, of all slots and of what is merged."""
    return models.deltas(model)


@pytest.mark.parametrize("name", slow_but(["bert", "gpt2"], ["bert", "gpt2", "llama"]))
def test_saved_at_any_moment_it_is_plain_lora(tmp_path: Path, name: str) -> None:
    training, inputs = loop(name), batch(name)
    ranks, told = [], []
    for moment, step in MOMENTS.items():
        model = training.go_on(step).model
        if moment == "growth":
            for _ in range(4):
                bear_everywhere(training.growth)
        if moment == "after births":
            holes(training)
        said = logits(model, inputs)
        folder = tmp_path / moment
        save_adapter(model, folder)
        verify_adapter(folder)
        in_trial = training.growth.controller.rule.is_in_trial
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert ("It was saved in the trial of growth by evidence" in card) == in_trial
        told.append(in_trial)
        plain = PeftModel.from_pretrained(base(name), folder).eval()
        torch.testing.assert_close(logits(plain, inputs), said, rtol=1e-5, atol=1e-5, msg=moment)
        summaries = {summary.name: summary for summary in training.growth.controller.summary()}
        for target, layer in aroma_layers(model).items():
            update = updates(model)[target]
            delta = layer.get_delta_weight("default").detach()
            torch.testing.assert_close(
                (delta.T if layer.fan_in_fan_out else delta).double(), update, rtol=0, atol=1e-5
            )
            assert layer.rank("default") == summaries[target].rank
            assert summaries[target].effective_rank <= summaries[target].rank + 1e-6
        ranks.append([summary.rank for summary in summaries.values()])
        merged = PeftModel.from_pretrained(base(name), folder).merge_and_unload()
        torch.testing.assert_close(logits(merged, inputs), said, rtol=1e-4, atol=1e-4, msg=moment)
    assert set(ranks[0]) == {0}
    assert {*told} == {True, False}
    assert all(matrix.rank for matrix in training.growth.controller.modules), "some were merged"
    merged = training.model.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), said, rtol=1e-4, atol=1e-4)


def test_a_newborn_that_has_not_moved_is_not_saved(tmp_path: Path) -> None:
    training = loop("llama").go_on(8)  # the first components, of which b is zero still
    controller = training.growth.controller
    assert {matrix.component_count for matrix in controller.modules} == {3}
    assert controller.total_rank == 0
    assert {summary.rank for summary in controller.summary()} == {0}
    save_adapter(training.model, tmp_path)
    plain = PeftModel.from_pretrained(base("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(plain, batch("llama")), logits(base("llama"), batch("llama")))


@pytest.mark.slow
def test_it_is_exported(tmp_path: Path) -> None:
    training = loop("llama").go_on()
    said = logits(training.model, batch("llama"))
    save_adapter(training.model, tmp_path / "adapter")
    export_uniform(tmp_path / "adapter", tmp_path / "uniform")
    plain = PeftModel.from_pretrained(base("llama"), tmp_path / "uniform").eval()
    torch.testing.assert_close(logits(plain, batch("llama")), said, rtol=1e-4, atol=1e-4)
    export_merged(tmp_path / "adapter", tmp_path / "merged", base_model=models.saved_base("llama"))
    merged = models.ARCHITECTURES["llama"].model_class.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, batch("llama")), said, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moment", ["trial", "growth"])
def test_weights_that_torch_loads_are_evaluated_whole(moment: str) -> None:
    """Into a model that nothing drives, whether it was made anew or copied, and back into the one that was trained."""
    training = loop("bert").go_on(PHASES[moment])
    inputs, kept = batch("bert"), {name: value.clone() for name, value in training.model.state_dict().items()}
    said = logits(training.model, inputs)
    fresh, before = grown("bert"), loop("bert")
    for other in (fresh, copy.deepcopy(before.model)):
        other.load_state_dict(kept)
        torch.testing.assert_close(logits(other, inputs), said)
    copied = copy.deepcopy(before.model)
    with torch.no_grad():  # as an average of weights is written
        for name, value in copied.state_dict().items():
            if value.shape == kept[name].shape:
                value.copy_(kept[name])
    torch.testing.assert_close(logits(copied, inputs), said)
    training.go_on()
    training.model.load_state_dict(kept)
    torch.testing.assert_close(logits(training.model, inputs), said)


def test_accelerate_saves_and_loads_a_whole_state(tmp_path: Path) -> None:
    training, inputs = loop("bert").go_on(PHASES["growth"]), batch("bert")
    said = logits(training.model, inputs)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(training.model)
    accelerator.save_state(str(tmp_path))
    accelerator.free_memory()
    other = accelerator.prepare(grown("bert"))
    assert not torch.equal(logits(other, inputs), said)
    accelerator.load_state(str(tmp_path))
    torch.testing.assert_close(logits(other, inputs), said)
