"""PEFT's public functions on a model that grows: each works, or is refused by name."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from aroma import AromaConfig, aroma_layers
from aroma.tuner import live_adapter
from models import adapted, base, batch, logits, set_ranks


def grown() -> Any:
    """A model with finished components and a moved pair."""
    model = adapted("bert")
    set_ranks(model, [2, 3], pair=True)
    live_adapter(model).ever_controlled = True
    return model.eval()


def same(model: Any, other: Any) -> bool:
    return torch.allclose(logits(model, batch("bert")), logits(other, batch("bert")), atol=1e-5)


def _restored(model: Any, folder: Path) -> bool:
    other = grown()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    peft.set_base_model_state_dict(other, peft.get_base_model_state_dict(model))
    peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model))
    return same(model, other)


def _merged_and_back(model: Any, folder: Path) -> bool:
    before = logits(model, batch("bert"))
    model.merge_adapter()
    model.unmerge_adapter()
    return torch.allclose(logits(model, batch("bert")), before, atol=1e-5)


def _disabled(model: Any, folder: Path) -> bool:
    with model.disable_adapter():
        off = logits(model, batch("bert"))
    return not torch.allclose(off, logits(model, batch("bert")), atol=1e-3)


def _status(model: Any, folder: Path) -> bool:
    status = peft.get_model_status(model)
    return status.peft_types == {"default": "AROMA"} and status.num_adapter_layers > 10


def _converted(model: Any, folder: Path) -> bool:
    config, tensors = peft.convert_to_lora(model, rank=4)
    return config.r == 4 and sum("lora_A" in name for name in tensors) == len(aroma_layers(model))


def _saved_as_lora(model: Any, folder: Path) -> bool:
    peft.save_as_lora(folder.parent / "lora", model, rank=8)
    return same(model, PeftModel.from_pretrained(base("bert"), folder.parent / "lora"))


def _injected(model: Any, folder: Path) -> bool:
    return len(aroma_layers(peft.inject_adapter_in_model(AromaConfig(), base("bert")))) > 10


def _scaled(model: Any, folder: Path) -> bool:
    from peft.helpers import rescale_adapter_scale

    before = logits(model, batch("bert"))
    with rescale_adapter_scale(model, 0.5):
        pass
    return torch.allclose(logits(model, batch("bert")), before, atol=1e-6)


WORKS: dict[str, Callable[[Any, Path], Any]] = {
    "get_peft_model": lambda m, f: len(aroma_layers(get_peft_model(base("bert"), AromaConfig()))) > 10,
    "inject_adapter_in_model": _injected,
    "get_peft_config": lambda m, f: isinstance(peft.get_peft_config({"peft_type": "AROMA"}), AromaConfig),
    "state dicts of base and adapter": _restored,
    "load_peft_weights": lambda m, f: len(peft.load_peft_weights(str(f))) > 10,
    "PeftModel.from_pretrained": lambda m, f: same(m, PeftModel.from_pretrained(base("bert"), f)),
    "get_model_status": _status,
    "get_nb_trainable_parameters": lambda m, f: m.get_nb_trainable_parameters()[0] > 0,
    "convert_to_lora": _converted,
    "save_as_lora": _saved_as_lora,
    "merge_adapter, unmerge_adapter": _merged_and_back,
    "merge_and_unload": lambda m, f: same(copy.deepcopy(m), m.merge_and_unload()),
    "unload": lambda m, f: not aroma_layers(m.unload()),
    "delete_adapter": lambda m, f: m.delete_adapter("default") is None and not aroma_layers(m, "default"),
    "disable_adapter": _disabled,
    "set_requires_grad": lambda m, f: m.set_requires_grad("default", False) is None,
    "rescale_adapter_scale": _scaled,
    "cast_mixed_precision_params": lambda m, f: peft.cast_mixed_precision_params(m, torch.bfloat16) is None,
    "add_adapter": lambda m, f: m.add_adapter("b", AromaConfig(task_type="SEQ_CLS")) is None,
}
"""The call returns whether it did what it should, with a growing model and the folder of its saved adapter."""

REFUSED: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "mixed": (lambda m, f: get_peft_model(base("bert"), AromaConfig(), mixed=True), "'AROMA' is not compatible"),
    "LoRA beside": (
        lambda m, f: m.add_adapter("b", LoraConfig(target_modules=["query"], task_type="SEQ_CLS")),
        "Cannot combine adapters with different peft types",
    ),
    "add_weighted_adapter": (
        lambda m, f: m.add_weighted_adapter(["default"], [1.0], "new"),
        "^add_weighted_adapter: ",
    ),
    "adapter_names": (lambda m, f: m.eval()(**batch("bert"), adapter_names=["default"] * 4), "adapter_names"),
    "hotswap_adapter": (lambda m, f: hotswap_adapter(m, str(f), "default"), "AROMA"),
    "EVA": (lambda m, f: peft.initialize_lora_eva_weights(m, [batch("bert")]), "eva"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    grown().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", WORKS)
def test_it_works(name: str, folder: Path) -> None:
    assert WORKS[name](grown(), folder)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str, folder: Path) -> None:
    call, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=words):
        call(grown(), folder)


def test_the_type_reads_as_pefts_own(tmp_path: Path) -> None:
    kind = AromaConfig().peft_type
    assert (kind, kind.value, str(kind)) == ("AROMA", "AROMA", "PeftType.AROMA")
    assert json.dumps(kind) == '"AROMA"'
    for copied in (copy.deepcopy(kind), pickle.loads(pickle.dumps(kind))):
        assert (copied, copied.value) == ("AROMA", "AROMA")
    AromaConfig().save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "AROMA"
