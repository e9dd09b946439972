"""It cannot be used wrong in silence: each way that looks right and is not is refused or said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model

from aroma import AromaConfig, aroma_layers, attach, save_adapter
from aroma.errors import AromaWarning, ConfigError
from models import ARCHITECTURES, adapted, base, batch, ranks, train, trainable

TASKS = {
    "sequences": ("SEQ_CLS", "SequenceClassification", "classifier"),
    "tokens": ("TOKEN_CLS", "TokenClassification", "classifier"),
    "spans": ("QUESTION_ANS", "QuestionAnswering", "qa_outputs"),
}


def bert_for(ending: str) -> Any:
    """Return a tiny BERT with the head that the end of its class's name says, of few labels."""
    return getattr(transformers, f"BertFor{ending}")(ARCHITECTURES["bert"].config())


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=0.01)


def test_two_attachments_are_refused_before_they_freeze_each_other() -> None:
    model = adapted("bert")
    optimizer = optimizer_of(model)
    attach(model, optimizer, total_steps=20)
    attach(model, optimizer, total_steps=20)
    with pytest.raises(ConfigError, match=r"another controller was attached.*call attach\(\) once"):
        train(model, batch("bert"), optimizer, 1)


def test_a_model_without_the_adapter_is_not_saved(tmp_path: Path) -> None:
    for model, name in ((base("bert"), "default"), (adapted("bert"), "other")):
        with pytest.raises(ConfigError, match=rf"^adapter_name='{name}': .* has no AROMA adapter of that name; make"):
            save_adapter(model, tmp_path / "adapter", name)
    assert not (tmp_path / "adapter").exists()


def test_a_training_without_a_controller_is_told_after_its_first_step(tmp_path: Path) -> None:
    """Once; a training that grows, or has not stepped yet, is told nothing."""
    forgotten, grown = adapted("bert"), adapted("bert")
    optimizer = optimizer_of(forgotten)
    train(forgotten, batch("bert"), optimizer, 1)
    with pytest.warns(AromaWarning, match="trained without its controller") as told:
        train(forgotten, batch("bert"), optimizer, 5)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", AromaWarning)
        train(forgotten, batch("bert"), optimizer, 2)
        attach(grown, optimizer := optimizer_of(grown), total_steps=40)
        train(grown, batch("bert"), optimizer, 3)
        save_adapter(grown, tmp_path / "adapter")
        loaded = adapted("bert")
        loaded(**batch("bert")).loss.backward()
        loaded.load_adapter(str(tmp_path / "adapter"), "default", is_trainable=True)
        loaded(**batch("bert")).loss.backward()


@pytest.mark.parametrize(("task", "ending", "head"), [*TASKS.values()], ids=[*TASKS])
def test_the_head_of_a_task_trains_whole(task: str, ending: str, head: str) -> None:
    model = get_peft_model(bert_for(ending), AromaConfig(task_type=task))
    assert not [name for name in aroma_layers(model) if head in name]
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad and head in name]


def test_a_loaded_adapter_at_its_maximum_grows_no_further(tmp_path: Path) -> None:
    model = adapted("bert", max_components=3)
    growth = attach(model, optimizer_of(model), total_steps=40)
    train(model, batch("bert"), growth.controller.optimizer, 40)
    save_adapter(model, tmp_path)
    loaded = adapted("bert", max_components=2)
    loaded.load_adapter(str(tmp_path), "default", is_trainable=True)
    before = ranks(loaded)
    again = attach(loaded, optimizer_of(loaded), total_steps=40)
    assert {module.name for module in again.controller.modules if module.is_frozen} == {
        name for name, rank in before.items() if rank >= 2
    }
    assert max(before.values()) == 3
