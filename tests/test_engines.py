"""A live adapter as plain tensors, for engines that sample while it trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

import engine_ranks
from aroma import AromaCallback, AromaConfig, LoraTensors, aroma_layers, lora_tensors, save_adapter
from aroma.errors import ConfigError
from aroma.export import export_uniform
from models import METHOD, adapted, deltas, set_ranks
from ranks import launch
from trl_runs import trainer_for

INPUTS = {"input_ids": torch.arange(3, 13).reshape(2, 5)}
PREFIX = "base_model.model."

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")


def some(ranks: tuple[int, ...] = (2, 0, 3), pair: bool = False, **changes: Any) -> Any:
    """A Llama with finished components of these ranks in turn."""
    model = adapted("llama", **changes)
    set_ranks(model, [*ranks], pair=pair)
    return model


# What vLLM's loader does, by its source (vllm/lora: PEFTHelper, LoRAModel.from_lora_tensors)


def as_vllm_reads(lora: LoraTensors, max_lora_rank: int) -> dict[str, Tensor]:
    """Return ΔW of every module by its name, or fail where vLLM would refuse the adapter."""
    config = json.loads(json.dumps(lora.config))  # it reads JSON
    assert isinstance(config["r"], int)
    assert config["r"] > 0
    assert isinstance(config["target_modules"], list)
    assert config["bias"] == "none"
    for unsupported in ("modules_to_save", "use_dora", "lora_bias", "layer_replication", "use_qalora", "use_bdlora"):
        assert not config.get(unsupported), unsupported
    assert config["init_lora_weights"] is True
    assert max([config["r"], *config["rank_pattern"].values()]) <= max_lora_rank
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in lora.tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        assert found, name
        factors.setdefault(found[1], {})[found[2]] = tensor
    updates = {}
    for module, sides in factors.items():
        rank, alpha = (
            next((v for key, v in config[pattern].items() if re.match(rf"(.*\.)?({key})$", module)), config[default])
            for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        assert sides["A"].shape[0] == sides["B"].shape[1] == rank
        updates[module] = alpha / rank * (sides["B"].double() @ sides["A"].double())
    return updates


@pytest.mark.parametrize("rank", [None, 8])
def test_it_has_the_layout_and_the_scale_that_vllm_reads(rank: int | None) -> None:
    model = some(pair=True, lora_alpha=3)
    lora = lora_tensors(model, rank)
    read, true = as_vllm_reads(lora, max_lora_rank=8), deltas(model)
    assert set(read) == set(true) == set(aroma_layers(model))
    for name, update in true.items():
        torch.testing.assert_close(read[name], update, rtol=1e-6, atol=1e-7)
    if rank is not None:
        assert {tensor.shape[tensor.shape.index(rank)] for tensor in lora.tensors.values()} == {rank}
        assert not lora.config["rank_pattern"]
        # Fused layers (qkv_proj, gate_up_proj) of an engine need all of their parts.
        assert lora.config["target_modules"] == sorted(aroma_layers(model))


def test_it_is_what_the_files_hold(tmp_path: Path) -> None:
    model = some(pair=True)
    save_adapter(model, tmp_path / "saved")
    export_uniform(tmp_path / "saved", tmp_path / "uniform", rank=16)
    for folder, rank in (("saved", None), ("uniform", 16)):
        lora = lora_tensors(model, rank)
        held = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert set(lora.tensors) == set(held)
        assert all(torch.equal(lora.tensors[name], tensor) for name, tensor in held.items())
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        differing = {key for key in {*config, *lora.config} if config.get(key) != lora.config.get(key)}
        assert differing <= {"inference_mode"}


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("rank", [None, 3 + 1])
def test_what_was_given_away_stays_as_it_was_and_giving_changes_nothing(rank: int | None, pair: bool) -> None:
    model = some(pair=pair)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = lora_tensors(model, rank)
    kept = {name: tensor.clone() for name, tensor in given.tensors.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(1.0)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in given.tensors.items())


# While it trains -----------------------------------------------------------------------------------------------------


class Engine(TrainerCallback):
    """Takes the tensors after every step, as an engine that samples would."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.shapes: list[dict[str, Any]] = []
        self.ranks: set[int] = set()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        lora = lora_tensors(model, self.rank)
        read, true = as_vllm_reads(lora, self.rank), deltas(model)
        for name, update in true.items():
            torch.testing.assert_close(read[name], update, rtol=1e-6, atol=1e-7)
        self.shapes.append({"config": lora.config, **{name: tensor.shape for name, tensor in lora.tensors.items()}})
        self.ranks |= {layer.rank("default") for layer in aroma_layers(model).values()}


def test_its_shapes_never_change_while_it_grows(tmp_path: Path) -> None:
    engine = Engine(rank=4)
    config = AromaConfig(task_type="CAUSAL_LM", **{**METHOD, "max_components": 4})
    trainer_for("grpo", tmp_path, AromaCallback(), engine, config=config, save_strategy="no", max_steps=10).train()
    assert len(engine.ranks) > 2
    assert all(shapes == engine.shapes[0] for shapes in engine.shapes)


@pytest.mark.slow
def test_sharded_processes_give_what_one_gives(tmp_path: Path) -> None:
    launch(2, engine_ranks.__file__, str(tmp_path))
    one = engine_ranks.given_after_every_step()
    assert any(tensor.any() for tensor in one[-1].values())
    for rank in (0, 1):
        sharded = torch.load(tmp_path / f"given-{rank}.pt", weights_only=True)
        for step, (found, alone) in enumerate(zip(sharded, one, strict=True)):
            assert set(found) == set(alone)
            for name, tensor in alone.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=f"{step} {name}")


# Bad input -----------------------------------------------------------------------------------------------------------


def test_a_rank_that_a_matrix_has_outgrown_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank=2: model\.layers\.0\.self_attn\.v_proj has rank 3; give at least"):
        lora_tensors(some(), rank=2)


def test_trained_modules_that_no_lora_tensors_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"modules_to_save=\['classifier', 'score'\]: they train, too"):
        lora_tensors(adapted("bert"))
