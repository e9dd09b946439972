"""TRL's trainers of preferences, of rewards and by reinforcement: `peft_config=AromaConfig(...)` and the callback."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback

import trl_runs
from aroma import AromaCallback, AromaConfig, aroma_layers, save_adapter, verify_adapter
from models import METHOD, logits, set_ranks
from trainer_runs import assert_same, growth, live, steps_of
from trl_runs import KINDS, base, examples, trainer_for

INPUTS = {"input_ids": torch.arange(3, 13).reshape(2, 5)}

WITH_REFERENCE = [kind for kind in KINDS if kind != "reward"]

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")


def quick(*fast: str, kinds: Iterable[str] = KINDS) -> list[Any]:
    """All kinds of trainer, those that are not named only in the slow tests."""
    return [kind if kind in fast else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in steps_of(trainer.state.log_history)]


def comparable(trainer: Trainer) -> dict[str, Any]:
    """What `live` has, without what TRL counts anew after a resume, and without times."""
    found = live(trainer)
    for entry in found["log"]:
        entry.pop("num_tokens", None)
        entry.pop("step_time", None)
    return found


def grown(folder: Path) -> Any:
    """A model whose saved adapter trains on: all that it learnt is in finished components."""
    config = {"task_type": "CAUSAL_LM", **METHOD}
    if not folder.exists():
        first = get_peft_model(base("dpo"), AromaConfig(**config))
        set_ranks(first, [2, 0, 1])
        save_adapter(first, folder)
    model = get_peft_model(base("dpo"), AromaConfig(**config))
    model.load_adapter(str(folder), "default", is_trainable=True)
    return model


# Growing, saving, resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", quick("dpo", "grpo"))
def test_it_grows_resumes_bit_for_bit_and_plain_peft_loads_it(tmp_path: Path, kind: str) -> None:
    trainer = trainer_for(kind, tmp_path / "whole", AromaCallback())
    trainer.train()
    controller = growth(trainer).controller
    assert controller.global_step == 16
    ranks = controller.ranks()
    assert set(ranks) == set(aroma_layers(trainer.model))
    assert max(ranks.values()) > 1
    assert steps_of(trainer.state.log_history)[-1]["total_rank"] == controller.total_rank

    trainer.save_model(str(tmp_path / "final"))
    for folder in ("final", "whole/checkpoint-6", "whole/checkpoint-16"):
        verify_adapter(tmp_path / folder)
    loaded = PeftModel.from_pretrained(base(kind), str(tmp_path / "final"))
    torch.testing.assert_close(logits(loaded, INPUTS), logits(trainer.model, INPUTS))
    assert not torch.allclose(logits(loaded, INPUTS), logits(base(kind), INPUTS), atol=0.1)

    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "again" / "checkpoint-6")
    again = trainer_for(kind, tmp_path / "again", AromaCallback())
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-6"))
    assert_same(comparable(again), comparable(trainer))


# The reference model -------------------------------------------------------------------------------------------------


def test_the_reference_is_the_base_model_however_the_adapter_has_grown(tmp_path: Path) -> None:
    own = trainer_for("dpo", tmp_path / "own", AromaCallback(), max_steps=10, save_strategy="no")
    own.train()
    assert min(growth(own).controller.ranks().values()) > 1
    other = trainer_for(
        "dpo", tmp_path / "other", AromaCallback(), max_steps=10, save_strategy="no", ref_model=base("dpo")
    )
    other.train()
    assert losses(own)[0] == pytest.approx(0.6931, abs=1e-4)  # log 2: both are the same model
    assert losses(own)[-1] < 0.68
    assert losses(own) == pytest.approx(losses(other), abs=1e-6)


@pytest.mark.parametrize("kind", quick("dpo", kinds=WITH_REFERENCE))
def test_an_adapter_that_trains_on_has_its_start_as_reference(tmp_path: Path, kind: str) -> None:
    start = grown(tmp_path / "start")
    before = logits(start, INPUTS)
    changes: dict[str, Any] = {"config": None, "save_steps": 6}
    trainer = trainer_for(kind, tmp_path / "whole", AromaCallback(), model=start, **changes)
    assert {*trainer.model.peft_config} == {"default", "ref"}
    trainer.train()
    model = trainer.model
    controller = growth(trainer).controller
    assert controller.adapter_name == "default"
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".ref." in name)
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not held & {id(parameter) for name, parameter in model.named_parameters() if ".ref." in name}
    after = logits(model, INPUTS)
    model.set_adapter("ref")
    torch.testing.assert_close(logits(model, INPUTS), before, rtol=0, atol=0)
    model.set_adapter("default")
    assert not torch.allclose(after, before, atol=0.1)

    folder = tmp_path / "again" / "checkpoint-6"
    shutil.copytree(tmp_path / "whole" / folder.name, folder)
    verify_adapter(folder)
    verify_adapter(folder / "ref")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base("dpo"), str(folder / "ref")), INPUTS), before)
    again = trainer_for(kind, tmp_path / "again", AromaCallback(), model=grown(tmp_path / "start"), **changes)
    again.train(resume_from_checkpoint=str(folder))
    assert_same(comparable(again), comparable(trainer))


def test_an_adapter_of_its_own_is_no_copy(tmp_path: Path) -> None:
    model = grown(tmp_path / "start")
    model.add_adapter("second", model.peft_config["default"])
    model.add_adapter("ref", AromaConfig(task_type="CAUSAL_LM"))
    assert not model.peft_config["ref"].inference_mode
    for name in ("second", "ref"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model, INPUTS), logits(base("dpo"), INPUTS))


# Sampling ------------------------------------------------------------------------------------------------------------


class Generating(TrainerCallback):
    """Generates after every third step, with a cache and without, as the trainer does: in training mode."""

    def __init__(self) -> None:
        self.ranks: list[int] = []
        self.texts: set[tuple[int, ...]] = set()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step % 3:
            return
        with torch.no_grad():
            answers = [generated(model, use_cache) for use_cache in (True, False)]
        torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
        self.ranks.append(sum(layer.rank("default") for layer in aroma_layers(model).values()))
        assert all(module.training for module in aroma_layers(model).values())


def generated(model: Any, use_cache: bool) -> Tensor:
    """Logits (steps, batch, vocabulary) of a greedy answer."""
    told = model.generate(
        **INPUTS,
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert (told.past_key_values is not None) == use_cache
    return torch.stack(told.logits)


def test_it_generates_between_steps_with_a_cache(tmp_path: Path) -> None:
    generating = Generating()
    short: dict[str, Any] = {"save_strategy": "no", "max_steps": 10}
    trainer = trainer_for("grpo", tmp_path / "seen", AromaCallback(), generating, **short)
    trainer.train()
    assert len({*generating.ranks}) > 1
    alone = trainer_for("grpo", tmp_path / "alone", AromaCallback(), **short)
    alone.train()
    assert_same(comparable(trainer), comparable(alone))
    with torch.no_grad():
        torch.testing.assert_close(
            generated(trainer.model, True), generated(trainer.model.merge_and_unload(), True), rtol=1e-4, atol=1e-4
        )


def test_without_any_reward_the_papers_rule_finishes_at_rank_0(tmp_path: Path) -> None:
    trainer = trainer_for(
        "grpo", tmp_path, AromaCallback(), reward_funcs=lambda completions, **_: [0.0] * len(completions), beta=0.0
    )
    trainer.train()
    controller = growth(trainer).controller
    assert controller.finished
    assert (controller.total_rank, trainer.state.global_step) == (0, 4)


# The page ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_does_what_it_says(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "reinforcement.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    names: dict[str, Any] = {
        "preferences": examples("dpo", 280),
        "prompts": examples("grpo"),
        "dpo_args": trainer_for("dpo", tmp_path / "dpo", max_steps=60, config=None).args,
        "grpo_args": trainer_for("grpo", tmp_path / "grpo", max_steps=60, config=None, beta=0.0).args,
        "reward": trl_runs.reward,
        "tokenizer": trl_runs.tokenizer(),
        **{name: base("dpo") for name in ("base", "fresh_base", "another_base")},
    }
    for block in blocks:
        exec(compile(block, "reinforcement.md", "exec"), names)
        if "callback" in names:
            assert names["callback"].controller.global_step == 60
    assert {tensor.shape[tensor.shape.index(16)] for tensor in names["tensors"].values()} == {16}


def test_the_page_has_the_table_that_the_example_makes_of_its_runs(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    committed = root / "results" / "rl"
    for file in committed.glob("*.json"):
        shutil.copy(file, tmp_path)
    runpy.run_path(str(root / "examples" / "trl_grpo.py"))["tabulate"](tmp_path)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table == (committed / "table.md").read_text(encoding="utf-8")
    assert table in (root / "docs" / "reinforcement.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_does_what_is_missing_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[1] / "examples" / "trl_grpo.py"
    example: dict[str, Any] = runpy.run_path(str(script))
    example["train_base"](tmp_path / "base", example["make_tokenizer"](), steps=3)
    inside = example["main"].__globals__
    monkeypatch.setitem(inside, "RATES", (3e-3,))
    monkeypatch.setitem(inside, "SEEDS", (0,))
    monkeypatch.setitem(inside, "METHODS", {name: example["METHODS"][name] for name in ("aroma", "lora-1")})
    monkeypatch.setattr("sys.argv", ["trl_grpo.py", str(tmp_path), "--steps", "60"])
    example["main"]()
    files = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    assert {*files} == {
        f"{kind}.json" for kind in ("choosing-aroma-0.003", "choosing-lora-1-0.003", "aroma-0", "lora-1-0")
    }
    told = json.loads((tmp_path / "aroma-0.json").read_text())
    assert len(told["reward"]) == len(told["total_rank"]) == 60
    assert {"git_revision", "device"} <= told.keys()
    assert "trl" in told["versions"]
    assert max(told["total_rank"]) > 0
    assert json.loads((tmp_path / "lora-1-0.json").read_text())["parameters"] > 0
    assert (tmp_path / "reward.png").stat().st_size > 5000
    assert "| lora-1   | 0.003" in (tmp_path / "table.md").read_text()
    (tmp_path / "lora-1-0.json").unlink()
    example["main"]()
    after = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    assert {name for name in files if after[name] != files[name]} == {"lora-1-0.json"}
