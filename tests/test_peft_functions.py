"""PEFT's public functions on a model that grows: each works, or is refused by name.

The table in docs/guide.md is this one. After a change `python tests/test_peft_functions.py` writes it.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from aroma import AromaConfig, aroma_layers
from aroma.tuner import live_adapter
from models import adapted, base, batch, logits, set_ranks

PAGE = Path(__file__).parent.parent / "docs" / "guide.md"
HEAD = "| function | on a growing model | |\n|---|---|---|\n"


def grown() -> Any:
    """A model with finished components and a moved pair."""
    model = adapted("bert")
    set_ranks(model, [2, 3], pair=True)
    live_adapter(model).ever_controlled = True
    return model.eval()


def same(model: Any, other: Any) -> bool:
    return torch.allclose(logits(model, batch("bert")), logits(other, batch("bert")), atol=1e-5)


@dataclass
class Row:
    """What becomes of a call with a growing model and the folder of its saved adapter."""

    call: Callable[[Any, Path], Any]
    works: str = ""
    """What it does, in words; the call returns whether that is so."""
    refused: str = ""
    """What its error says, an expression."""
    instead: str = ""
    """What to do."""


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


SAVED = "save the adapter, and use it in plain PEFT (`PeftModel.from_pretrained`)"
NOT_OURS = "no function of growing adapters"

ROWS: dict[str, Row] = {
    "get_peft_model": Row(
        lambda m, f: len(aroma_layers(get_peft_model(base("bert"), AromaConfig()))) > 10, "makes the model grow"
    ),
    "get_peft_model(mixed=True)": Row(
        lambda m, f: get_peft_model(base("bert"), AromaConfig(task_type="SEQ_CLS"), mixed=True),
        refused=r"`peft_type` 'AROMA' is not compatible with the `PeftMixedModel`",
        instead=SAVED,
    ),
    "inject_adapter_in_model": Row(_injected, "puts growing layers into a model"),
    "get_peft_config": Row(
        lambda m, f: isinstance(peft.get_peft_config({"peft_type": "AROMA"}), AromaConfig), "makes an `AromaConfig`"
    ),
    "get_peft_model_state_dict, set_peft_model_state_dict": Row(_restored, "the adapter as plain LoRA, and back"),
    "get_base_model_state_dict, set_base_model_state_dict": Row(_restored, "the base model alone, and back"),
    "load_peft_weights": Row(lambda m, f: len(peft.load_peft_weights(str(f))) > 10, "reads a saved adapter"),
    "PeftModel.from_pretrained": Row(
        lambda m, f: same(m, PeftModel.from_pretrained(base("bert"), f)), "loads a saved adapter as plain LoRA"
    ),
    "get_model_status, get_layer_status": Row(_status, "say type, adapters and devices"),
    "print_trainable_parameters, get_nb_trainable_parameters": Row(
        lambda m, f: m.get_nb_trainable_parameters()[0] > 0, "count what trains now"
    ),
    "convert_to_lora": Row(_converted, "one rank for all matrices, by SVD; `aroma export --uniform` loses nothing"),
    "save_as_lora": Row(_saved_as_lora, "the same, into a folder"),
    "merge_adapter, unmerge_adapter": Row(_merged_and_back, "into the base weights, and out of them"),
    "merge_and_unload": Row(lambda m, f: same(copy.deepcopy(m), m.merge_and_unload()), "the plain model, merged"),
    "unload": Row(lambda m, f: not aroma_layers(m.unload()), "the plain model, as it was"),
    "delete_adapter": Row(lambda m, f: m.delete_adapter("default") is None and not aroma_layers(m, "default"), "yes"),
    "disable_adapter": Row(_disabled, "the base model's outputs within the context"),
    "set_adapter, set_requires_grad": Row(
        lambda m, f: m.set_adapter("default") is None and m.set_requires_grad("default", False) is None, "yes"
    ),
    "peft.helpers.rescale_adapter_scale": Row(_scaled, "scales the update within the context"),
    "cast_mixed_precision_params": Row(
        lambda m, f: peft.cast_mixed_precision_params(m, torch.bfloat16) is None, "the base model in half precision"
    ),
    "prepare_model_for_kbit_training": Row(
        lambda m, f: peft.prepare_model_for_kbit_training(base("bert")) is not None, "before `get_peft_model`"
    ),
    "find_kappa_target_modules": Row(
        lambda m, f: bool(peft.find_kappa_target_modules(base("bert"), show_progress=False)["target_modules"]),
        "gives names for `target_modules`",
    ),
    "add_adapter, load_adapter of growing adapters": Row(
        lambda m, f: m.add_adapter("b", AromaConfig(task_type="SEQ_CLS")) is None and len(m.peft_config) == 2,
        "each grows when it is active; [several adapters](#several-adapters-over-one-model)",
    ),
    "add_adapter, load_adapter of plain LoRA beside it": Row(
        lambda m, f: m.add_adapter("b", LoraConfig(target_modules=["query"], task_type="SEQ_CLS")),
        refused="Cannot combine adapters with different peft types. Found PeftType.AROMA and PeftType.LORA",
        instead="load it into a model of its own",
    ),
    "add_weighted_adapter": Row(
        lambda m, f: m.add_weighted_adapter(["default"], [1.0], "new"),
        refused="^add_weighted_adapter: ",
        instead=SAVED,
    ),
    "forward(adapter_names=...), generate(adapter_names=...)": Row(
        lambda m, f: len(m.eval()(**batch("bert"), adapter_names=["default"] * 4).logits) == 4,
        refused="adapter_names",
        instead=SAVED,
    ),
    "peft.utils.hotswap.hotswap_adapter": Row(
        lambda m, f: hotswap_adapter(m, str(f), "default"), refused="AROMA", instead=SAVED
    ),
    "peft.utils.hotswap.prepare_model_for_compiled_hotswap": Row(
        lambda m, f: prepare_model_for_compiled_hotswap(m, target_rank=8) is None, "changes nothing"
    ),
    "initialize_lora_eva_weights": Row(
        lambda m, f: peft.initialize_lora_eva_weights(m, [batch("bert")]), refused="eva", instead=NOT_OURS
    ),
    "preprocess_loraga": Row(
        lambda m, f: peft.preprocess_loraga(base("bert"), AromaConfig(), lambda: None),
        refused="LoRA-GA",
        instead=NOT_OURS,
    ),
    "replace_lora_weights_loftq": Row(
        lambda m, f: peft.replace_lora_weights_loftq(m), refused="model_path", instead=NOT_OURS
    ),
}

BESIDE_THE_POINT = {
    "bloom_model_postprocess_past_key_value",
    "compose_cartridge_adapters",
    "create_arrow_model",
    "get_eva_state_dict",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "prompt_embeddings_from_past_key_values",
    "shift_tokens_right",
}
"""Functions of prompt learning, of EVA's own state, and of routing among saved adapters, not of growing models."""


def table() -> str:
    """The table as docs/guide.md has it."""
    lines = [
        f"| `{'`, `'.join(name.split(', '))}` | {'works' if row.works else 'refused'} | {row.works or row.instead} |\n"
        for name, row in ROWS.items()
    ]
    return HEAD + "".join(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    grown().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_it_works_or_is_refused_by_name(name: str, folder: Path, tmp_path: Path) -> None:
    row, place = ROWS[name], tmp_path / "adapter"
    place.symlink_to(folder)
    if row.works:
        assert row.call(grown(), place)
    else:
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=row.refused):
            row.call(grown(), place)


def test_every_public_function_of_peft_is_in_the_table() -> None:
    there = {name for name in dir(peft) if isinstance(getattr(peft, name), types.FunctionType)}
    told = {part for name in ROWS for part in name.replace("(", ", ").split(", ")}
    assert there - told == BESIDE_THE_POINT


def test_the_table_in_the_docs_is_this_one() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")


def test_the_type_reads_as_pefts_own(tmp_path: Path) -> None:
    kind = AromaConfig().peft_type
    assert (kind, kind.value, str(kind)) == ("AROMA", "AROMA", "PeftType.AROMA")
    assert json.dumps(kind) == '"AROMA"'
    for copied in (copy.deepcopy(kind), pickle.loads(pickle.dumps(kind))):
        assert (copied, copied.value) == ("AROMA", "AROMA")
    AromaConfig().save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "AROMA"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, after = text.partition(HEAD)
    rest = after.partition("\n\n")[2]
    sys.stdout.write(table())
    PAGE.write_text(before + table() + (f"\n{rest}" if rest else ""), encoding="utf-8")
