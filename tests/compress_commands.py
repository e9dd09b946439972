"""Tiny adapters for `aroma compress`, the command itself, and what it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from aroma.cli import main
from tiny_classifier import sentences

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
LAYERS = ["query", "value", "intermediate.dense"]
LETTERS = ["a", "b", "d", "f", "g", "h"]


def train(model: Any, batches: list[Any], steps: int, rate: float = 1e-2) -> Any:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    model.train()
    for step in range(steps):
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def classifier(base: Path, out: Path, labels: Callable[[Any], Any], steps: int = 60, **options: Any) -> Path:
    """An adapter as plain PEFT's user saves it, trained on sentences."""
    tokenizer, rows = AutoTokenizer.from_pretrained(base), sentences(256, seed=1)
    batches = []
    for start in range(0, len(rows), 32):
        some = rows[start : start + 32]
        batch = tokenizer([str(row["text"]) for row in some], padding=True, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor([labels(row) for row in some])})
    torch.manual_seed(2)
    head = {name: options.pop(name) for name in ("num_labels", "problem_type") if name in options}
    model = AutoModelForSequenceClassification.from_pretrained(base, **head)
    config = LoraConfig(**LORA, target_modules=LAYERS, task_type="SEQ_CLS", **options)
    train(get_peft_model(model, config), batches, steps).save_pretrained(out)
    return out


def number_of(row: Any) -> int:
    return int(row["label"] == "high")


def run(adapter: Path, out: Path, *options: str, data: Path | None = None) -> dict[str, Any]:
    of_data = [] if data is None else ["--data", str(data)]
    assert main(["compress", str(adapter), "--out", str(out), *of_data, *options]) == 0
    report: dict[str, Any] = json.loads((out / "compression.json").read_text())
    return report


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def ranks_of(adapter: Path) -> dict[str, int]:
    tensors = load_file(adapter / "adapter_model.safetensors").items()
    return {name.split(".lora_A")[0]: len(tensor) for name, tensor in tensors if "lora_A" in name}


def loaded(kind: Any, base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(kind.from_pretrained(base), adapter).eval()


@torch.no_grad()
def answers(model: Any, batches: list[Any]) -> torch.Tensor:
    inputs = [{name: values for name, values in batch.items() if name != "labels"} for batch in batches]
    return torch.cat([model(**some).logits.double().log_softmax(-1) for some in inputs])
