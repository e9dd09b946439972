"""Checkups find the ranks of a net whose right answer is known: in a loop, a Trainer, two processes, after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import planted_run
import ranks
from aroma import Checkups
from planted_run import BATCH, PLANTED, STEPS, TRAINED, Task


def assert_found(found: list[int], explained: float) -> None:
    assert explained > 0.988, "what plain LoRA r = 8 explains"
    assert torch.corrcoef(torch.tensor([found, PLANTED], dtype=torch.float))[0, 1] > 0.9
    assert sum(found) <= 4 * len(found)


def test_planted_ranks_are_found() -> None:
    task, draw = Task(), torch.Generator().manual_seed(0)
    model, X, Y = task.model, task.x, task.labels
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, (t + 1) / 90) * max(0.0, 1 - t / STEPS))
    held_out = [{"x": X[rows], "labels": Y[rows]} for rows in torch.arange(TRAINED, 1500).split(4)]
    checkups = Checkups(model, optimizer, STEPS, held_out, cost=0.25)
    for _ in range(STEPS):
        optimizer.zero_grad()
        rows = torch.randint(0, TRAINED, (BATCH,), generator=draw)
        model(X[rows], Y[rows])["loss"].backward()
        optimizer.step()
        schedule.step()
        checkups.step()
    assert_found([rank for (rank,) in checkups.history[-1].ranks.values()], task.explained())


@pytest.mark.slow
def test_two_processes_of_a_trainer_that_was_killed_find_what_one_finds(tmp_path: Path) -> None:
    alone = planted_run.train(tmp_path / "alone")
    assert_found(alone["ranks"], alone["explained"])
    ranks.launch(2, planted_run.__file__, str(tmp_path), "720", fails=True)
    assert (tmp_path / "run" / "checkpoint-500").exists()
    ranks.launch(2, planted_run.__file__, str(tmp_path), "0")
    ends: list[Any] = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert ends[0] == ends[1]
    assert ends[0]["ranks"] == alone["ranks"]
    assert ends[0]["explained"] == pytest.approx(alone["explained"], abs=1e-3)
