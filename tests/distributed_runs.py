"""Runs in several processes, for torchrun: plain loops, refusals, and a Trainer.

    torchrun --standalone --nproc-per-node 2 tests/distributed_runs.py all OUT
    torchrun --standalone --nproc-per-node 2 tests/distributed_runs.py train OUT '{"steps": 24}' [--resume]

Every rank writes its results into files of its own in OUT.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

import aroma.checkpoint
import trainer_runs
from aroma import AromaCallback, aroma_layers, attach, last_complete_checkpoint
from aroma.checkpoint import whole_checkpoint
from aroma.distributed import refuse_together
from aroma.errors import CheckpointError
from aroma.files import tensors_digest
from aroma.sharding import own_entries
from trainer_runs import Run, adapted, examples, growth, live, tiny_bert, trainer_for

TIMEOUT = timedelta(seconds=60)
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""A model without random numbers, so that one process and several can do the same."""
UNLIKE_MODULES = {"max_components": 3, "outer_tolerance": 0.15}
"""A method with which modules freeze at three different outer steps, and all have within 24 steps."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# Plain loops ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """One training in a plain loop; the same global batches whatever the number of processes."""

    optimizer: str = "adamw"
    ddp: dict[str, Any] = field(default_factory=dict)
    """Arguments of DistributedDataParallel."""
    method: dict[str, Any] = field(default_factory=dict)
    steps: int = 24
    accumulate: int = 1
    """Batches in a step; under DDP all but the last without synchronisation."""
    forwards: int = 1
    """Calls of the model before a backward."""
    unlike: bool = False
    """The ranks have other random numbers, and drop other activations out."""
    double: bool = True
    """In float64, where rounding is no excuse."""
    half: bool = False
    """Base model in bfloat16, components in float32."""
    transposed: bool = False
    """The layers are GPT-2's, which keep (n, m)."""
    early_stop: bool = True
    head: bool = True
    accelerate: bool = False
    """Wrapped by accelerate, the optimizer too."""


LOOPS = {
    "all parameters used": Loop(),
    "static graph, momentum": Loop(
        "sgd", ddp={"static_graph": True, "gradient_as_bucket_view": True}, method={"outer_tolerance": 0.008}
    ),
    "adafactor": Loop("adafactor", method={"outer_tolerance": 0.01}),
    "accelerate": Loop(accelerate=True),
    "two forwards": Loop(forwards=2, method={"inner_criterion": "update_change", "reset": "zero", "r": 2}),
    "other random numbers": Loop(unlike=True, double=False, method={"component_seed": None, "lora_dropout": 0.1}),
    "on after all have finished": Loop(early_stop=False, head=False, method={"max_components": 2}, steps=20),
}

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.3, weight_decay=0.003),
}


def replicated(model: Any, loop: Loop) -> Any:
    """`model` in DistributedDataParallel, if there are other processes."""
    return DistributedDataParallel(model, **loop.ddp) if size() > 1 else model


def run_loop(loop: Loop, wrap: Callable[[Any, Loop], Any] = replicated) -> dict[str, Any]:
    """Train, and return the rank's results; see the keys. `wrap` makes the model one of several processes."""
    base = base_of(loop)
    torch.manual_seed(100 + rank() * loop.unlike)
    model: Any = adapted(base, **{**UNLIKE_MODULES, **loop.method})
    if not loop.head:
        model.base_model.classifier.requires_grad_(False)
    wrapped = model if loop.accelerate else wrap(model, loop)
    optimizer = OPTIMIZERS[loop.optimizer]([p for p in model.parameters() if p.requires_grad])
    if loop.accelerate:
        wrapped, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    events: list[Any] = []
    with CountCollectives() as counted:
        start = attach(wrapped, optimizer, total_steps=loop.steps, on_event=events.append)
        at_start = counted.number
        wrapped.train()
        stopped = loop.steps
        for step in range(loop.steps):
            take_step(wrapped, optimizer, loop, step)
            if start.finished and loop.early_stop:
                stopped = step + 1
                break
    hidden = [name for name in getattr(wrapped, "named_module_buffers", ()) if "lora_finished" in name]
    inner = {event.step for event in events if event.kind == "checked"}
    outer = {event.step for event in events if event.kind in ("merged", "frozen")}
    return {
        "weights": whole(model.state_dict()),
        "optimizer": whole(optimizer.state_dict()["state"]),
        "digest": tensors_digest(whole(model.state_dict())),
        "events": [{**event.as_dict(), "value": None} for event in events],
        "values": [event.value for event in events if event.value is not None],
        "stopped": stopped,
        "finished": start.finished,
        "seed": start.controller.live.seed,
        "collectives": [at_start, counted.number - at_start],
        "checks": len(inner) + len(outer),
        "buffers that DDP sends": hidden,
        "frozen pairs that moved": frozen_pairs_that_moved(model),
    }


def frozen_pairs_that_moved(model: nn.Module) -> list[str]:
    return [
        name
        for name, layer in aroma_layers(model).items()
        if layer.is_frozen("default") and any(bool(p.any()) for p in layer.whole_pair("default"))
    ]


def base_of(loop: Loop) -> Any:
    """The pretrained model of a training."""
    base: Any = tiny_bert(**({} if loop.unlike else CALM))
    if loop.transposed:
        for layer in [*base.bert.encoder.modules()]:
            for name, child in layer.named_children():
                if isinstance(child, nn.Linear):
                    setattr(layer, name, transposed(child))
    return base.double() if loop.double else base.bfloat16() if loop.half else base


def transposed(linear: nn.Linear) -> Conv1D:
    """The same layer as GPT-2 keeps it."""
    layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight.data, layer.bias.data = linear.weight.data.T.contiguous(), linear.bias.data
    return layer


def take_step(model: Any, optimizer: Any, loop: Loop, step: int) -> None:
    if loop.unlike:
        torch.rand(rank() + 1)
    for part in range(loop.accumulate):
        rows = share(batch_of(step * loop.accumulate + part))
        last = part == loop.accumulate - 1
        with nullcontext() if last else without_sync(model):
            losses = [model(**stacked(rows[i :: loop.forwards])).loss for i in range(loop.forwards)]
            (sum(losses) / loop.forwards / loop.accumulate).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def without_sync(model: Any) -> Iterator[None]:
    """Keep the gradients of the backwards within to each rank, as those of all micro-batches but the last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        with getattr(model, "no_sync", nullcontext)():
            yield


def whole(value: Any) -> Any:
    """A state dict with its sharded tensors whole, on all ranks."""
    if isinstance(value, dict):
        return {name: whole(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(whole(item) for item in value)
    return value.full_tensor() if isinstance(value, DTensor) else value


def batch_of(number: int, count: int = 8) -> list[dict[str, Tensor]]:
    rows = examples()
    return [rows[i % len(rows)] for i in range(number * count, (number + 1) * count)]


def share(rows: list[Any]) -> list[Any]:
    """The rank's part of a global batch."""
    return rows[rank() :: size()]


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class CountCollectives:
    """Counts the collectives that are called from Python: DDP's own are not."""

    def __enter__(self) -> CountCollectives:
        self.number = 0
        self._kept = {
            name: getattr(dist, name) for name in ("all_reduce", "all_gather_object", "broadcast_object_list")
        }
        for name, call in self._kept.items():
            setattr(dist, name, partial(self._count, call))
        return self

    def _count(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        self.number += 1
        return call(*args, **kwargs)

    def __exit__(self, *_: Any) -> None:
        for name, call in self._kept.items():
            setattr(dist, name, call)


# Refusals ------------------------------------------------------------------------------------------------------------


def adamw(model: nn.Module) -> Any:
    return OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])


def step_on(model: Any, optimizer: Any, steps: int) -> None:
    model.train()
    for step in range(steps):
        take_step(model, optimizer, Loop(), step)


def grow(model: Any, optimizer: Any = None, total_steps: int = 32, **options: Any) -> Any:
    return attach(model, optimizer or adamw(model), total_steps=total_steps, **options)


def other_tolerances(_: Path, wrap: Callable[[Any], Any] = DistributedDataParallel) -> None:
    grow(wrap(adapted(outer_tolerance=0.01 * (1 + rank()))))


def not_wrapped(_: Path) -> None:
    model = adapted()
    optimizer = adamw(model)
    grow(model, optimizer)
    step_on(model, optimizer, 2)


def broken_component(_: Path, wrap: Callable[[Any], Any] = DistributedDataParallel) -> None:
    model = adapted()
    wrapped = wrap(model)
    optimizer = adamw(wrapped)
    controller = grow(wrapped, optimizer).controller
    step_on(wrapped, optimizer, 1)
    if rank() == 1:
        own_entries(next(iter(aroma_layers(model).values())).pair("default")[0])[0] = torch.nan
    # Not a step: its gradients would carry NaN to the other rank.
    controller.outer_step()


def broken_checkpoint(out: Path) -> None:
    model = adapted()
    wrapped = DistributedDataParallel(model)
    optimizer = adamw(model)
    folder = out / f"adapter-{rank()}"
    with grow(wrapped, optimizer):
        model.save_pretrained(folder)
    if rank() == 1:
        (folder / "aroma_state.json").unlink()
    grow(wrapped, optimizer, resume_from=str(folder))


def missing_adapter(_: Path) -> None:
    grow(DistributedDataParallel(adapted()), adapter_name=("default", "other")[rank()])


def unforeseen(_: Path) -> None:
    """An error that AROMA does not raise itself, on one rank."""
    with refuse_together():
        if rank() == 1:
            os.fspath(3)


REFUSALS = [
    other_tolerances,
    not_wrapped,
    broken_component,
    broken_checkpoint,
    missing_adapter,
    unforeseen,
]


def refusal(refuse: Callable[[Path], None], out: Path) -> list[str]:
    """Kind and message of the error that is raised."""
    try:
        refuse(out)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def assert_refused(out: Path, name: str, kind: str, words: str) -> None:
    """What two ranks told of a refusal in `out` is an error of that kind, which says `words`."""
    for told in (0, 1):
        found, message = json.loads((out / f"refused-{told}.json").read_text())[name]
        assert found == kind, message
        assert words in message
        assert len(message) < 600


def tell_refusals(out: Path, refusals: Iterable[Callable[[Path], None]]) -> None:
    """Write what every refusal said."""
    refused = {refuse.__name__: refusal(refuse, out) for refuse in refusals}
    (out / f"refused-{rank()}.json").write_text(json.dumps(refused))


def tell_resumed(out: Path) -> None:
    """Write which checkpoint `resume_from_checkpoint=True` takes, and how many this rank has read to find it."""
    read: list[Any] = []
    own = aroma.checkpoint.verify_checkpoint
    aroma.checkpoint.verify_checkpoint = lambda folder: read.append(folder) or own(folder)
    for name in ("trainer", "nothing"):
        arguments = SimpleNamespace(output_dir=out / name, local_process_index=rank())
        try:
            found = whole_checkpoint(True, arguments)
        except CheckpointError as error:
            found = str(error)
        (out / f"resumed-{name}-{rank()}.json").write_text(json.dumps([found, len(read)]))
    aroma.checkpoint.verify_checkpoint = own


def tell_all(out: Path, run_json: str) -> None:
    """All loops and refusals, and a Trainer, in one process group: starting one takes longer than they do."""
    dist.init_process_group("gloo", timeout=TIMEOUT)
    for number, loop in enumerate(LOOPS.values()):
        torch.save(run_loop(loop), out / f"loop-{number}-{rank()}.pt")
    train_and_tell(out / "trainer", run_json)
    tell_refusals(out, REFUSALS)
    tell_resumed(out)


# The Trainer ---------------------------------------------------------------------------------------------------------


def trained_in_the_trainer(
    weights_of: Callable[[Any], dict[str, Tensor]], out: Path, batch: int, resume: str | None = None, **training: Any
) -> dict[str, Any]:
    """Train a sharded model, or a replica, and return its results; `weights_of` gathers the weights."""
    events: list[dict[str, Any]] = []
    trainer = trainer_for(
        adapted(tiny_bert(**CALM), **UNLIKE_MODULES),
        out,
        AromaCallback(on_event=lambda event: events.append({**event.as_dict(), "value": None})),
        **{"max_steps": 24, "save_steps": 8, "per_device_train_batch_size": batch, **training},
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "events": events,
        "weights": weights_of(trainer.model),
        "stopped": trainer.state.global_step,
        "wrapped": type(trainer.model_wrapped).__name__,
        "best": Path(trainer.state.best_model_checkpoint or "").name,
        "modules": [[module.name, module.rank, module.is_frozen] for module in growth(trainer).controller.modules],
    }


@dataclass
class ManyRun(Run):
    """A Run of several processes."""

    calm: bool = False
    """Without dropout."""
    unlike: bool = True
    """Let the ranks use other numbers of the global generator."""


class UseRandomNumbers(TrainerCallback):
    def on_step_begin(self, *_: Any, **__: Any) -> None:
        torch.rand(rank() + 1)


def train(out: Path, run: ManyRun, resume: str | None = None, callbacks: tuple[TrainerCallback, ...] = ()) -> Any:
    """Do `run` in `out`, with further `callbacks`; every rank keeps its own events."""
    mine = rank_of_launch()
    several = {"ddp_backend": "gloo", "ddp_timeout": 60} if "RANK" in os.environ else {}
    return trainer_runs.train(
        out,
        run,
        resume,
        (*([UseRandomNumbers()] if run.unlike else []), *callbacks),
        tiny_bert(**CALM) if run.calm else None,
        f"events-{mine}.jsonl",
        **several,
    )


def rank_of_launch() -> int:
    """The rank, before the Trainer makes the process group too."""
    return int(os.environ.get("RANK", "0"))


def end_of(trainer: Any) -> dict[str, Any]:
    """What a rank came to, as plain as `torch.load` with weights_only takes it."""
    ended = live(trainer)
    return {
        "weights": ended["weights"],
        "optimizer": ended["optimizer"],
        "controller": ended["controller"],
        "digest": tensors_digest(ended["weights"]),
        "summary": [asdict(summary) for summary in ended["summary"]],
        "stopped": trainer.state.global_step,
        "wrapped": type(trainer.model_wrapped).__name__,
        "frozen": sum(module.is_frozen for module in growth(trainer).controller.modules),
    }


def train_and_tell(out: Path, run_json: str, *flags: str) -> None:
    run = ManyRun(**json.loads(run_json))
    resume = last_complete_checkpoint(out) if "--resume" in flags else None
    trainer = train(out, run, resume)
    torch.save(end_of(trainer), out / f"end-{rank_of_launch()}.pt")


def main(parts: Mapping[str, Callable[..., None]], what: str, out: str, *rest: str) -> None:
    """Do the part `what` of a script."""
    torch.set_num_threads(1)
    Path(out).mkdir(parents=True, exist_ok=True)
    parts[what](Path(out), *rest)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main({"all": tell_all, "train": train_and_tell}, *sys.argv[1:])
