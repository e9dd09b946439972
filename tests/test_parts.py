"""Fused weights whose parts grow, each by itself: plain LoRA of the whole module, and the same function."""

from __future__ import annotations

import json
import shutil
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from aroma import AromaConfig, aroma_layers, lora_tensors, verify_adapter
from aroma.cli.inspect import serving_hint
from aroma.errors import CheckpointError, ConfigError
from aroma.export import export_uniform, rank_table
from aroma.saved import read_adapter
from aroma.tuner.parts import join, split
from corruptions import seal
from models import adapted, base, batch, logits, set_ranks
from small_nets import SAVED_AT, STEPS, Loop, Net, loss_of, net, rows
from trainer_runs import assert_same

SPLITS: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "split_modules": {"c_attn": 3}},
    "llama": {"target_modules": ["q_proj", "o_proj"], "split_modules": {"self_attn.q_proj": [20, 8, 4]}},
}


def saved(model: Any, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This AROMA adapter was trained without its controller")
        model.save_pretrained(folder)


@pytest.mark.parametrize("name", SPLITS)
def test_parts_of_different_ranks_are_plain_lora(tmp_path: Path, name: str) -> None:
    model, inputs = adapted(name, **SPLITS[name]), batch(name)
    torch.testing.assert_close(logits(model, inputs), logits(base(name), inputs))
    names = [layer for layer in aroma_layers(model) if layer.endswith(("c_attn.0", "c_attn.1", "q_proj.2"))]
    assert len(names) == (4 if name == "gpt2" else 2)
    ranks = set_ranks(model, [0, 5, 3, 2, 4], pair=True)
    said = logits(model, inputs)
    assert (said - logits(base(name), inputs)).abs().max() > 0.1
    saved(model, tmp_path)
    verify_adapter(tmp_path)
    assert {row.name: row.rank for row in rank_table(tmp_path)} == ranks
    served = export_uniform(tmp_path, tmp_path / "served")
    assert max(ranks.values()) < 8 < served, "ranks of parts add up"
    assert serving_hint(read_adapter(tmp_path)).endswith(f"--max-lora-rank {served}.")
    plain = PeftModel.from_pretrained(base(name), tmp_path).eval()
    torch.testing.assert_close(logits(plain, inputs), said, rtol=1e-4, atol=1e-4)
    again = adapted(name, **SPLITS[name])
    assert not set_peft_model_state_dict(again, load_file(tmp_path / "adapter_model.safetensors")).unexpected_keys
    assert {key: layer.rank("default") for key, layer in aroma_layers(again).items()} == ranks
    torch.testing.assert_close(logits(again, inputs), said, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, inputs), logits(base(name), inputs))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This AROMA adapter was trained without its controller")
        model.merge_adapter()
        torch.testing.assert_close(logits(model, inputs), said, rtol=1e-4, atol=1e-4)
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), said, rtol=1e-4, atol=1e-4)
    assert not any("aroma" in module for module, _ in merged.named_modules())


def test_gradients_are_those_of_blocks_of_rows() -> None:
    model = net(Net().double(), split_modules={"layers.0": [10, 6], "layers.2": 2})
    set_ranks(model, [1, 0, 2], pair=True)
    layers = aroma_layers(model)
    assert [*layers] == ["layers.0.0", "layers.0.1", "layers.1", "layers.2.0", "layers.2.1", "layers.3"]
    data = rows(6, dtype=torch.float64)
    dense, starts = Net().double(), {"layers.0.0": 0, "layers.0.1": 10, "layers.2.0": 0, "layers.2.1": 8}
    for name, layer in layers.items():
        weight = dense.get_submodule(name.rsplit(".", 1)[0] if name in starts else name).weight
        start = starts.get(name, 0)
        weight.data[start : start + layer.out_features] += layer.get_delta_weight("default").detach()
    loss_of(model, data).backward()
    loss_of(dense, data).backward()
    for name, layer in layers.items():
        G = dense.get_submodule(name.rsplit(".", 1)[0] if name in starts else name).weight.grad
        assert G is not None
        G = G[starts.get(name, 0) :][: layer.out_features]
        b, a = layer.pair("default")
        torch.testing.assert_close(b.grad, layer.scaling["default"] * G @ a.T)
        torch.testing.assert_close(a.grad, layer.scaling["default"] * b.T @ G)


def test_parts_are_joined_and_split() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes, ranks = [4, 2, 3], [2, 0, 1]
    updates = [
        (torch.randn(m, r, generator=generator), torch.randn(r, 5, generator=generator))
        for m, r in zip(sizes, ranks, strict=True)
    ]
    B, A = join(updates)
    assert B.shape == (9, 3)
    expected = torch.cat([B_p @ A_p for B_p, A_p in updates])
    torch.testing.assert_close(B @ A, expected)
    found = split(B, A, sizes)
    assert found is not None
    for pair, given in zip(found, updates, strict=True):
        assert all(map(torch.equal, pair, given))
    assert split(torch.ones(9, 1), torch.ones(1, 5), sizes) is None


def test_a_run_grows_and_resumes_to_the_bit(tmp_path: Path) -> None:
    def loop() -> dict[str, Any]:
        return {"model": net(split_modules={"layers.1": [9, 7]})}

    torch.manual_seed(3)
    whole = Loop(**loop())
    whole.go_on(SAVED_AT).save(tmp_path)
    expected = whole.go_on(STEPS).came_to()
    ranks = {name: layer.rank("default") for name, layer in aroma_layers(whole.model).items()}
    assert ranks["layers.1.0"] + ranks["layers.1.1"] > 0
    resumed = Loop.resumed(tmp_path, SAVED_AT, **loop())
    resumed.go_on(STEPS)
    assert_same(resumed.came_to(), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split_modules": {"c_attn": 5}}, ["split_modules={'c_attn': 5}", "96 outputs"]),
        ({"split_modules": {"c_attn": [90, 5]}}, ["[90, 5]", "96 outputs"]),
        ({"split_modules": {"qkv": 3}}, ["split_modules='qkv'", "no module that grows"]),
        ({"split_modules": {"c_attn": 1}}, ["split_modules", "give a number of equal parts"]),
    ],
)
def test_bad_input_is_one_clear_error(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        get_peft_model(base("gpt2"), AromaConfig(**{"target_modules": ["c_attn"], **changes}))
    said = str(error.value)
    assert all(word in said for word in words), said


def test_one_rank_for_engines(tmp_path: Path) -> None:
    model, inputs = adapted("gpt2", **SPLITS["gpt2"]), batch("gpt2")
    ranks = set_ranks(model, [2, 0, 1])
    saved(model, tmp_path / "adapter")
    assert export_uniform(tmp_path / "adapter", tmp_path / "out") == 8
    verify_adapter(tmp_path / "out")
    table = {row.name: row.rank for row in rank_table(tmp_path / "out")}
    assert all(table[name] == rank for name, rank in ranks.items() if "c_attn" in name)
    plain = PeftModel.from_pretrained(base("gpt2"), tmp_path / "out").eval()
    torch.testing.assert_close(logits(plain, inputs), logits(model, inputs), rtol=1e-4, atol=1e-4)
    for rank, folder in ((None, "adapter"), (8, "out")):
        assert_same(lora_tensors(model, rank).tensors, load_file(tmp_path / folder / "adapter_model.safetensors"))


def test_what_is_no_update_of_parts_is_refused(tmp_path: Path) -> None:
    model = adapted("gpt2", **SPLITS["gpt2"])
    set_ranks(model, [1])
    saved(model, tmp_path / "adapter")
    whole = adapted("gpt2", target_modules=["c_attn"])
    set_ranks(whole, [2])
    saved(whole, tmp_path / "whole")
    tensors = load_file(tmp_path / "whole/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="are not those of parts"):
        set_peft_model_state_dict(adapted("gpt2", **SPLITS["gpt2"]), tensors)
    copy = shutil.copytree(tmp_path / "adapter", tmp_path / "copy")
    tensors = load_file(copy / "adapter_model.safetensors")
    tensors = {name: tensor + 1 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="sha256"):
        verify_adapter(copy)
    state = json.loads((copy / "aroma_state.json").read_text())
    state["files"]["adapter_model.safetensors"] = sha256((copy / "adapter_model.safetensors").read_bytes()).hexdigest()
    seal(copy / "aroma_state.json", state)
    with pytest.raises(CheckpointError, match=r"has no update of parts with .* outputs; the file is damaged"):
        verify_adapter(copy)


def test_a_second_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted("gpt2", **SPLITS["gpt2"])
    with pytest.raises(ConfigError, match=r"split_modules=.*second one cannot be added"):
        model.add_adapter("other", AromaConfig(target_modules=["c_attn"], inference_mode=True))
