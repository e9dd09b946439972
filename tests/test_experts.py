"""Experts that share a 3-D parameter: each matrix grows by itself, and is saved as PEFT's target_parameters are."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aroma import AromaConfig, aroma_layers, lora_tensors, save_adapter, verify_adapter
from aroma.errors import AromaError, CheckpointError, ConfigError
from aroma.export import export_merged, export_uniform, rank_table
from aroma.saved import read_adapter
from aroma.tuner.experts import pack, unpack
from models import METHOD, set_ranks
from quick import slow_but
from routed import EXPERTS, FAMILIES, PARAMETERS, UNUSED, RoutedNet, language_model, routed
from small_nets import SAVED_AT, Loop, loss_of, rows
from trainer_runs import assert_same

TOKENS = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(3))


def adapted(family: str, **changes: Any) -> Any:
    fields = {**METHOD, "target_modules": ["q_proj"], "target_parameters": PARAMETERS, "task_type": "CAUSAL_LM"}
    return get_peft_model(language_model(family), AromaConfig(**{**fields, **changes})).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    answer: Tensor = model(input_ids=TOKENS).logits
    return answer


def plain(folder: Path, base: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
        return PeftModel.from_pretrained(base, folder).eval()


def saved(model: Any, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This AROMA adapter was trained without its controller")
        model.save_pretrained(folder)


# Saved, loaded and merged --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", slow_but(["mixtral", "gpt-oss"], FAMILIES))
def test_experts_of_different_ranks_are_plain_lora(tmp_path: Path, family: str) -> None:
    model, base = adapted(family), logits(language_model(family))
    assert len(aroma_layers(model)) == 2 + 2 * 2 * EXPERTS
    torch.testing.assert_close(logits(model), base)
    ranks = set_ranks(model, [0, 3, 1, 0, 2], pair=True)
    said = logits(model)
    assert (said - base).abs().max() > 0.1
    saved(model, tmp_path)
    verify_adapter(tmp_path)
    assert {row.name: row.rank for row in rank_table(tmp_path)} == ranks
    again = plain(tmp_path, language_model(family))
    assert {type(module).__name__ for module in again.modules()} >= {"ParamWrapper"}
    torch.testing.assert_close(logits(again), said, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(again.merge_and_unload()), said, rtol=1e-4, atol=1e-4)
    grown = adapted(family)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not set_peft_model_state_dict(grown, tensors).unexpected_keys
    torch.testing.assert_close(logits(grown), said, rtol=1e-4, atol=1e-4)
    assert {name: layer.rank("default") for name, layer in aroma_layers(grown).items()} == ranks


def test_adapters_that_grow_other_parameters_of_a_module_are_saved_apart(tmp_path: Path) -> None:
    """PEFT wraps parameters in the order of the module, whichever grew first."""
    model = adapted("mixtral", target_parameters=["experts.down_proj"])
    model.add_adapter("later", AromaConfig(**METHOD, target_modules=["q_proj"], target_parameters=PARAMETERS))
    model.set_adapter("later")
    set_ranks(model, [0, 3, 1, 0, 2], pair=True, adapter="later")
    said = logits(model)
    saved(model, tmp_path)
    verify_adapter(tmp_path / "later")
    again = plain(tmp_path / "later", language_model("mixtral"))
    torch.testing.assert_close(logits(again), said, rtol=1e-4, atol=1e-4)


def test_merging_and_leaving(tmp_path: Path) -> None:
    model = adapted("gpt-oss")
    base = logits(model)
    set_ranks(model, [0, 2], pair=True)
    said = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This AROMA adapter was trained without its controller")
        model.merge_adapter()
        torch.testing.assert_close(logits(model), said, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-4)
        merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), said, rtol=1e-4, atol=1e-4)
    assert not any("aroma" in name for name, _ in merged.named_modules())


@pytest.mark.slow
def test_a_merged_model_is_exported(tmp_path: Path) -> None:
    language_model("qwen3-moe").save_pretrained(tmp_path / "base")
    model = adapted("qwen3-moe")
    set_ranks(model, [0, 2], pair=True)
    saved(model, tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged", base_model=str(tmp_path / "base"))
    merged = FAMILIES["qwen3-moe"][0].from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


def test_the_layout_is_that_of_peft() -> None:
    """Rank r of all experts, padded; by PEFT's own product."""
    base = RoutedNet()
    plain = get_peft_model(base, LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=PARAMETERS[1:]))
    wrapper: Any = plain.base_model.model.experts
    generator = torch.Generator().manual_seed(1)
    m, n = wrapper.out_features, wrapper.in_features
    updates = [
        (torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)) for rank in (0, 2, 1, 2)
    ]
    B, A = pack(updates)
    wrapper.lora_A["default"].weight.data, wrapper.lora_B["default"].weight.data = A, B
    expected = torch.stack([B_e @ A_e for B_e, A_e in updates])
    torch.testing.assert_close(wrapper.get_delta_weight("default"), expected)
    for found, given in zip(unpack(B, A, EXPERTS), updates, strict=True):
        assert torch.equal(found[0], given[0])
        assert torch.equal(found[1], given[1])


def test_a_module_whose_ranks_are_all_zero_is_left_out(tmp_path: Path) -> None:
    model = adapted("mixtral", target_modules=[])
    saved(model, tmp_path / "nothing")  # PEFT refuses an adapter without any
    torch.testing.assert_close(logits(plain(tmp_path / "nothing", language_model("mixtral"))), logits(model))
    assert {row.rank for row in rank_table(tmp_path / "nothing")} == {0}
    layer = aroma_layers(model)["model.layers.1.mlp.experts.down_proj.2"]
    layer.finished("default").append(torch.ones(layer.out_features, 1), torch.ones(1, layer.in_features))
    saved(model, tmp_path / "one")
    config = json.loads((tmp_path / "one/adapter_config.json").read_text())
    assert config["target_parameters"] == [f"model.layers.1.mlp.{name}" for name in sorted(PARAMETERS)]
    torch.testing.assert_close(logits(plain(tmp_path / "one", language_model("mixtral"))), logits(model))


def test_one_rank_for_engines(tmp_path: Path) -> None:
    model = adapted("mixtral")
    ranks = set_ranks(model, [0, 3, 1, 0, 2])
    saved(model, tmp_path / "adapter")
    assert export_uniform(tmp_path / "adapter", tmp_path / "out") == 8
    verify_adapter(tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    assert len(config["target_parameters"]) == 4
    again = PeftModel.from_pretrained(language_model("mixtral"), tmp_path / "out").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    table = {row.name: row.rank for row in rank_table(tmp_path / "out")}
    assert {name: table[name] for name in table if "experts" in name} == {
        name: rank for name, rank in ranks.items() if "experts" in name
    }
    with pytest.raises(ConfigError, match=r"rank=2: a module has rank 3"):
        export_uniform(tmp_path / "adapter", tmp_path / "small", rank=2)
    for rank, folder in ((None, "adapter"), (8, "out")):
        live, files = lora_tensors(model, rank), tmp_path / folder
        assert_same(live.tensors, load_file(files / "adapter_model.safetensors"))
        assert (
            live.config["target_parameters"]
            == json.loads((files / "adapter_config.json").read_text())["target_parameters"]
        )
    with pytest.raises(ConfigError, match=r"rank=2: .*experts\.\w+ has rank 3"):
        lora_tensors(model, 2)


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_gradients_are_those_of_the_dense_gradient(implementation: str, transposed: bool) -> None:
    """G = ∂L/∂W' by autograd, of a net whose weight is W' itself."""
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # the most that PyTorch has of it
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-8)
    model = routed(RoutedNet(implementation, transposed).to(dtype), lora_alpha=3, r=2)
    set_ranks(model, [0, 2, 1], pair=True)
    layers = aroma_layers(model)
    frozen = layers["experts.down_proj.1"]
    frozen.freeze("default")
    batch = rows(12, dtype=dtype)
    loss_of(model, batch).backward()
    dense = RoutedNet(implementation, transposed).to(dtype)
    for name, layer in layers.items():
        b, a = (part.detach() for part in layer.pair("default"))
        delta = layer.finished("default").B @ layer.finished("default").A + 1.5 * b @ a
        parameter, index = name.split(".")[1:]
        getattr(dense.experts, parameter).data[int(index)] += delta.T if transposed else delta
    loss_of(dense, batch).backward()
    for name, layer in layers.items():
        parameter, index = name.split(".")[1:]
        G = getattr(dense.experts, parameter).grad[int(index)]
        G = G.T if transposed else G
        assert bool(G.any()) == (int(index) != UNUSED)
        b, a = layer.pair("default")
        if layer is frozen:
            assert b.grad is None
            continue
        close(b.grad, 1.5 * G @ a.T)
        close(a.grad, 1.5 * b.T @ G)


# Growth --------------------------------------------------------------------------------------------------------------

RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "as it comes": lambda: {"model": routed()},
    "transposed": lambda: {"model": routed(RoutedNet("eager", transposed=True))},
    "bfloat16": lambda: {"model": routed(RoutedNet().bfloat16(), lora_alpha=3)},
}


@pytest.mark.parametrize("run", slow_but(["as it comes"], RUNS))
def test_an_expert_without_tokens_does_not_grow_and_a_run_resumes_to_the_bit(tmp_path: Path, run: str) -> None:
    torch.manual_seed(3)
    whole = Loop(**RUNS[run]())
    whole.go_on(SAVED_AT).save(tmp_path / "saved")
    expected = whole.go_on().came_to()
    ranks = {name: layer.rank("default") for name, layer in aroma_layers(whole.model).items()}
    unused = {name for name in ranks if name.endswith(f".{UNUSED}")}
    assert len(unused) == 2
    assert {ranks[name] for name in unused} == {0}
    assert len({rank for name, rank in ranks.items() if name not in unused}) > 1, "experts have ranks of their own"
    for name in unused:
        assert not aroma_layers(whole.model)[name].pair("default")[0].any()
    resumed = Loop.resumed(tmp_path / "saved", SAVED_AT, **RUNS[run]())
    resumed.go_on()
    assert_same(resumed.came_to(), expected, run)
    verify_adapter(tmp_path / "saved")
    save_adapter(whole.model, tmp_path / "end")
    dtype = next(whole.model.parameters()).dtype
    x = rows(12, seed=7, dtype=dtype)[0]
    if run != "bfloat16":  # of which PEFT rounds the weights in another order
        base = RoutedNet("eager", transposed=True) if run == "transposed" else RoutedNet()
        torch.testing.assert_close(plain(tmp_path / "end", base)(x), whole.model(x), rtol=1e-4, atol=1e-5)


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_parameters": ["experts.gate_up"]}, ["'experts.gate_up'", "no such parameter", "experts.down_proj"]),
        ({"target_parameters": ["q_proj.weight"]}, ["q_proj.weight", "(16, 16)", "target_modules"]),
        ({"target_parameters": ["input_layernorm.weight"]}, ["input_layernorm.weight", "(16,)", "leave it out"]),
        ({"target_parameters": "experts.gate_up_proj"}, ["target_parameters", "give a list"]),
        ({"target_parameters": [], "target_modules": "all-linear"}, ["target_parameters", "give a list"]),
        ({"lora_dropout": 0.1}, ["lora_dropout=0.1", "target_parameters", "set it to 0"]),
    ],
)
def test_bad_input_is_one_clear_error(changes: dict[str, Any], words: list[str]) -> None:
    method: dict[str, Any] = {"target_modules": [], "target_parameters": PARAMETERS}
    with pytest.raises(ConfigError) as error:
        get_peft_model(language_model("mixtral"), AromaConfig(**{**method, **changes}))
    said = str(error.value)
    assert all(word in said for word in words), said


def test_quantised_experts_are_refused() -> None:
    net = RoutedNet()
    net.experts.down_proj = nn.Parameter(torch.zeros(EXPERTS, 16, 24, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"down_proj'.*quantised \(uint8\).*16 or 32 bits"):
        routed(net)


def test_mixed_batches_are_refused() -> None:
    model = adapted("mixtral", target_modules=[])
    with pytest.raises(ConfigError, match="adapter_names"):
        model(input_ids=TOKENS, adapter_names=["default", "default"])


def _rank(folder: Path) -> None:
    _edit(folder, lambda config: config.update(r=7))


def _parameter(folder: Path) -> None:
    _edit(folder, lambda config: config.update(target_parameters=["model.layers.0.mlp.experts.up_proj"]))


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def _tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if ".base_layer.lora_B" in name)]
    save_file(tensors, path)


def _state(folder: Path) -> None:
    (folder / "aroma_state.json").unlink()


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (_rank, CheckpointError, "adapter_config.json: r=7"),
        (_parameter, CheckpointError, "target_parameters"),
        (_tensor, CheckpointError, "adapter_model.safetensors"),
        (_state, ConfigError, "target_parameters"),
    ],
)
def test_a_damaged_adapter_is_noticed(
    tmp_path: Path, damage: Callable[[Path], None], kind: type[AromaError], words: str
) -> None:
    model = adapted("mixtral", target_modules=[])
    set_ranks(model, [1, 0, 2])
    saved(model, tmp_path / "adapter")
    read_adapter(tmp_path / "adapter")
    copy = shutil.copytree(tmp_path / "adapter", tmp_path / "copy")
    damage(copy)
    with pytest.raises(kind) as error:
        read_adapter(copy)
    assert words in str(error.value)


def test_an_adapter_of_another_number_of_experts_is_refused() -> None:
    model = adapted("mixtral", target_modules=[])
    tensors = {"base_model.model.model.layers.0.mlp.experts.lora_A.weight": torch.zeros(3, 24)}
    tensors["base_model.model.model.layers.0.mlp.experts.lora_B.weight"] = torch.zeros(16, 3)
    with pytest.raises(CheckpointError, match="do not fit 4 experts"):
        set_peft_model_state_dict(model, tensors)
