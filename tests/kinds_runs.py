"""Convolutions and embeddings in several processes, for torchrun: under DistributedDataParallel, and under FSDP2.

    torchrun --standalone --nproc-per-node 2 tests/kinds_runs.py OUT

Rank 0 writes the updates that every run ends with into OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from aroma import aroma_layers, attach, save_adapter
from test_kinds import METHOD, QUICK, Net, grown

STEPS, EXAMPLES = 36, 6
WAYS = ("ddp", "fsdp2")


def updates(way: str, out: Path, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
    """Train on this rank's share of every batch, save, and return the update of every layer."""
    model: Any = grown(Net([*QUICK]), **METHOD)
    if processes > 1:
        model = DistributedDataParallel(model) if way == "ddp" else fully_shard(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    attach(model, optimizer, total_steps=60)
    own = EXAMPLES // processes
    for step in range(STEPS):
        start = EXAMPLES * (step % 4) + own * rank
        optimizer.zero_grad()
        model(slice(start, start + own)).backward()
        optimizer.step()
    save_adapter(model.module if way == "ddp" and processes > 1 else model, out / f"{way}-{processes}")
    return {name: layer.get_delta_weight("default").detach() for name, layer in aroma_layers(model).items()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for way in WAYS:
        found = updates(way, Path(sys.argv[1]), dist.get_rank(), dist.get_world_size())
        if dist.get_rank() == 0:
            torch.save(found, Path(sys.argv[1]) / f"{way}.pt")
    dist.destroy_process_group()
