"""Several growing adapters over one frozen model: each grows as it would alone, and rows of a batch choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from aroma import AromaCallback, AromaConfig, aroma_layers, attach, save_adapter, verify_adapter
from aroma.errors import ConfigError
from aroma.integrations.callback import trainable_adapter
from small_nets import STEPS, Net, loss_of, rows, trainable
from trainer_runs import METHOD as PAPER
from trainer_runs import adapted, assert_same, growth, tiny_bert, trainer_for

METHOD: dict[str, Any] = {
    **{"inner_check_interval": 2, "inner_tolerance": 0.8, "max_inner_steps": 8, "component_seed": 5},
    "target_modules": r"layers\.\d+",
}
UNLIKE = {**METHOD, "component_seed": 11}
"""That of the second adapter."""


class Adapter:
    """A training of one adapter of a net, step by step."""

    def __init__(self, model: Any, name: str, rate: float, share: int) -> None:
        model.set_adapter(name)
        self.model, self.name, self.events = model, name, []
        dtype = next(model.parameters()).dtype
        self.x, self.y = (part.to(dtype) for part in rows(8 * STEPS, seed=20 + share))
        self.optimizer = torch.optim.AdamW(trainable(model), lr=rate)
        self.growth = attach(model, self.optimizer, total_steps=STEPS, adapter_name=name, on_event=self.events.append)
        self.done = 0

    def step(self) -> None:
        self.model.set_adapter(self.name)
        first = 8 * self.done
        self.optimizer.zero_grad()
        loss_of(self.model, (self.x[first : first + 8], self.y[first : first + 8])).backward()
        self.optimizer.step()
        self.done += 1

    def came_to(self) -> dict[str, Any]:
        layers = aroma_layers(self.model, self.name)
        return {
            "components": [layer.components(self.name) for layer in layers.values()],
            "optimizer": self.optimizer.state_dict(),
            "controller": self.growth.controller.state_dict(),
            "events": [event.as_dict() for event in self.events],
            "summary": self.growth.controller.summary(),
        }


def plain_net(method: dict[str, Any] = METHOD) -> Any:
    return get_peft_model(Net(), AromaConfig(**method), autocast_adapter_dtype=False)


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


def test_both_are_saved_as_plain_lora(two: tuple[Any, Path], tmp_path: Path) -> None:
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


# What cannot be ------------------------------------------------------------------------------------------------------


def test_a_trainer_needs_one_active_adapter() -> None:
    model = plain_net()
    model.add_adapter("other", AromaConfig(target_modules=r"layers\.\d+"))
    assert trainable_adapter(model) == "default"
    model.set_adapter("other")
    assert trainable_adapter(model) == "other"
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match=r"several AROMA adapters train, \['default', 'other'\].*one adapter active"):
        trainable_adapter(model)
    model.set_adapter("other", inference_mode=True)
    model.peft_config["other"].inference_mode = True
    with pytest.raises(ConfigError, match=r"no trainable AROMA adapter that is active.*set_adapter"):
        trainable_adapter(model)
