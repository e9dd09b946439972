"""TRL's trainers of preferences, of rewards and by reinforcement: `peft_config=AromaConfig(...)` and the callback."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer

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


@pytest.mark.parametrize("trains_on", [False, True])
def test_a_reference_computed_before_the_training_is_the_same(tmp_path: Path, trains_on: bool) -> None:
    """`precompute_ref_log_probs`: before the adapter grows, not after."""
    found = []
    for precomputed in (False, True):
        start: dict[str, Any] = {"model": grown(tmp_path / "start"), "config": None} if trains_on else {}
        changes = {"max_steps": 10, "save_strategy": "no", "precompute_ref_log_probs": precomputed, **start}
        trainer = trainer_for("dpo", tmp_path / str(precomputed), AromaCallback(), **changes)
        trainer.train()
        found.append(losses(trainer))
        assert min(growth(trainer).controller.ranks().values()) > 1
    assert found[0] == pytest.approx(found[1], abs=1e-6)


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


# The page ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_does_what_it_says(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "guide.md").read_text(encoding="utf-8")
    imports = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)[0]
    text = text.partition("\n## Preferences and reinforcement learning\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    names: dict[str, Any] = {
        "preferences": examples("dpo", 280),
        "prompts": examples("grpo"),
        "dpo_args": trainer_for("dpo", tmp_path / "dpo", max_steps=60, config=None).args,
        "grpo_args": trainer_for("grpo", tmp_path / "grpo", max_steps=60, config=None, beta=0.0).args,
        "reward": trl_runs.reward,
        "tokenizer": trl_runs.tokenizer(),
        **{name: base("dpo") for name in ("base", "fresh_base")},
    }
    for block in [imports, *blocks]:
        exec(compile(block, "guide.md", "exec"), names)
        if "trainer" in names:
            assert names["trainer"].state.global_step == 60
    assert names["callback"].controller.global_step == 60
