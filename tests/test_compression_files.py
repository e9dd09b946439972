"""Adapters that are compressed without examples and without their base model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import aroma
from aroma.compression.files import compress_saved
from aroma.errors import AromaError, OutputError
from random_lora import KINDS, adapted, answers, batches, zoo

# Without examples, from files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "experts"])
@pytest.mark.parametrize("options", [{"size": 0.4}, {"rank": 2}])
def test_files_are_cut_as_a_model_is(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(KINDS[kind])
    model.save_pretrained(tmp_path / "whole")
    in_memory = aroma.compress(model, None, **options)
    from_files = compress_saved(tmp_path / "whole", tmp_path / "small", **options)
    assert dataclasses.replace(from_files, left_alone=in_memory.left_alone) == in_memory
    assert set(from_files.left_alone) == set(in_memory.left_alone)
    after = PeftModel.from_pretrained(zoo(), tmp_path / "small").double().eval()
    for batch in batches():
        torch.testing.assert_close(answers(after, batch).logits, answers(model, batch).logits)


def test_by_size_is_the_threshold_of_para_and_rank_the_truncation_of_squeeze() -> None:
    model = adapted({"target_modules": ["linear", "gpt"]})
    layers = [
        model.base_model.model.linear,
        model.base_model.model.gpt,
        *(b.linear for b in model.base_model.model.layers),
    ]
    deltas = {id(layer): layer.get_delta_weight("default") for layer in layers}
    sigma = torch.cat([torch.linalg.svdvals(delta)[:4] for delta in deltas.values()]).sort(descending=True).values
    found = aroma.compress(model, None, size=0.5)
    threshold = sigma[found.size.directions - 1]
    for layer in layers:
        if "default" in layer.lora_A:
            U, S, Vh = torch.linalg.svd(deltas[id(layer)])
            expected = U * torch.where(threshold - 1e-12 <= S, S, 0) @ Vh
            torch.testing.assert_close(layer.get_delta_weight("default"), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"target_parameters": ["experts.up"]}, "target_parameters="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": 3}, "rank 4, and 3 in adapter_config.json"),
    ],
)
def test_files_that_cannot_be_cut_are_refused_and_nothing_is_written(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    import json

    adapted(KINDS["linear"]).save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(AromaError, match=message):
        compress_saved(tmp_path / "whole", tmp_path / "small", size=0.5)
    assert not (tmp_path / "small").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        compress_saved(tmp_path / "whole", tmp_path / "full", size=0.5)
