"""Several growing adapters over one frozen model: each grows as it would alone, and rows of a batch choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import adapter_ranks
from adapter_ranks import UNLIKE, Adapter, plain_net
from aroma import AromaCallback, AromaConfig, aroma_layers, attach, save_adapter, verify_adapter
from aroma.errors import ConfigError
from aroma.export import rank_table
from aroma.integrations.callback import trainable_adapter
from ranks import launch
from small_nets import STEPS, trainable
from trainer_runs import METHOD as PAPER
from trainer_runs import adapted, assert_same, growth, tiny_bert, trainer_for


def alone(which: int) -> Adapter:
    only = Adapter(plain_net(UNLIKE) if which else plain_net(), "default", (0.01, 0.02)[which], which)
    while only.done < STEPS:
        only.step()
    return only


@pytest.mark.parametrize("order", ["in turns", "one after another"])
def test_each_grows_as_it_would_alone(order: str) -> None:
    model = plain_net()
    base = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
    if order == "in turns":
        model.add_adapter("other", AromaConfig(**UNLIKE), autocast_adapter_dtype=False)
        both = [Adapter(model, "default", 0.01, 0), Adapter(model, "other", 0.02, 1)]
        for _ in range(STEPS):
            for one in both:
                one.step()
    else:
        both = [Adapter(model, "default", 0.01, 0)]
        for _ in range(STEPS):
            both[0].step()
        both[0].growth.detach()
        model.add_adapter("other", AromaConfig(**UNLIKE), autocast_adapter_dtype=False)
        both.append(Adapter(model, "other", 0.02, 1))
        for _ in range(STEPS):
            both[1].step()
    for which, one in enumerate(both):
        by_itself = alone(which)
        assert by_itself.growth.controller.total_rank > 0
        assert_same(one.came_to(), by_itself.came_to(), one.name)
    assert_same({name: value for name, value in model.state_dict().items() if "base_layer" in name}, base)


# Several processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks told of two adapters, and of wrappers that were made for another one."""
    out = tmp_path_factory.mktemp("ranks")
    launch(2, adapter_ranks.__file__, str(out))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("order", adapter_ranks.ORDERS)
@pytest.mark.parametrize("way", adapter_ranks.WAYS)
def test_two_processes_do_what_one_does(told: Path, way: str, order: str) -> None:
    first, second = (torch.load(told / f"{way}-{order}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second)
    alone = adapter_ranks.came_to(order)
    for name, one in alone.items():
        assert first[name]["events"] == one["events"]
        for matrix, update in one["updates"].items():
            torch.testing.assert_close(first[name]["updates"][matrix], update, rtol=1e-7, atol=1e-10)
        folder = told / f"{way}-{order}-{name}"
        verify_adapter(folder)
        assert {row.name: row.rank for row in rank_table(folder)} == one["ranks"]
        assert sum(one["ranks"].values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("way", adapter_ranks.WAYS)
def test_two_processes_resume_the_second_one_to_the_bit(told: Path, way: str) -> None:
    for rank in (0, 1):
        uninterrupted, resumed = torch.load(told / f"{way}-{rank}.pt", weights_only=False)
        assert uninterrupted["second"]["events"], "something happened after the stop"
        assert_same(resumed, uninterrupted)


# With heads, in the Trainer ------------------------------------------------------------------------------------------


def trained(model: Any, out: Path, name: str, resume: str | None = None, **training: Any) -> Any:
    model.set_adapter(name)
    trainer = trainer_for(model, out, AromaCallback(early_stop=False), **{"max_steps": 24, **training})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model whose two adapters were trained one after another, and the folder of the second training."""
    folder = tmp_path_factory.mktemp("two")
    model = adapted()
    trained(model, folder / "first", "default", save_strategy="no")
    model.add_adapter("other", AromaConfig(task_type="SEQ_CLS", **{**PAPER, "r": 2, "component_seed": 9}))
    before = {name: value.clone() for name, value in model.state_dict().items() if ".default." in name}
    trainer = trained(model, folder / "second", "other", save_steps=8, seed=3)
    assert growth(trainer).controller.adapter_name == "other"
    assert_same({name: value for name, value in model.state_dict().items() if ".default." in name}, before)
    return model, folder / "second"


def answers(model: Any, name: str, batch: Tensor) -> Tensor:
    model.eval().set_adapter(name)
    with torch.no_grad():
        found: Tensor = model(batch).logits
    return found


BATCH = torch.arange(1, 33).reshape(4, 8)


def test_the_trainer_grows_the_active_one_as_it_would_alone(two: tuple[Any, Path], tmp_path: Path) -> None:
    by_itself = adapted(r=2, component_seed=9)
    trained(by_itself, tmp_path, "default", save_strategy="no", seed=3)
    assert_same(answers(two[0], "other", BATCH), answers(by_itself, "default", BATCH))
    assert float((answers(two[0], "default", BATCH) - answers(two[0], "other", BATCH)).abs().max()) > 1e-3


def test_a_trainer_resumes_the_second_one_to_the_bit(two: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = two
    again = adapted()
    again.load_adapter(str(folder / "checkpoint-24"), "default", is_trainable=True)
    again.add_adapter("other", AromaConfig(task_type="SEQ_CLS", **{**PAPER, "r": 2, "component_seed": 9}))
    trained(again, tmp_path, "other", str(folder / "checkpoint-8"), save_strategy="no", seed=3)
    for name in ("default", "other"):
        assert_same(answers(again, name, BATCH), answers(model, name, BATCH), name)


def test_both_are_saved_as_plain_lora_and_plain_peft_mixes_them(two: tuple[Any, Path], tmp_path: Path) -> None:
    model = two[0]
    model.save_pretrained(tmp_path / "both")
    save_adapter(model, tmp_path / "one", "other")
    for folder in ("both", "both/other", "one"):
        assert verify_adapter(tmp_path / folder)
    plain = PeftModel.from_pretrained(tiny_bert(), tmp_path / "both")
    plain.load_adapter(str(tmp_path / "one"), "other")
    assert not aroma_layers(plain)
    for name in ("default", "other"):
        torch.testing.assert_close(answers(plain, name, BATCH), answers(model, name, BATCH), rtol=0, atol=1e-5)
    names = ["other", "default", "__base__", "other"]
    with pytest.raises(ConfigError, match=r"^adapter_names: a batch cannot mix growing adapters"):
        model.eval()(BATCH, adapter_names=names)
    assert len(plain.eval()(BATCH, adapter_names=names).logits) == 4


# What cannot be ------------------------------------------------------------------------------------------------------


def test_a_trainer_needs_one_active_adapter() -> None:
    model = plain_net()
    model.add_adapter("other", AromaConfig(target_modules=r"layers\.\d+"))
    assert trainable_adapter(model) == "default"
    model.set_adapter("other")
    assert trainable_adapter(model) == "other"
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match=r"adapter_name=\['default', 'other'\].*one adapter at a time"):
        trainable_adapter(model)
    model.set_adapter("other", inference_mode=True)
    model.peft_config["other"].inference_mode = True
    with pytest.raises(ConfigError, match=r"no trainable AROMA adapter that is active.*set_adapter"):
        trainable_adapter(model)


def test_an_adapter_that_rests_is_refused() -> None:
    model = adapted()
    model.add_adapter("other", AromaConfig(task_type="SEQ_CLS", **PAPER))
    optimizer = torch.optim.AdamW(trainable(model))
    with pytest.raises(ConfigError, match=r"needs no gradient.*set_adapter"):
        attach(model, optimizer, total_steps=20, adapter_name="other")


def test_a_deleted_one_leaves_the_other_growing() -> None:
    model = plain_net()
    model.add_adapter("other", AromaConfig(**UNLIKE), autocast_adapter_dtype=False)
    both = [Adapter(model, "default", 0.01, 0), Adapter(model, "other", 0.02, 1)]
    for step in range(STEPS):
        if step == 20:
            both[0].growth.detach()
            model.set_adapter("other")
            model.delete_adapter("default")
        for one in both[step >= 20 :]:
            one.step()
    assert_same(both[1].came_to(), alone(1).came_to())
