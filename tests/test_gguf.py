"""Adapters as GGUF files: what they hold, and what is refused. In llama.cpp itself: `engine/test_engine.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from aroma.errors import CheckpointError, ConfigError
from aroma.export import export_uniform
from aroma.gguf import export_gguf
from aroma.tuner import live_adapter
from models import adapted, base, deltas, saved_base, set_ranks

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def grown(folder: Path, ranks: list[int], **changes: Any) -> Any:
    """A tiny Llama with components of the ranks by turns, saved in `folder`."""
    model = adapted("llama", **changes)
    set_ranks(model, ranks, pair=True)
    live_adapter(model).ever_controlled = True
    model.save_pretrained(folder)
    return model


def lora(folder: Path, name: str = "llama", **changes: Any) -> Any:
    """A plain LoRA adapter of PEFT with random updates, saved in `folder`."""
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    model = get_peft_model(base(name), LoraConfig(**{**options, **changes}, init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = saved_base(name)
    model.save_pretrained(folder)
    return model


def peft_deltas(model: Any) -> dict[str, Tensor]:
    """ΔW of every module by PEFT's own account."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def written(file: Path) -> dict[str, Tensor]:
    """ΔW of every tensor of a GGUF adapter by llama.cpp's rule: alpha over the rank of that tensor, times B A."""
    reader = GGUFReader(file)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)).double() for tensor in reader.tensors}
    result = {}
    for name in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        A, B = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        result[name] = alpha / A.shape[0] * B @ A
    assert not tensors
    return result


def as_transformers_reads(name: str, delta: Tensor) -> Tensor:
    """ΔW in the order of rows that transformers gives a tensor of this name when it loads a Llama's GGUF."""
    processor = LlamaTensorProcessor(config={"num_attention_heads": 2, "num_key_value_heads": 1})
    return torch.from_numpy(np.array(processor.process(delta.numpy(), name).weights))


# What is written -----------------------------------------------------------------------------------------------------


def _uniform(folder: Path) -> Any:
    model = grown(folder / "grown", [0, 1, 2, 5])
    export_uniform(folder / "grown", folder / "adapter")
    return deltas(model)


SOURCES = {
    "grown": lambda folder: deltas(grown(folder / "adapter", [0, 1, 2, 5], lora_alpha=3)),
    "rank 8": lambda folder: deltas(grown(folder / "adapter", [0, 8, 16], r=8, lora_alpha=16)),
    "uniform": _uniform,
    "peft": lambda folder: peft_deltas(lora(folder / "adapter")),
    "rslora": lambda folder: peft_deltas(lora(folder / "adapter", use_rslora=True)),
    "patterns": lambda folder: peft_deltas(
        lora(folder / "adapter", rank_pattern={"q_proj": 2, "1.mlp.up_proj": 7}, alpha_pattern={"k_proj": 3})
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_update_is_there_and_in_the_order_of_its_rows(tmp_path: Path, source: str) -> None:
    expected = SOURCES[source](tmp_path)
    ranks = export_gguf(tmp_path / "adapter", tmp_path / "out.gguf", saved_base("llama"))
    found = written(tmp_path / "out.gguf")
    assert sorted(found) == sorted(ranks)
    for module, delta in expected.items():
        _, _, layer, kind = module.split(".", 3)
        name = f"blk.{layer}.{NAMES[kind]}.weight"
        torch.testing.assert_close(as_transformers_reads(name, found.pop(name)), delta, rtol=1e-5, atol=1e-6)
    assert not found
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.gguf"]


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    lora(tmp_path / "adapter", rank_pattern={"q_proj": 6})
    export_gguf(tmp_path / "adapter", tmp_path / "out.gguf")
    reader = GGUFReader(tmp_path / "out.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "out",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}


# What is refused -----------------------------------------------------------------------------------------------------


def _base(folder: Path, **changes: Any) -> str:
    config = LlamaConfig.from_pretrained(saved_base("llama"))
    config.update(changes)
    config.save_pretrained(folder / "base")
    return str(folder / "base")


def test_another_architecture_is_refused_with_the_way_out(tmp_path: Path) -> None:
    lora(tmp_path / "adapter", "gpt2")
    with pytest.raises(ConfigError, match=r"^base_model=.*for llama only, not for gpt2; export --merged"):
        export_gguf(tmp_path / "adapter", tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"modules_to_save": ["lm_head"]}, "adapter"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "target_modules"),
        ({"target_modules": ["lm_head", "q_proj"]}, "target_modules"),
        ({"use_dora": True}, "use_dora"),
    ],
    ids=["trained head", "trained tokens", "embedding", "head", "dora"],
)
def test_what_has_no_place_in_the_file_is_refused(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    lora(tmp_path / "adapter", **changes)
    with pytest.raises(ConfigError, match=f"^{field}="):
        export_gguf(tmp_path / "adapter", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, r"it has no model\.layers\.1\.mlp\.down_proj of shape \(32, 48\)"),
        ({"num_key_value_heads": 2}, r"it has no model\.layers\.0\.self_attn\.k_proj of shape \(16, 32\)"),
    ],
    ids=["layers", "heads"],
)
def test_a_base_model_other_than_the_adapters_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    lora(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=f"^base_model=.*{message}"):
        export_gguf(tmp_path / "adapter", tmp_path / "out.gguf", _base(tmp_path, **changes))


def test_bad_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora(tmp_path / "adapter")
    (tmp_path / "mine.gguf").write_text("mine")
    with pytest.raises(ConfigError, match=r"^out=.*nothing is overwritten"):
        export_gguf(tmp_path / "adapter", tmp_path / "mine.gguf")
    assert (tmp_path / "mine.gguf").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"^out=.*ends in \.gguf"):
        export_gguf(tmp_path / "adapter", tmp_path / "served")
    with pytest.raises(CheckpointError, match="no such folder"):
        export_gguf(tmp_path / "absent", tmp_path / "out.gguf")
    with pytest.raises(ConfigError, match=r"^base_model=.*cannot be read"):
        export_gguf(tmp_path / "adapter", tmp_path / "out.gguf", str(tmp_path / "absent"))
    monkeypatch.setattr("aroma.gguf.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^gguf: not installed; run: pip install 'aroma-peft\[gguf\]'$"):
        export_gguf(tmp_path / "adapter", tmp_path / "out.gguf")
