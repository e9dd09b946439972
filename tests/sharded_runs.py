"""Runs in several processes under FSDP2, for torchrun: plain loops, checkpoints, refusals, and a Trainer.

    torchrun --standalone --nproc-per-node 2 tests/sharded_runs.py loops OUT

Every rank writes its results into files of its own in OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import distributed_runs
from aroma import attach, save_adapter
from distributed_runs import (
    CALM,
    TIMEOUT,
    UNLIKE_MODULES,
    Loop,
    adamw,
    batch_of,
    grow,
    main,
    rank,
    run_loop,
    size,
    stacked,
    take_step,
    tell_refusals,
    trained_in_the_trainer,
    whole,
)
from trainer_runs import BEST, adapted, tiny_bert

# Ways to shard -------------------------------------------------------------------------------------------------------


def by_block(model: Any, _: Any = None) -> Any:
    """Each block of the encoder by itself, and the rest as the root."""
    for block in model.base_model.model.bert.encoder.layer:
        fully_shard(block)
    return as_one(model)


def as_one(model: Any, _: Any = None) -> Any:
    """Everything in the root."""
    fully_shard(model)
    return model


Kind = tuple[Loop, Callable[[Any, Loop], Any]]

LOOPS: dict[str, Kind] = {
    "blocks": (Loop(), by_block),
    "root alone": (Loop(accumulate=2), as_one),
    "transposed layers": (Loop(transposed=True), by_block),
    "three rows": (Loop(method={"inner_criterion": "update_change", "reset": "zero", "r": 3}), by_block),
    "on after all have finished": (
        Loop(early_stop=False, head=False, method={"max_components": 2}, steps=20),
        by_block,
    ),
}
MORE_LOOPS: dict[str, Kind] = {
    "momentum": (Loop("sgd", method={"outer_tolerance": 0.008}), by_block),
    "other random numbers": (
        Loop(unlike=True, double=False, method={"component_seed": None, "lora_dropout": 0.1, "r": 2}),
        by_block,
    ),
}


OF_FOUR = {name: LOOPS[name] for name in ("root alone", "three rows")}
"""Both ways to shard. Of three rows one of four processes holds none."""


def run_loops(out: Path, loops: dict[str, Kind] = LOOPS) -> None:
    for name, (loop, wrap) in loops.items():
        torch.save(run_loop(loop, wrap), out / f"loop-{name}-{rank()}.pt")


# Checkpoints ---------------------------------------------------------------------------------------------------------

SAVED_AT, STEPS = 9, 20
"""In the middle of an inner loop, after merges."""
EXACT = Loop(method={"inner_criterion": "update_change", "r": 2, "lora_alpha": 3})


class Training:
    """One training of EXACT that can stop and go on."""

    def __init__(self, resume_from: Path | None = None, loads_late: bool = False) -> None:
        model = adapted(tiny_bert(**CALM).double(), **{**UNLIKE_MODULES, **EXACT.method})
        if resume_from and not loads_late:
            load_adapter(model, resume_from)
        self.model: Any = by_block(model) if size() > 1 else model
        if resume_from and loads_late:
            load_adapter(self.model, resume_from)
        self.optimizer = adamw(self.model)
        self.events: list[dict[str, Any]] = []
        if resume_from and not loads_late:
            load_optimizer(self.model, self.optimizer, resume_from / "sharded")
        self.growth = attach(
            self.model,
            self.optimizer,
            total_steps=STEPS,
            resume_from=str(resume_from) if resume_from else None,
            on_event=lambda event: self.events.append(event.as_dict()),
        )
        if resume_from and loads_late:
            load_optimizer(self.model, self.optimizer, resume_from / "sharded")

    def go_on(self, start: int, stop: int) -> dict[str, Any]:
        """Take steps, and return the results."""
        self.model.train()
        for step in range(start, stop):
            take_step(self.model, self.optimizer, EXACT, step)
        return {
            "weights": whole(self.model.state_dict()),
            "optimizer": whole(get_optimizer_state_dict(self.model, self.optimizer)["state"]),
            "events": [event for event in self.events if event["step"] > SAVED_AT],
            "controller": self.growth.controller.state_dict(),
        }

    def logits(self) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            answer: Tensor = self.model(**stacked(batch_of(0))).logits
        return answer


def load_adapter(model: Any, folder: Path) -> None:
    model.load_adapter(str(folder), "default", is_trainable=True)


def load_optimizer(model: Any, optimizer: Any, folder: Path) -> None:
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.load(state, checkpoint_id=str(folder))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def save(out: Path) -> None:
    """Write checkpoints of a training in every way, and go on."""
    training = Training()
    training.go_on(0, SAVED_AT)
    model = training.model
    # The root's parameters stay gathered after an evaluation.
    torch.save(training.logits(), out / f"logits-{rank()}.pt")
    save_adapter(model, out / "adapter")
    model.save_pretrained(out / "by-peft", is_main_process=rank() == 0)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank() == 0:
        torch.save(full, out / "full.pt")
        model.save_pretrained(out / "from-full", state_dict=full)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, training.optimizer),
    }
    checkpoint.save(state, checkpoint_id=str(out / "adapter" / "sharded"))
    torch.save(training.go_on(SAVED_AT, STEPS), out / f"uninterrupted-{rank()}.pt")


def resume(out: Path, name: str = "resumed", loads_late: bool = False) -> None:
    training = Training(out / "adapter", loads_late=loads_late)
    torch.save(training.go_on(SAVED_AT, STEPS), out / f"{name}-{rank()}.pt")


def checkpoints(out: Path) -> None:
    save(out)
    resume(out)
    resume(out, "resumed-late", loads_late=True)


# Refusals ------------------------------------------------------------------------------------------------------------


def without_root(_: Path) -> None:
    model = adapted()
    for block in model.base_model.model.bert.encoder.layer:
        fully_shard(block)
    grow(model)


def optimizer_too_early(_: Path) -> None:
    model = adapted()
    optimizer = adamw(model)
    grow(as_one(model), optimizer)


def other_tolerances(out: Path) -> None:
    distributed_runs.other_tolerances(out, as_one)


def sharded_on_one(_: Path) -> None:
    model = as_one(adapted())
    grow(model if rank() == 0 else adapted())


def broken_component(out: Path) -> None:
    distributed_runs.broken_component(out, as_one)


def merged(_: Path) -> None:
    as_one(adapted()).merge_adapter()


REFUSALS = [
    without_root,
    optimizer_too_early,
    other_tolerances,
    sharded_on_one,
    broken_component,
    merged,
]


# The Trainer ---------------------------------------------------------------------------------------------------------

FSDP2 = {
    "fsdp_version": 2,
    "version": 2,
    "reshard_after_forward": True,
    "cpu_ram_efficient_loading": False,
    "state_dict_type": "FULL_STATE_DICT",
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["BertLayer"],
}


trained = partial(trained_in_the_trainer, lambda model: whole(model.state_dict()))


def train(out: Path) -> None:
    make_accelerate_shard_on_cpu()
    several = {"ddp_backend": "gloo", "ddp_timeout": 60, "fsdp": True, "fsdp_config": FSDP2}
    torch.save(trained(out, 4, **several), out / f"end-{rank()}.pt")
    torch.save(trained(out, 4, str(out / "checkpoint-8"), **several), out / f"again-{rank()}.pt")
    torch.save(trained(out / "best", 4, **several, **BEST), out / f"best-{rank()}.pt")


def make_accelerate_shard_on_cpu() -> None:
    """accelerate uses FSDP where its processes are of GPUs, and else DDP without a word."""
    made = PartialState.__init__

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = make


def tell_all(out: Path) -> None:
    """Everything in one process group: starting one takes longer than most of it."""
    run_loops(out)
    checkpoints(out)
    tell_refusals(out, REFUSALS)


if __name__ == "__main__":
    if sys.argv[1] != "train":  # the Trainer makes its own
        dist.init_process_group("gloo", timeout=TIMEOUT)
    parts = {
        "loops": run_loops,
        "more loops": partial(run_loops, loops=MORE_LOOPS),
        "loops of four": partial(run_loops, loops=OF_FOUR),
        "all": tell_all,
        "resume": resume,
        "train": train,
    }
    main(parts, *sys.argv[1:])
