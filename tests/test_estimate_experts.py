"""`aroma estimate` of mixtures of experts: equal to real models, to published sizes, and to bitsandbytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

from aroma.cli import main
from aroma_lab.bench.memory import kept_bytes
from aroma_lab.estimate.devices import needs_of
from aroma_lab.estimate.memory import run_step, step_bytes
from aroma_lab.estimate.model import EstimateSettings, build, layers_of, leading_layers, load_config
from aroma_lab.estimate.tensors import inventory_of, take_inventory
from models import trainable
from quick import slow_but
from test_estimate import measured_peak

PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")

_SIZES: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}

CONFIGS = {
    "qwen3-moe": Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"], **{**_SIZES, "num_experts": 4, "head_dim": 16}),
    "deepseek-v3": DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"],
        **_SIZES,
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_mtp_layers": 0},
        **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    ),
}


def settings_for(name: str, **changes: Any) -> EstimateSettings:
    return EstimateSettings(**{"model": name, "batch_size": 2, "sequence_length": 64, "components": 9, **changes})


CHANGES: dict[str, dict[str, Any]] = {
    "adapted": {"adapter": "lora", "components": 0, "target_parameters": PARAMETERS},
    "packed": {"dtype": "nf4", "quantise_experts": True},
}


@pytest.mark.parametrize(
    ("name", "changes"), slow_but([("deepseek-v3", "adapted")], [(name, one) for name in CONFIGS for one in CHANGES])
)
def test_a_deep_model_is_its_short_ones_continued(name: str, changes: str) -> None:
    config, settings = CONFIGS[name], settings_for(name, **CHANGES[changes])
    assert leading_layers(config) == (name == "deepseek-v3")
    assert layers_of(config) == 5
    whole, short = take_inventory(build(settings, config), settings.dtype), inventory_of(settings, config)
    for field in ("modules", "weights", "pairs", "head"):
        assert Counter(getattr(whole, field)) == Counter(getattr(short, field)), field
    for field in ("parameters", "constants", "buffers", "block", "root"):
        assert getattr(whole, field) == getattr(short, field), field
    assert step_bytes(settings, config) == run_step(build(settings, config), settings, config)


@pytest.mark.parametrize(
    ("name", "parameters", "buffers"),
    slow_but(
        [("mixtral-8x7b", 46_702_792_704, 0)],
        [
            ("mixtral-8x7b", 46_702_792_704, 0),
            ("qwen3-30b-a3b", 30_532_122_624, 0),
            ("deepseek-v3", 671_026_419_200, 58 * 256),
            ("kimi-k2", 1_026_408_232_448, 60 * 384),
        ],
    ),
)
def test_parameters_are_as_published(name: str, parameters: int, buffers: int) -> None:
    """Those of DeepSeek-V3 without its layer that predicts further tokens; it counts the bias of its routers."""
    settings = EstimateSettings(name, adapter="lora", components=0, target_parameters=PARAMETERS)
    assert inventory_of(settings, load_config(name)).parameters == parameters - buffers


def real_model(config: Any, settings: EstimateSettings) -> tuple[Any, Any]:
    dtype = getattr(torch, settings.dtype)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    fields = {"target_modules": "all-linear", "target_parameters": [*PARAMETERS], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(r=settings.r, **fields)).train()
    tokens = torch.randint(2, 500, (settings.batch_size, settings.sequence_length))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens, "use_cache": False}
    return model, lambda: model(**inputs).loss


def test_what_adapted_experts_keep_and_need() -> None:
    config = CONFIGS["qwen3-moe"]
    changes = {"adapter": "lora", "dtype": "float32", "components": 0, "target_parameters": PARAMETERS}
    settings = settings_for("qwen3-moe", **changes)
    model, loss = real_model(config, settings)
    found = inventory_of(settings, config)
    assert sum(one.bytes for one in found.trained) == sum(parameter.nbytes for parameter in trainable(model))
    routers = 5  # which PEFT counts among "all-linear" where parameters are named
    assert len(found.modules) == 5 * 4 + 5 * 2 * 4 + routers
    step = step_bytes(settings, config)
    assert step.kept == pytest.approx(kept_bytes(loss, model), rel=0.01)
    for parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    loss().backward()
    measured = measured_peak(lambda: loss().backward())
    assert measured * 0.95 <= step.peak <= measured * 1.05


def test_packed_experts_are_those_of_bitsandbytes() -> None:
    config, settings = CONFIGS["qwen3-moe"], settings_for("qwen3-moe", dtype="nf4", quantise_experts=True)
    holder = nn.Module()
    holder.register_parameter("weight", nn.Parameter(torch.randn(4, 64, 64), requires_grad=False))
    replace_parameter_4bit(holder, "weight", compress_statistics=True)
    packed: Any = holder.parametrizations["weight"]  # type: ignore[index]
    found, plain = (inventory_of(one, config) for one in (settings, settings_for("qwen3-moe", dtype="nf4")))
    assert packed.original.nbytes in {one.bytes for one in found.weights}
    experts = 5 * 4 * (64 * 64 + 64 * 32)
    saved = sum(one.bytes for one in plain.weights) - sum(one.bytes for one in found.weights)
    assert saved == 2 * experts - experts // 2
    assert found.parameters == plain.parameters


@pytest.mark.slow
def test_a_trillion_parameters_take_no_memory_here() -> None:
    settings = EstimateSettings("kimi-k2", dtype="nf4", quantise_experts=True, gradient_checkpointing=True)
    (needs,) = needs_of([settings])
    assert needs.on("zero3", 64)["weights"] < needs.on("one")["weights"] / 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mixtral-8x7b", "--quantise-experts"], "quantise_experts=True: with dtype='bfloat16'"),
        (
            ["mixtral-8x7b", "--dtype", "nf4", "--quantise-experts", "--target-parameters", PARAMETERS[0]],
            "quantise_experts=True: their update is added to the weight itself",
        ),
        (
            ["mixtral-8x7b", "--target-parameters", PARAMETERS[0]],
            "target_parameters=['experts.gate_up_proj']: not",
        ),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {message}")
    assert output.err.count("\n") == 1
