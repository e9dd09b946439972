"""Exports: one rank for serving engines, the merged model, the table of ranks; also of adapters that are not ours."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from aroma import aroma_layers, verify_adapter
from aroma.errors import ConfigError
from aroma.export import SERVING_RANKS, export_merged, export_uniform, load_with_adapter, read_adapter
from aroma.ranks import rank_table
from aroma.tuner import live_adapter
from models import ARCHITECTURES, adapted, base, batch, deltas, logits, saved_base, set_ranks


def saved(folder: Path, name: str, ranks: list[int], pair: bool = False, **changes: Any) -> Any:
    """A growing model with components of the ranks, saved in `folder`; its head, if any, is moved too."""
    model = adapted(name, **changes)
    set_ranks(model, ranks, pair=pair)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    live_adapter(model).ever_controlled = True
    model.save_pretrained(folder)
    return model


# Uniform -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ranks", "expected"),
    [
        ("roberta", [0, 1, 2, 5], 8),
        ("gpt2", [0, 3, 9], 16),
        ("llama", [8], 8),
        ("t5", [0, 17], 32),
        ("bert", [0], 8),
    ],
)
def test_the_uniform_export_is_read_by_plain_peft(tmp_path: Path, name: str, ranks: list[int], expected: int) -> None:
    model, inputs = saved(tmp_path / "adapter", name, ranks), batch(name)
    assert export_uniform(tmp_path / "adapter", tmp_path / "out") == expected
    loaded = PeftModel.from_pretrained(base(name), tmp_path / "out")
    # In float64: what is on file is the same, and in float32 the order of sums, which the machine chooses, would tell.
    torch.testing.assert_close(logits(loaded.double(), inputs), logits(model.double(), inputs), rtol=1e-9, atol=1e-12)
    if name != "bert":
        assert not torch.allclose(logits(loaded, inputs), logits(base(name).double(), inputs), atol=0.1)

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == expected
    assert config["r"] in SERVING_RANKS
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    # Every module that could grow is there, rank 0 or not: TGI leaves out a kind of layer of which one is missing.
    layers = aroma_layers(model)
    assert sorted(config["target_modules"]) == sorted(layers)
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    for module, layer in layers.items():
        assert shapes.pop(f"base_model.model.{module}.lora_A.weight") == (expected, layer.in_features)
        assert shapes.pop(f"base_model.model.{module}.lora_B.weight") == (layer.out_features, expected)
    assert all("classifier" in key for key in shapes), "nothing else but the head"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "aroma_state.json",
    ]
    verify_adapter(tmp_path / "out")


def test_a_head_that_is_missing_is_not_exported(tmp_path: Path) -> None:
    """PEFT raises a KeyError for such an adapter, and did so for its export."""
    saved(tmp_path / "adapter", "bert", [2])
    weights, config = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_config.json"
    (tmp_path / "adapter" / "aroma_state.json").unlink()
    save_file({name: one for name, one in load_file(weights).items() if "classifier" not in name}, weights)
    with pytest.raises(ConfigError, match=r"^modules_to_save=\['classifier', 'score'\]: the adapter has no tensor"):
        export_uniform(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": None, "task_type": None}))
    assert export_uniform(tmp_path / "adapter", tmp_path / "out") == 8
    PeftModel.from_pretrained(base("bert"), tmp_path / "out")


def test_a_rank_of_ones_own(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", "bert", [0, 5])
    assert export_uniform(tmp_path / "adapter", tmp_path / "out", rank=5) == 5
    with pytest.raises(ConfigError, match=r"rank=4: a module has rank 5"):
        export_uniform(tmp_path / "adapter", tmp_path / "out-4", rank=4)
    assert not (tmp_path / "out-4").exists()


# Merged --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "vit"])
def test_the_merged_model_answers_as_the_adapter_does(tmp_path: Path, name: str) -> None:
    model, inputs = saved(tmp_path / "adapter", name, [0, 1, 3], pair=True), batch(name)
    export_merged(tmp_path / "adapter", tmp_path / "out")
    merged = ARCHITECTURES[name].model_class.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(merged, inputs), logits(model, inputs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(merged, inputs), logits(base(name), inputs), atol=0.1)
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.fixture
def rounded(tmp_path: Path) -> tuple[Path, Any, str]:
    """A base model in bfloat16, and the adapter of a model over it whose update is lost if it is rounded to that."""
    torch.manual_seed(6)
    half = base("llama").to(torch.bfloat16)
    half.save_pretrained(tmp_path / "base")
    module = "model.layers.0.self_attn.q_proj"
    model = adapted("llama", base_of(tmp_path / "base", torch.bfloat16), target_modules=[module])
    layer = aroma_layers(model)[module]
    layer.finished("default").append(1e-3 * torch.randn(32, 2), 1e-3 * torch.randn(2, 32))
    live_adapter(model).ever_controlled = True
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model, module


def base_of(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def test_a_small_update_over_a_bfloat16_base_is_kept(rounded: tuple[Path, Any, str]) -> None:
    # peft #1388, #2321: added in bfloat16, the update would vanish.
    home, model, module = rounded
    W = aroma_layers(model)[module].base_layer.weight.float()
    change = deltas(model)[module].float()
    lost = (W.bfloat16() + change.bfloat16()).float() == W
    assert lost.float().mean() > 0.98, "the case loses the update when it is rounded"
    export_merged(home / "adapter", home / "out")
    merged = base_of(home / "out", torch.float32).get_submodule(module).weight
    assert merged.dtype == torch.float32
    assert json.loads((home / "out" / "config.json").read_text())["dtype"] == "float32"
    torch.testing.assert_close(merged, W + change, rtol=0, atol=3e-8)  # within a unit in the last place
    assert (merged != W).float().mean() > 0.98


def test_another_base_model_and_its_tokenizer(tmp_path: Path) -> None:
    model = saved(tmp_path / "adapter", "gpt2", [2])
    moved = tmp_path / "moved"
    base("gpt2").save_pretrained(moved)
    (moved / "tokenizer.json").write_text("{}")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    export_merged(tmp_path / "adapter", tmp_path / "out", base_model=str(moved))
    merged = base_of(tmp_path / "out", torch.float32)
    torch.testing.assert_close(logits(merged, batch("gpt2")), logits(model, batch("gpt2")), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "named", "remedy"),
    [
        ({"base_model_name_or_path": None}, "base_model=None", "give its folder or name"),
        ({"task_type": None}, "task_type=None", "SEQ_CLS"),
        ({"task_type": "POETRY"}, "task_type='POETRY'", "adapter_config.json"),
    ],
)
def test_what_the_merged_export_cannot_guess(tmp_path: Path, changes: dict, named: str, remedy: str) -> None:
    saved(tmp_path / "adapter", "bert", [2])
    (tmp_path / "adapter" / "aroma_state.json").unlink()  # it would vouch for what the configuration was
    edit_config(tmp_path / "adapter", **changes)
    with pytest.raises(ConfigError) as caught:
        export_merged(tmp_path / "adapter", tmp_path / "out")
    assert str(caught.value).startswith(named)
    assert remedy in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "pretrained", "extra"),
    [
        ("bert", "encoder", ["layer.1.output.dense"]),
        ("roberta", "classifier of three", ["word_embeddings"]),
        ("roberta", "encoder", []),
    ],
)
def test_the_saved_head_decides_the_number_of_labels(
    tmp_path: Path, name: str, pretrained: str, extra: list[str]
) -> None:
    folder = saved_base(name)
    if pretrained == "encoder":
        folder = str(tmp_path / "encoder")
        base(name).base_model.save_pretrained(folder)
    classifier = ARCHITECTURES[name].model_class.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    model = adapted(name, classifier, modules_to_save=extra or None, target_modules=["query", "value"])
    set_ranks(model, [1])
    live_adapter(model).ever_controlled = True
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_with_adapter(tmp_path / "adapter")
    assert loaded.get_base_model().num_labels == 5
    torch.testing.assert_close(logits(loaded, batch(name)), logits(model, batch(name)), rtol=1e-5, atol=1e-6)


# Reading -------------------------------------------------------------------------------------------------------------


def test_the_rank_table_has_every_matrix(tmp_path: Path) -> None:
    model = saved(tmp_path, "bert", [0, 1, 3])
    rows = rank_table(tmp_path)
    layers = aroma_layers(model)
    assert [row.name for row in rows] == list(layers)
    assert [row.rank for row in rows] == [0, 1, 3] * 4 + [0]
    for row in rows:
        layer = layers[row.name]
        assert row.shape == (layer.out_features, layer.in_features)
        if row.rank == 0:
            assert row.effective_rank == 0
            continue
        sigma = torch.linalg.svdvals(deltas(model)[row.name])[: row.rank]
        p = sigma / sigma.sum()
        assert row.effective_rank == pytest.approx(math.exp(float(-(p * p.log()).sum())), rel=1e-4)


FOREIGN: dict[str, dict[str, Any]] = {
    "alpha over r": {"r": 4, "lora_alpha": 16},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"key": 2, r"^bert.encoder.layer.1.attention.self.query": 7},
        "alpha_pattern": {"value": 5, r"^bert.encoder.layer.0.attention.self.key": 3},
    },
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"key": 9}, "alpha_pattern": {"key": 2}},
}


def foreign(folder: Path, **fields: Any) -> Any:
    """A plain LoRA adapter of PEFT, its B moved."""
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "key", "value"], **fields)
    model = get_peft_model(base("bert"), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("fields", FOREIGN.values(), ids=FOREIGN.keys())
def test_an_adapter_of_plain_peft_is_read_with_its_scales(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = foreign(tmp_path / "adapter", **fields)
    adapter = read_adapter(tmp_path / "adapter")
    rows = {row.name: row for row in rank_table(tmp_path / "adapter")}
    assert len(adapter.updates) == len(rows) == 6
    ranks = set()
    for name, update in adapter.updates.items():
        layer = model.get_base_model().get_submodule(name)
        torch.testing.assert_close(update.B @ update.A, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-5)
        assert rows[name].rank == layer.r["default"]
        assert rows[name].shape == (32, 32)
        assert 0.5 < rows[name].effective_rank <= rows[name].rank
        ranks.add(rows[name].rank)
    assert len(ranks) == len({4, *fields.get("rank_pattern", {}).values()})
    uniform = export_uniform(tmp_path / "adapter", tmp_path / "out")
    assert uniform == (16 if "use_rslora" in fields else 8)
    loaded = PeftModel.from_pretrained(base("bert"), tmp_path / "out")
    torch.testing.assert_close(logits(loaded, batch("bert")), logits(model, batch("bert")), rtol=1e-4, atol=1e-5)
