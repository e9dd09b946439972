"""A net whose right answer is known, a frozen base and a teacher with small updates, in a Trainer; also a script.

    torchrun --standalone --nproc-per-node 2 tests/planted_run.py OUT KILL

writes what each process comes to into OUT; step KILL ends the run by SIGKILL, and a later run goes on.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from aroma import EvidenceCallback

WIDTH, STEPS, TRAINED, BATCH = 64, 1500, 1350, 16
PLANTED = [2, 0, 0, 0, 8, 4, 4, 8, 1, 0, 1, 2]


class Net(nn.Module):
    """Residual layers of tanh, with the mean squared error as its loss."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in weights)
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight.data.copy_(weight)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + 0.5 * torch.tanh(layer(x))
        return {"logits": x} if labels is None else {"loss": (x - labels).square().mean(), "logits": x}


class Task:
    """Examples `x` with noisy `labels` of shape (1500, WIDTH), and fresh inputs with the teacher's own answers."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        base = torch.randn(len(PLANTED), WIDTH, WIDTH, generator=draw) / math.sqrt(WIDTH)
        teacher = base.clone()
        for weight, rank in zip(teacher, PLANTED, strict=True):
            U, V = (torch.linalg.qr(torch.randn(WIDTH, max(rank, 1), generator=draw))[0][:, :rank] for _ in "UV")
            weight += U @ V.T
        self.x, self.fresh = (torch.randn(count, WIDTH, generator=draw) for count in (1500, 2000))
        with torch.no_grad():
            self.right, self.start = (Net(weights)(self.fresh)["logits"] for weights in (teacher, base))
            self.labels = Net(teacher)(self.x)["logits"] + 0.1 * torch.randn(1500, WIDTH, generator=draw)
        torch.manual_seed(0)
        self.model: Any = get_peft_model(Net(base), LoraConfig(r=16, lora_alpha=32, target_modules=r"layers\.\d+"))

    @torch.no_grad()
    def explained(self) -> float:
        """Share of the teacher's effect on fresh inputs that the model has."""
        errors = [(output - self.right).square().mean() for output in (self.model(self.fresh)["logits"], self.start)]
        return 1 - float(errors[0] / errors[1])


class Die(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(out: Path, kill: int = 0) -> dict[str, Any]:
    """Train, or go on from the last checkpoint; return the ranks of every matrix, and what is explained."""
    task = Task()
    rows = [{"x": x, "labels": y} for x, y in zip(task.x, task.labels, strict=True)]
    evidence = EvidenceCallback(rows[TRAINED:])
    arguments = TrainingArguments(
        str(out),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=1e-2,
        warmup_steps=90,
        save_steps=500,
        logging_steps=500,
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Trainer(task.model, arguments, train_dataset=rows[:TRAINED], callbacks=[evidence, Die(kill)])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.exists() else None)
    ranks = [rank for (rank,) in evidence.history[-1].ranks.values()]
    return {"ranks": ranks, "explained": task.explained()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    torch.save(train(folder / "run", int(sys.argv[2])), folder / f"{os.environ['RANK']}.pt")
