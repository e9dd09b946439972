"""Starts of LoRA that are computed from training data: EVA and LoRA-GA."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer

from aroma.errors import ConfigError
from aroma_lab.bench.models import BenchSettings, make_batch, make_model
from aroma_lab.methods import Lora, find_targets
from aroma_lab.methods.lora import layers_of, pair_of
from aroma_lab.run.run import run_trial
from aroma_lab.specs import TaskSpec
from trial_runs import save_material, trial_of

SETTINGS = BenchSettings(model="tiny", batch_size=8, length=12)
INITS = ["eva", "lora_ga"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_material(tmp_path_factory.mktemp("material"))


def pretrained() -> Any:
    """A tiny classifier without dropout: a gradient can be taken twice."""
    torch.manual_seed(0)
    model = make_model(SETTINGS)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def padded_batches(model: Any, count: int = 3) -> list[dict[str, Any]]:
    batches = []
    for seed in range(count):
        batch = make_batch(model, replace(SETTINGS, seed=seed))
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][::2, 7:] = 0
        batch["input_ids"][::2, 7:] = model.config.pad_token_id
        batches.append(batch)
    return batches


def started(method: Lora, model: Any, batches: list[dict[str, Any]]) -> Any:
    torch.manual_seed(0)
    built = method.build(model, 100)
    method.initialize(built, batches)
    return built


@torch.no_grad()
def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**batch).logits
    return found


def projector(rows: torch.Tensor) -> torch.Tensor:
    """Return the projection onto the span of `rows`."""
    basis = torch.linalg.qr(rows.T).Q
    return basis @ basis.T


# The starts ----------------------------------------------------------------------------------------------------------


def test_eva_starts_as_pefts_own_route_does() -> None:
    model, base = pretrained(), pretrained()
    batches = padded_batches(model)
    ours = started(Lora(r=3, init="eva"), model, batches)
    config = LoraConfig(
        r=3,
        lora_alpha=3,
        target_modules=find_targets(None, base),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, use_label_mask=False),
    )
    theirs = get_peft_model(base, config)
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    expected = layers_of(theirs, LoraLayer)
    assert layers_of(ours, LoraLayer).keys() == expected.keys()
    for name, layer in layers_of(ours, LoraLayer).items():
        B, A = pair_of(layer)
        assert not B.any()
        torch.testing.assert_close(A, pair_of(expected[name])[1])
        torch.testing.assert_close(A @ A.T, torch.eye(3), atol=1e-4, rtol=0)


def test_lora_ga_starts_in_the_singular_directions_of_the_gradient_and_computes_what_the_base_does() -> None:
    model = pretrained()
    batches, before = padded_batches(model), copy.deepcopy(model)
    method = Lora(r=2, alpha=6, init="lora_ga")
    ours = started(method, model, batches)
    for batch in batches:
        torch.testing.assert_close(logits(ours, batch), logits(before, batch), atol=1e-5, rtol=1e-5)
        before.train()(**batch).loss.backward()
    for name, layer in layers_of(ours, LoraLayer).items():
        weight = before.get_submodule(name).weight
        U, _, V = torch.linalg.svd(weight.grad / len(batches))
        B, A = pair_of(layer)
        torch.testing.assert_close(projector(A), projector(V[:2]), atol=1e-3, rtol=0)
        torch.testing.assert_close(projector(B.T), projector(U[:, 2:4].T), atol=1e-3, rtol=0)
        torch.testing.assert_close(layer.get_base_layer().weight, weight - B @ A, atol=1e-6, rtol=1e-5)
    assert set(method.ranks(ours).values()) == {4}
    assert all((B @ A).abs().max() < 1e-6 for B, A in method.components(ours).values())


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_a_start_is_refused_where_there_are_no_data_for_it(init: Any, material: Path, tmp_path: Path) -> None:
    trial = replace(trial_of(material), options={"init": init})
    planted = TaskSpec(name="net", kind="planted_net", layers=2, width=8, examples=24)
    elsewhere = replace(trial, model="made", task=planted, training=replace(trial.training, group_by_length=False))
    with pytest.raises(ConfigError, match=f"options.init='{init}': one process computes it"):
        run_trial(elsewhere, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lora_ga_does_not_round_weights() -> None:
    model = make_model(replace(SETTINGS, dtype="bfloat16"))
    with pytest.raises(ConfigError, match=r"init='lora_ga': it changes the pretrained weights, .*bfloat16"):
        started(Lora(r=2, init="lora_ga"), model, padded_batches(model))
