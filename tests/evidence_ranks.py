"""Growth by evidence in several processes, for torchrun: plain loops under DistributedDataParallel and FSDP2.

    torchrun --standalone --nproc-per-node 2 tests/evidence_ranks.py all OUT

Every rank writes what each loop came to into a file of its own in OUT.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from aroma import aroma_layers, save_adapter
from distributed_runs import CALM, TIMEOUT, main, tell_refusals, whole, without_sync
from evidence_runs import (
    LONG,
    Loop,
    Net,
    Rows,
    bert,
    bert_trainer,
    births,
    by_heart,
    growth_dataset,
    held_out,
    loss_of,
    net,
)
from trainer_runs import assert_same, growth, tiny_bert

PRECISE = torch.float64


def double(**changes: Any) -> Any:
    """The net in float64, where rounding is no excuse."""
    return net(Net().double(), **changes)


def in_parts(model: Any, batch: Rows, parts: int = 2) -> None:
    """Micro-batches, all but the last without synchronisation."""
    x, y = batch
    for part in range(parts):
        with without_sync(model) if part < parts - 1 else nullcontext():
            (loss_of(model, (x[part::parts], y[part::parts])) / parts).backward()


def momentum(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adafactor(parameters: Any) -> Any:
    return torch.optim.Adafactor(parameters, lr=0.1)


LOOPS: dict[str, Callable[[], dict[str, Any]]] = {
    "as it comes": lambda: {"model": double()},
    "micro-batches": lambda: {"model": double(), "backward": in_parts},
    "held out": lambda: {
        "model": double(trial_share=1 / 30),
        **{"steps": 2 * LONG, "steps_per_pass": 3, "growth_batches": held_out(20, dtype=PRECISE)},
    },
    "held out, learnt by heart": lambda: by_heart(PRECISE),
    "one slot, merged again and again": lambda: {"model": double(slots=1)},
    "momentum": lambda: {"model": double(), "optimizer": momentum},
    "bounded": lambda: {"model": double(max_components=4)},
}
"""What one process and several do alike."""


def replicated(model: Any) -> Any:
    return DistributedDataParallel(model) if dist.is_initialized() else model


def static(model: Any) -> Any:
    return DistributedDataParallel(model, static_graph=True) if dist.is_initialized() else model


def sharded(model: Any) -> Any:
    """Each layer by itself, and the rest as the root."""
    if not dist.is_initialized():
        return model
    for layer in model.base_model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


WRAPS = {"ddp": replicated, "fsdp2": sharded}
MORE: dict[str, tuple[Callable[[Any], Any], Callable[[], dict[str, Any]]]] = {
    "ddp, adafactor": (replicated, lambda: {"model": double(), "optimizer": adafactor}),
    "ddp, static graph": (static, lambda: {"model": double()}),
}
"""Loops of one way to distribute."""


def runs() -> dict[str, tuple[Callable[[Any], Any], Callable[[], dict[str, Any]]]]:
    """Every loop in every way, by name."""
    both = {f"{way}, {name}": (wrap, options) for way, wrap in WRAPS.items() for name, options in LOOPS.items()}
    return {**both, **MORE}


def ended(loop: Loop) -> dict[str, Any]:
    """What a loop came to, whole on all ranks."""
    controller = loop.growth.controller
    return {
        "events": births(loop.events),
        "rule": controller.rule.state(),
        "noted": [(matrix.born, matrix.heads, matrix.flips) for matrix in controller.modules],
        "ranks": [(summary.name, summary.rank) for summary in controller.summary()],
        "weights": updates(loop.model),
        "controller": controller.state_dict(),
    }


def updates(model: Any) -> dict[str, Tensor]:
    """B A + s b a of every matrix."""
    found = {}
    for name, layer in aroma_layers(model).items():
        B, A = layer.components("default")
        found[name] = B.detach() @ A.detach()
    return found


# On after a run ------------------------------------------------------------------------------------------------------


def detached() -> dict[str, Any]:
    """Training goes on after the controller was taken away: while no slot was in use, and after the trial."""
    found: dict[str, Any] = {}
    for step in (4, 30):
        loop = Loop(double(), wrap=replicated).go_on(step)
        loop.growth.detach()
        before = updates(loop.model)
        loop.go_on(step + 4)
        found |= {f"before {step}": before, f"after {step}": updates(loop.model)}
    return found


def unequal() -> dict[str, Any]:
    """One rank has a held-out batch more than the other, and fewer than there are questions."""
    batches = held_out(dtype=PRECISE)[: 9 + dist.get_rank()]
    loop = Loop(double(), wrap=replicated, steps=240, steps_per_pass=3, growth_batches=batches).go_on(30)
    return {"asked": loop.growth.controller.rule.state()["asked"], "weights": updates(loop.model)}


# Checkpoints ---------------------------------------------------------------------------------------------------------

SAVED_AT, ZERO_SAVED_AT = (5, 37), (5, 29)
"""Before there are components, and in the midst of growth."""


def resumed(out: Path, way: str) -> dict[str, dict[str, Any]]:
    """Save trainings of several processes, and resume them; the weights are loaded before they are sharded."""
    came_to, wrap = {}, WRAPS[way]
    for step in SAVED_AT:
        loop = Loop(double(), wrap=wrap).go_on(step)
        folder = out / f"saved-{way}-{step}"
        if way == "fsdp2" or dist.get_rank() == 0:
            save_adapter(loop.model, folder)
        optimizer = get_optimizer_state_dict(loop.model, loop.optimizer)
        # Without the slots that the next steps change in place.
        optimizer = copied(optimizer)
        came_to[f"uninterrupted-{way}-{step}"] = ended(loop.go_on())
        model = double()
        model.load_adapter(str(folder), "default", is_trainable=True)
        again = Loop(model, wrap=wrap)
        set_optimizer_state_dict(again.model, again.optimizer, optimizer)
        again.attach(resume_from=str(folder))
        again.done = step
        came_to[f"resumed-{way}-{step}"] = ended(again.go_on())
    return came_to


def copied(value: Any) -> Any:
    """Return a value whose tensors share nothing with the given one's."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value


# The Trainer ---------------------------------------------------------------------------------------------------------


TRAINER_SAVED_AT = 30
BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": TRAINER_SAVED_AT,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": False,
}
"""Arguments with which a run ends with its first checkpoint, whose loss is lower than that of the last."""


def trained(out: Path, resume: str | None = None, dtype: torch.dtype = PRECISE, **several: Any) -> dict[str, Any]:
    """What a Trainer comes to whose batches and held-out batches are shared by `several` processes."""
    events: list[Any] = []
    trainer = bert_trainer(
        out,
        events,
        bert(tiny_bert(**CALM).to(dtype), lora_alpha=3),
        {"growth_dataset": growth_dataset()},
        save_steps=TRAINER_SAVED_AT,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        **several,
    )
    trainer.train(resume_from_checkpoint=resume)
    controller = growth(trainer).controller
    return {
        "events": births(events),
        "noted": [(matrix.born, matrix.heads, matrix.flips) for matrix in controller.modules],
        "weights": updates(controller.matrices.model),
        "wrapped": type(trainer.model_wrapped).__name__,
        "best": Path(trainer.state.best_model_checkpoint or "").name,
    }


def trained_and_resumed(out: Path, **training: Any) -> dict[str, dict[str, Any]]:
    """What a Trainer comes to without a stop, resumed, and where it goes back to its best checkpoint."""
    checkpoint = str(out / f"checkpoint-{TRAINER_SAVED_AT}")
    return {
        "evidence": trained(out, **training),
        "evidence-again": trained(out, checkpoint, **training),
        "evidence-best": trained(out / "best", **training, **BEST),
    }


def assert_same_growth(ends: Sequence[dict[str, Any]], other: dict[str, Any]) -> None:
    """Assert that all ranks came to the same, and decided as another Trainer, births after its checkpoint included."""
    assert_same(ends[0], ends[1])
    assert any(kind == "born" and step > TRAINER_SAVED_AT for step, _, kind in other["events"])
    assert (ends[0]["events"], ends[0]["noted"]) == (other["events"], other["noted"])


def assert_went_back(ends: Sequence[dict[str, Any]], other: dict[str, Any]) -> None:
    """Assert that all ranks ended with the first checkpoint, as another Trainer, though more was born later."""
    assert_same_growth(ends, other)
    assert ends[0]["best"] == other["best"] == f"checkpoint-{TRAINER_SAVED_AT}"


def assert_resumed(end: dict[str, Any], again: dict[str, Any]) -> None:
    """Assert that a Trainer that was resumed came to what one came to without a stop."""
    later = [event for event in end["events"] if event[0] > TRAINER_SAVED_AT]
    assert (again["events"], again["noted"]) == (later, end["noted"])
    assert_same(again["weights"], end["weights"])


# Refusals ------------------------------------------------------------------------------------------------------------


def other_held_out(_: Path) -> None:
    """One rank has too few held-out batches."""
    Loop(
        double(), wrap=replicated, steps_per_pass=3, growth_batches=held_out()[: 40 if dist.get_rank() else 0]
    ).go_on()


def broken_held_out(_: Path) -> None:
    """The loss of one rank is not finite."""
    batches = held_out(dtype=PRECISE, overflowing=range(40) if dist.get_rank() else ())
    Loop(double(), wrap=replicated, steps_per_pass=3, growth_batches=batches).go_on()


REFUSALS = [other_held_out, broken_held_out]


ZERO_OF_FOUR = ("zero 2", "zero 3, nothing stays")
ZERO_SAVED = ("zero 1", *ZERO_OF_FOUR)
OF_FOUR = ("ddp, as it comes", "fsdp2, as it comes", "fsdp2, held out")


def loops(out: Path, names: Iterable[str] = tuple(runs())) -> None:
    for name in names:
        wrap, options = runs()[name]
        torch.save(whole(ended(Loop(wrap=wrap, **options()).go_on())), out / f"{name}-{dist.get_rank()}.pt")


def everything(out: Path) -> None:
    loops(out)
    torch.save(detached(), out / f"detached-{dist.get_rank()}.pt")
    torch.save(unequal(), out / f"unequal-{dist.get_rank()}.pt")
    for way in WRAPS:
        for name, came_to in resumed(out, way).items():
            torch.save(came_to, out / f"{name}-{dist.get_rank()}.pt")
    came_to = trained(out / "trainer", ddp_backend="gloo", ddp_timeout=60)
    torch.save(came_to, out / f"trained-{dist.get_rank()}.pt")
    tell_refusals(out, REFUSALS)


PARTS: dict[str, Callable[[Path], None]] = {"all": everything, "loops of four": partial(loops, names=OF_FOUR)}

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=TIMEOUT)
    main(PARTS, *sys.argv[1:])
