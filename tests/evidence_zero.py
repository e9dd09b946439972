"""Growth by evidence under DeepSpeed's ZeRO, for `ranks`: plain loops, and checkpoints.

    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 tests/evidence_zero.py loops OUT

Every rank writes what each loop came to into a file of its own in OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from aroma import save_adapter
from distributed_runs import TIMEOUT
from evidence_ranks import ZERO_OF_FOUR, ZERO_SAVED, ZERO_SAVED_AT, ended, updates
from evidence_runs import Loop, held_out, long, loss_of
from zero_runs import NOTHING_STAYS, zero

STAGES: dict[str, dict[str, Any]] = {
    "zero 1": zero(1),
    "zero 2": zero(2),
    "zero 3": zero(3),
    "zero 3, nothing stays": zero(3, **NOTHING_STAYS),
    "zero 2, offloaded": zero(2, zero_offload_optimizer={"device": "cpu"}),
    "zero 3, offloaded": zero(3, zero_offload_optimizer={"device": "cpu"}),
}


class ZeroLoop(Loop):
    """A loop whose model is an engine."""

    def __init__(self, config: dict[str, Any], resume_from: Path | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.engine = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=config)[0]
        if resume_from:
            self.engine.load_checkpoint(str(resume_from), tag="engine", load_module_strict=False)
        self.wrapped, self.optimizer = self.engine, self.engine.optimizer

    def go_on(self, until: int | None = None) -> ZeroLoop:
        if not hasattr(self, "growth"):
            self.attach()
        self.engine.train()
        for step in range(self.done, self.steps if until is None else until):
            self.engine.backward(loss_of(self.engine, self.batch(step)))
            self.engine.step()
            self.done = step + 1
        return self


def options() -> dict[str, Any]:
    # Of 249 steps nothing is squeezed at the end.
    return {**long(), "steps": 252, "steps_per_pass": 34, "growth_batches": held_out()}


def loops(out: Path, names: Iterable[str] = tuple(STAGES)) -> None:
    for name in names:
        loop = ZeroLoop(STAGES[name], **options()).go_on()
        torch.save(ended(loop), out / f"{name}-{dist.get_rank()}.pt")
        torch.save(shortened(loop), out / f"shortened-{name}-{dist.get_rank()}.pt")
    replicas = Loop(wrap=DistributedDataParallel, **options()).go_on()
    torch.save(ended(replicas), out / f"replicas-{dist.get_rank()}.pt")


def shortened(loop: ZeroLoop) -> dict[str, dict[str, Tensor]]:
    """Half of all updates, and what a step at a rate of 0 leaves, which overwrites parameters with ZeRO's copies."""
    controller = loop.growth.controller
    merged = {matrix.name: torch.mm(*matrix.finished) for matrix in controller.modules}
    controller.matrices.shorten(0.5)
    half = updates(loop.model)
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0
    return {"merged": merged, "half": half, "after a step": updates(loop.go_on(loop.done + 1).model)}


def checkpoints(out: Path) -> None:
    for name in ZERO_SAVED:
        for step in ZERO_SAVED_AT:
            loop = ZeroLoop(STAGES[name], **options()).go_on(step)
            folder = out / f"saved-{name}-{step}"
            if "3" in name or dist.get_rank() == 0:
                save_adapter(loop.model, folder)
            loop.engine.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)
            torch.save(ended(loop.go_on()), out / f"uninterrupted-{name}-{step}-{dist.get_rank()}.pt")
            again = ZeroLoop(STAGES[name], folder, **options())
            again.attach(resume_from=str(folder))
            again.done = step
            torch.save(ended(again.go_on()), out / f"resumed-{name}-{step}-{dist.get_rank()}.pt")


PARTS: dict[str, Callable[[Path], None]] = {
    "loops": loops,
    "loops of four": partial(loops, names=ZERO_OF_FOUR),
    "checkpoints": checkpoints,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    deepspeed.init_distributed(timeout=TIMEOUT)
    *parts, where = sys.argv[1:]
    Path(where).mkdir(parents=True, exist_ok=True)
    for part in parts:
        PARTS[part](Path(where))
    dist.barrier()
    dist.destroy_process_group()
