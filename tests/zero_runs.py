"""Runs in several processes under DeepSpeed's ZeRO, for torchrun: plain loops, checkpoints, refusals, and a Trainer.

    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 tests/zero_runs.py loops OUT

Every rank writes its results into files of its own in OUT.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from aroma import aroma_layers, attach, save_adapter
from distributed_runs import (
    OPTIMIZERS,
    TIMEOUT,
    UNLIKE_MODULES,
    Loop,
    base_of,
    batch_of,
    frozen_pairs_that_moved,
    rank,
    replicated,
    run_loop,
    share,
    stacked,
    tell_refusals,
    trained_in_the_trainer,
)
from trainer_runs import BEST, adapted, assert_same

# Of all that DeepSpeed could compile, a training on CPUs needs nothing: its own collectives for them serve inference.
# To find that out, each process would try a compiler for seconds.
deepspeed.ops.__compatible_ops__ = {}


def zero(stage: int, **changes: Any) -> dict[str, Any]:
    """A configuration of DeepSpeed; in `changes`, options of ZeRO begin with `zero_`."""
    own = {name.removeprefix("zero_"): value for name, value in changes.items() if name.startswith("zero_")}
    rest = {name: value for name, value in changes.items() if not name.startswith("zero_")}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        # The default of 2 GB of buckets takes longer to make than these models to train.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000, **own},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **rest,
    }


NOTHING_STAYS = {"zero_stage3_param_persistence_threshold": 0, "zero_stage3_prefetch_bucket_size": 0}
"""ZeRO-3 gives whole parameters back after every use, small ones too."""

PLAIN = Loop(double=False)
LOADED_SHARDED = "zero 3, loaded in shards, offloaded"

LOOPS: dict[str, tuple[Loop, dict[str, Any]]] = {
    "zero 1": (PLAIN, zero(1)),
    "zero 2": (PLAIN, zero(2)),
    "zero 3, nothing stays, transposed layers": (
        replace(PLAIN, transposed=True, method={"inner_criterion": "update_change", "r": 3}),
        zero(3, **NOTHING_STAYS),
    ),
    LOADED_SHARDED: (PLAIN, zero(3, zero_offload_optimizer={"device": "cpu"})),
    "zero 2, base in 16 bits": (replace(PLAIN, half=True, head=False), zero(2)),
    "zero 2, accumulation": (replace(PLAIN, accumulate=2), zero(2, gradient_accumulation_steps=2)),
    "zero 3, on after all have finished": (
        replace(PLAIN, early_stop=False, head=False, method={"max_components": 2}, steps=20),
        zero(3),
    ),
}


def loaded_sharded(base: Any, config: dict[str, Any], folder: Path) -> Any:
    """`base`, by way of a folder, as transformers loads it under ZeRO-3: no rank ever has the whole model."""
    if rank() == 0:
        base.save_pretrained(folder)
    dist.barrier()
    kept = HfDeepSpeedConfig(config)  # as long as it lives
    loaded = type(base).from_pretrained(folder)
    del kept
    assert all(hasattr(parameter, "ds_tensor") for parameter in loaded.parameters())
    return loaded


class Training:
    """One training under ZeRO that can stop and go on."""

    def __init__(
        self, loop: Loop, config: dict[str, Any], resume_from: Path | None = None, by_way_of: Path | None = None
    ) -> None:
        torch.manual_seed(100)
        self.loop = loop
        base = base_of(loop)
        base = loaded_sharded(base, config, by_way_of) if by_way_of else base
        self.model = adapted(base, **{**UNLIKE_MODULES, **loop.method})
        if not loop.head:
            self.model.base_model.classifier.requires_grad_(False)
        optimizer = OPTIMIZERS[loop.optimizer]([p for p in self.model.parameters() if p.requires_grad])
        self.engine = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)[0]
        if resume_from:
            self.engine.load_checkpoint(str(resume_from), tag="engine", load_module_strict=False)
        self.events: list[Any] = []
        self.growth = attach(
            self.engine,
            self.engine.optimizer,
            total_steps=loop.steps,
            resume_from=str(resume_from) if resume_from else None,
            on_event=self.events.append,
        )
        self.told = 0

    def go_on(self, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        """Take steps, and return the results."""
        self.engine.train()
        stopped = stop = self.loop.steps if stop is None else stop
        for step in range(start, stop):
            for part in range(self.loop.accumulate):
                rows = share(batch_of(step * self.loop.accumulate + part))
                self.engine.backward(self.engine(**stacked(rows)).loss)
                self.engine.step()
            if self.growth.finished and self.loop.early_stop:
                stopped = step + 1
                break
        return {
            "weights": whole_weights(self.model),
            "controller": self.growth.controller.state_dict(),
            "moments": self.moments(),
            "events": [{**event.as_dict(), "value": None} for event in self.new_events()],
            "stopped": stopped,
            "frozen pairs that moved": frozen_pairs_that_moved(self.model),
        }

    def new_events(self) -> list[Any]:
        """The events since this was asked last."""
        new, self.told = self.events[self.told :], len(self.events)
        return new

    def moments(self) -> dict[str, Tensor]:
        """The flat state of the base optimizer on this rank."""
        held = self.engine.optimizer.optimizer.state.values()
        return {f"{i}.{name}": t for i, s in enumerate(held) for name, t in s.items() if isinstance(t, Tensor)}


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the trained part, whole on all ranks."""
    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
    for name, layer in aroma_layers(model).items():
        weights[f"{name}.B"], weights[f"{name}.A"] = layer.components("default")
    return weights


OF_FOUR = ("zero 2", "zero 3, nothing stays, transposed layers")


def loops(out: Path, names: Iterable[str] = tuple(LOOPS)) -> None:
    replicas: list[tuple[Loop, dict[str, Any]]] = []
    for name in names:
        loop, config = LOOPS[name]
        by_way_of = out / "base" if name == LOADED_SHARDED else None
        torch.save(Training(loop, config, by_way_of=by_way_of).go_on(), out / f"loop-{name}-{rank()}.pt")
        if not (known := [came_to for other, came_to in replicas if other == loop]):
            known = [as_replicas(loop)]
            replicas.append((loop, known[0]))
        torch.save(known[0], out / f"ddp-{name}-{rank()}.pt")


def as_replicas(loop: Loop) -> dict[str, Any]:
    """The same under DistributedDataParallel."""
    kept = {}

    def wrap(model: Any, loop: Loop) -> Any:
        kept["model"] = model
        return replicated(model, loop)

    came_to = run_loop(loop, wrap)
    return {**came_to, "weights": whole_weights(kept["model"])}


# Checkpoints ---------------------------------------------------------------------------------------------------------

SAVED_AT, STEPS = 9, 20
"""In the middle of an inner loop, after merges."""
EXACT = replace(PLAIN, method={"inner_criterion": "update_change", "r": 2, "lora_alpha": 3}, steps=STEPS)
AUTOCAST = {"enabled": True, "dtype": "bfloat16"}
STAGES = {
    "2": zero(2),
    "3, nothing stays": zero(3, **NOTHING_STAYS),
    "3, autocast, nothing stays": zero(3, torch_autocast=AUTOCAST, **NOTHING_STAYS),
}


def checkpoints(out: Path, names: Iterable[str]) -> None:
    for name in names:
        config = STAGES[name]
        training = Training(EXACT, config)
        training.go_on(0, SAVED_AT)
        folder = out / f"adapter-{name}"
        training.engine.eval()
        with torch.no_grad():
            torch.save(training.engine(**stacked(batch_of(0))).logits, out / f"logits-{name}-{rank()}.pt")
        if config["zero_optimization"]["stage"] == 3 or rank() == 0:
            save_adapter(training.model, folder)
        training.engine.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)
        torch.save(training.go_on(SAVED_AT), out / f"uninterrupted-{name}-{rank()}.pt")
        training.growth.detach()
        resumed = Training(EXACT, config, resume_from=folder)
        torch.save(resumed.go_on(SAVED_AT), out / f"resumed-{name}-{rank()}.pt")


# Refusals ------------------------------------------------------------------------------------------------------------


def engine_of(config: dict[str, Any], **method: Any) -> Any:
    model = adapted(**method)
    base = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    return deepspeed.initialize(model=model, optimizer=base, config=config)[0]


def without_zero(_: Path) -> None:
    engine = engine_of(zero(0))
    attach(engine, engine.optimizer, total_steps=32)


def base_optimizer(_: Path) -> None:
    engine = engine_of(zero(2))
    attach(engine, engine.optimizer.optimizer, total_steps=32)


def reset_to_zero(_: Path) -> None:
    engine = engine_of(zero(2), reset="zero")
    attach(engine, engine.optimizer, total_steps=32)
    engine.backward(engine(**stacked(share(batch_of(0)))).loss)
    engine.step()


def in_16_bits(_: Path) -> None:
    engine = engine_of(zero(3, bf16={"enabled": True}))
    attach(engine, engine.optimizer, total_steps=32)


def other_tolerances(_: Path) -> None:
    engine = engine_of(zero(2), outer_tolerance=0.01 * (1 + rank()))
    attach(engine, engine.optimizer, total_steps=32)


REFUSALS = [without_zero, base_optimizer, reset_to_zero, in_16_bits, other_tolerances]


# The Trainer ---------------------------------------------------------------------------------------------------------


trained = partial(trained_in_the_trainer, whole_weights)


def train_replicas(out: Path) -> None:
    for name, changes in (("end", {}), ("best", BEST)):
        came_to = trained(out / f"replicas-{name}", 4, ddp_backend="gloo", ddp_timeout=60, **changes)
        torch.save(came_to, out / f"{name}-replicas-{rank()}.pt")


def train(out: Path) -> None:
    for stage in (2, 3):
        config = {
            **zero(stage, zero_stage3_gather_16bit_weights_on_model_save=True),
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        }
        torch.save(trained(out / str(stage), 4, deepspeed=config), out / f"end-{stage}-{rank()}.pt")
        again = trained(out / str(stage), 4, str(out / str(stage) / "checkpoint-8"), deepspeed=config)
        torch.save(again, out / f"again-{stage}-{rank()}.pt")
        torch.save(trained(out / f"best-{stage}", 4, deepspeed=config, **BEST), out / f"best-{stage}-{rank()}.pt")


# The page on several processes ---------------------------------------------------------------------------------------


def page(out: Path) -> None:
    """Run the blocks of `blocks.json`, in the folder: a training, a save, and how a new process goes on."""
    train, save, resume = json.loads((out / "blocks.json").read_text())
    os.chdir(out)
    Path("zero3.json").write_text(json.dumps(zero(3)))
    names: dict[str, Any] = {"deepspeed": deepspeed, "attach": attach, "save_adapter": save_adapter, "torch": torch}
    names |= {
        "folder": "adapter",
        "model": adapted(outer_tolerance=1e-9),
        "batches": [stacked(batch_of(step)) for step in range(4)],
    }
    exec(train, names)
    exec(save, names)
    at = names["growth"].controller.state_dict()
    names["growth"].detach()
    loop = "for batch in batches:"
    exec(train.partition(loop)[0], names := {**names, "model": adapted(outer_tolerance=1e-9)})
    names["growth"].detach()
    exec(resume, names)
    assert_same(names["growth"].controller.state_dict(), at)
    exec(loop + train.partition(loop)[2], names)
    assert names["growth"].controller.global_step == 8


PARTS: dict[str, Callable[[Path], None]] = {
    "page": page,
    "loops": loops,
    "loops of four": partial(loops, names=OF_FOUR),
    "checkpoints": partial(checkpoints, names=("2", "3, nothing stays", "3, autocast, nothing stays")),
    "refusals": partial(tell_refusals, refusals=REFUSALS),
    "train": train,
    "replicas": train_replicas,
}

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    deepspeed.init_distributed(timeout=TIMEOUT)
    where = Path(sys.argv[2])
    where.mkdir(parents=True, exist_ok=True)
    PARTS[sys.argv[1]](where)
    dist.barrier()
    dist.destroy_process_group()
