"""The README's lines, and a loop, run as they stand, with what `pip install aroma-peft` brings and nothing more.

`.ci/lowest` runs this file where only the wheel and its lowest dependencies are installed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import aroma
from aroma import AromaConfig
from trainer_runs import examples, tiny_bert

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
(TRAINER,) = BLOCKS


def run(block: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_lines_for_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = examples(160)
    model = get_peft_model(
        tiny_bert(), LoraConfig(r=16, lora_alpha=16, task_type="SEQ_CLS", target_modules="all-linear")
    )
    names = run(
        TRAINER,
        {
            "Trainer": Trainer,
            "model": model,
            "collate": None,
            "train": data,
            "test": data[:8],
            "accuracy": None,
            "args": TrainingArguments(
                "out/checkpoints",
                max_steps=60,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
        },
    )
    names["trainer"].train()
    model.save_pretrained("out/adapter")
    model.eval()
    batch = {key: torch.stack([row[key] for row in data[:8]]) for key in data[0]}
    with torch.no_grad():
        expected, start = model(**batch).logits, tiny_bert().eval()(**batch).logits
        found = PeftModel.from_pretrained(tiny_bert(), "out/adapter").eval()(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert float((start - expected).abs().max()) > 1e-3, "nothing was learnt"
    assert names["compress"].compression.size.effect >= 0.998


def test_a_loop() -> None:
    data = examples(120)
    model = get_peft_model(tiny_bert(), AromaConfig(task_type="SEQ_CLS", max_inner_steps=10))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    with aroma.attach(model, optimizer, total_steps=30) as growth:
        for at in range(0, 120, 4):
            model(**{key: torch.stack([row[key] for row in data[at : at + 4]]) for key in data[0]}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert growth.controller.total_rank > 0
