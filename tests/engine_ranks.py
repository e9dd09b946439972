"""A Llama that grows under FSDP2 and gives its tensors after every step, for torchrun.

torchrun --standalone --nproc-per-node 2 tests/engine_ranks.py OUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from aroma import attach, lora_tensors
from models import ARCHITECTURES, adapted, batch, trainable

STEPS, RANK = 10, 4


def given_after_every_step() -> list[dict[str, Tensor]]:
    """Train in one process or in all; return the tensors after every step."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES["llama"]  # not from a folder: of several ranks only one would write it
    model = adapted("llama", architecture.model_class(architecture.config()), max_components=RANK)
    if dist.is_initialized():
        for block in model.base_model.model.model.layers:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    growth = attach(model, optimizer, total_steps=STEPS)
    given = []
    model.train()
    for _ in range(STEPS):
        model(**batch("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        given.append(lora_tensors(model, RANK).tensors)
    growth.detach()
    return given


def main(out: str) -> None:
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    torch.save(given_after_every_step(), Path(out) / f"given-{os.environ.get('RANK', '0')}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
