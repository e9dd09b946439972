"""Checkups find the ranks of a net whose right answer is known: a frozen base, and a teacher with small updates."""

from __future__ import annotations

import math

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from aroma import Checkups

WIDTH, STEPS, TRAINED = 64, 1500, 1350
PLANTED = [2, 0, 0, 0, 8, 4, 4, 8, 1, 0, 1, 2]


class Net(nn.Module):
    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in weights)
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight.data.copy_(weight)

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = h + 0.5 * torch.tanh(layer(h))
        return h


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def test_planted_ranks_are_found() -> None:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(len(PLANTED), WIDTH, WIDTH, generator=draw) / math.sqrt(WIDTH)
    teacher = base.clone()
    for weight, rank in zip(teacher, PLANTED, strict=True):
        U, V = (torch.linalg.qr(torch.randn(WIDTH, max(rank, 1), generator=draw))[0][:, :rank] for _ in "UV")
        weight += U @ V.T
    X, fresh = (torch.randn(count, WIDTH, generator=draw) for count in (1500, 2000))
    with torch.no_grad():
        right, start = Net(teacher)(fresh), Net(base)(fresh)
        Y = Net(teacher)(X) + 0.1 * torch.randn(1500, WIDTH, generator=draw)

    torch.manual_seed(0)
    model = get_peft_model(Net(base), LoraConfig(r=16, lora_alpha=32, target_modules=r"layers\.\d+"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, (t + 1) / 90) * max(0.0, 1 - t / STEPS))
    held_out = [(X[rows], Y[rows]) for rows in torch.arange(TRAINED, 1500).split(4)]
    checkups = Checkups(model, optimizer, STEPS, held_out, loss=squares, cost=0.25)
    for _ in range(STEPS):
        optimizer.zero_grad()
        rows = torch.randint(0, TRAINED, (16,), generator=draw)
        squares(model, (X[rows], Y[rows])).backward()
        optimizer.step()
        schedule.step()
        checkups.step()

    found = [rank for (rank,) in checkups.history[-1].ranks.values()]
    with torch.no_grad():
        explained = 1 - (model(fresh) - right).square().mean() / (start - right).square().mean()
    assert explained > 0.988, "what plain LoRA r = 8 explains"
    assert torch.corrcoef(torch.tensor([found, PLANTED], dtype=torch.float))[0, 1] > 0.9
    assert sum(found) <= 4 * len(found)
