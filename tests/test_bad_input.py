"""Bad input is refused before any training, by an error that names the field, its value and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model

from aroma import AromaConfig, AromaController, aroma_layers, attach
from aroma.errors import ConfigError
from models import adapted, base, batch, grow, trainable

# Configuration -------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"r": 0}, "r=0", "at least 1"),
    ({"lora_alpha": 0}, "lora_alpha=0", "try 4"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0", "[0, 1)"),
    ({"inner_tolerance": 0}, "inner_tolerance=0", "None switches"),
    ({"inner_tolerance": "1e-1"}, "inner_tolerance='1e-1'", "None switches"),  # what YAML makes of 1e-1
    ({"outer_tolerance": 0.0}, "outer_tolerance=0.0", "None switches"),
    ({"inner_check_interval": 2.0}, "inner_check_interval=2.0", "try 10"),
    ({"max_inner_steps": 0}, "max_inner_steps=0", "at least one optimizer step"),
    ({"max_inner_steps": 9}, "max_inner_steps=9", "inner_check_interval=10"),
    ({"min_components": -1}, "min_components=-1", "0 or more"),
    ({"max_components": 0}, "max_components=0", "1 or more"),
    ({"min_components": 3, "max_components": 2}, "max_components=2", "min_components=3"),
    ({"inner_criterion": "norm"}, "inner_criterion='norm'", "'update_change'"),
    ({"reset": "all"}, "reset='all'", "'prune', 'zero' or 'none'"),
    ({"prune_ratio": 1.1}, "prune_ratio=1.1", "[0, 1]"),
    ({"rewarmup_steps": -1}, "rewarmup_steps=-1", "0 for no re-warm-up"),
    ({"component_seed": -1}, "component_seed=-1", "non-negative"),
    ({"bias": "all"}, "bias='all'", "'none'"),
    ({"use_rslora": True}, "use_rslora=True", "a growing adapter cannot have it"),
    ({"rank_pattern": {"query": 4}}, "rank_pattern={'query': 4}", "a growing adapter cannot have it"),
    ({"eva_config": EvaConfig()}, "eva_config=EvaConfig(", "unset"),
]


@pytest.mark.parametrize(("fields", "named", "remedy"), REFUSED, ids=[named[:40] for _, named, _ in REFUSED])
def test_a_configuration_that_cannot_work(fields: dict[str, Any], named: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AromaConfig(**fields)
    assert str(caught.value).startswith(named)
    assert remedy in str(caught.value)


def test_one_line_is_relora() -> None:
    config = AromaConfig(inner_tolerance=None, outer_tolerance=None, max_components=8)
    assert config.resolve_inner_steps(800) == 100
    assert config.resolve_inner_steps(807) == 100
    assert config.resolve_inner_steps(5) == 1

    model = adapted("bert", inner_tolerance=None, outer_tolerance=None, max_inner_steps=None, max_components=3)
    events = []
    growth, _ = grow(model, batch("bert"), 12, on_event=events.append)
    assert {event.kind for event in events} == {"merged", "frozen", "finished"}
    assert sorted({event.step for event in events if event.kind == "merged"}) == [4, 8, 12]
    assert {summary.rank for summary in growth.controller.summary()} == {3}
    assert growth.finished


# Steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "total_steps", "named", "remedy"),
    [
        ({}, 9, "inner_check_interval=10", "run of 9 optimizer steps; lower it or train longer"),
        ({"max_inner_steps": 40}, 9, "inner_check_interval=10", "run of 9 optimizer steps"),
        ({}, None, "max_inner_steps=None", "total_steps"),
        ({"inner_check_interval": 60}, 600, "max_inner_steps=50", "inner_check_interval=60"),
    ],
    ids=["interval longer than the run", "although T_in is given", "no total", "derived T_in below the interval"],
)
def test_loops_that_cannot_fit_the_run(fields: dict, total_steps: int | None, named: str, remedy: str) -> None:
    model = get_peft_model(base("bert"), AromaConfig(**fields))
    with pytest.raises(ConfigError) as caught:
        AromaController(model, torch.optim.AdamW(trainable(model)), total_steps=total_steps)
    assert str(caught.value).startswith(named)
    assert remedy in str(caught.value)


# Targets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target", "kind"),
    [
        ("bert", "LayerNorm", "LayerNorm"),
        ("bert", "attention", "BertAttention"),
        ("vit", "patch_embeddings", "ViTPatchEmbeddings"),
    ],
)
def test_an_unsupported_kind_of_layer(name: str, target: str, kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted(name, target_modules=[target])
    message = str(caught.value)
    assert message.startswith("target_modules='")
    assert f".{target}': it is a {kind}, and only linear layers grow" in message
    assert "exclude_modules" in message


# The controller's partners -------------------------------------------------------------------------------------------


def test_a_model_without_a_growing_adapter() -> None:
    model = get_peft_model(base("bert"), LoraConfig(target_modules=["query"]))
    with pytest.raises(
        ConfigError, match=r"^adapter_name='default': PeftModel.*no AROMA adapter.*get_peft_model\(model, AromaConfig"
    ):
        attach(model, torch.optim.AdamW(trainable(model)), total_steps=20)


@pytest.mark.parametrize("held", ["the head", "all but one pair", "made before the adapter"])
def test_an_optimizer_without_the_pair(held: str) -> None:
    plain = base("bert")
    parameters = list(plain.parameters())
    model = adapted("bert", plain)
    missing = "bert.encoder.layer.0.attention.self.query"
    if held == "the head":
        parameters = [p for name, p in model.named_parameters() if "classifier" in name]
    if held == "all but one pair":
        missing = "bert.pooler.dense"
        pair = {id(p) for p in aroma_layers(model)[missing].pair("default")}
        parameters = [p for p in trainable(model) if id(p) not in pair]
    with pytest.raises(ConfigError) as caught:
        attach(model, torch.optim.SGD(parameters, lr=0.1), total_steps=20)
    assert "optimizer='SGD'" in str(caught.value)
    assert missing in str(caught.value)
    assert "after get_peft_model" in str(caught.value)
