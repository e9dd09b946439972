"""Runs in several processes under FSDP2, for torchrun: plain loops, checkpoints, refusals, and a Trainer.

    torchrun --standalone --nproc-per-node 2 tests/sharded_runs.py loops OUT

Every rank writes what it came to into files of its own in OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from distributed_runs import TIMEOUT, Loop, rank, run_loop

# Ways to shard -------------------------------------------------------------------------------------------------------


def by_block(model: Any, _: Any = None) -> Any:
    """Each block of the encoder by itself, and the rest as the root."""
    for block in model.base_model.model.bert.encoder.layer:
        fully_shard(block)
    return as_one(model)


def as_one(model: Any, _: Any = None) -> Any:
    """Everything in the root."""
    fully_shard(model)
    # What DDP calls so, for the loops that accumulate.
    model.no_sync = lambda: _without_sync(model)
    return model


@contextmanager
def _without_sync(model: Any) -> Any:
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


LOOPS: dict[str, tuple[Loop, Callable[[Any, Loop], Any]]] = {
    "blocks": (Loop(), by_block),
    "root alone": (Loop(), as_one),
    "momentum": (Loop("sgd", method={"outer_tolerance": 0.008}), by_block),
    "accumulation": (Loop(accumulate=2), by_block),
    "three rows": (Loop(method={"inner_criterion": "update_change", "reset": "zero", "r": 3}), by_block),
    "other random numbers": (
        Loop(unlike=True, double=False, method={"component_seed": None, "lora_dropout": 0.1, "r": 2}),
        by_block,
    ),
    "on after all have finished": (
        Loop(early_stop=False, head=False, method={"max_components": 2}, steps=20),
        by_block,
    ),
}


def loops(out: Path) -> None:
    for number, (loop, wrap) in enumerate(LOOPS.values()):
        torch.save(run_loop(loop, wrap), out / f"loop-{number}-{rank()}.pt")


def main(what: str, out: str, *rest: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    {"loops": loops}[what](Path(out), *rest)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
