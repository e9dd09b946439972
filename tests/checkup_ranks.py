"""Checkups in several processes, for torchrun: plain loops under DDP, FSDP2 and ZeRO, checkpoints, and a Trainer.

    torchrun --standalone --nproc-per-node 2 tests/checkup_ranks.py loops OUT
    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 tests/checkup_ranks.py zero OUT

Every rank writes what it came to into files of its own in OUT.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from aroma.evidence.checkups import Checkups
from aroma.integrations.evidence_callback import EvidenceCallback
from aroma.sharding import gathered, own_entries
from distributed_runs import CALM, TIMEOUT, main, rank, size, without_sync
from trainer_runs import examples, tiny_bert, trainer_for

WIDTH, BATCH, STEPS = 20, 16, 90
AT = (0.3, 0.6)
PLANTED = (1, 0, 3, 2)
"""Ranks of what the layers are to learn."""

Rows = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Residual layers of tanh; `learnt` adds what a training is to find."""

    def __init__(self, learnt: bool = False) -> None:
        super().__init__()
        random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in PLANTED)
        for layer, planted in zip(self.layers, PLANTED, strict=True):
            weight, update = random(WIDTH, WIDTH), random(WIDTH, planted) @ random(planted, WIDTH)
            layer.weight.data = (weight + learnt * update / 2) / WIDTH**0.5

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.5 * torch.tanh(layer(x))
        return x


@torch.no_grad()
def rows(count: int, seed: int) -> Rows:
    """Inputs, and what the learnt net makes of them, with noise."""
    x, noise = torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x, Net(learnt=True)(x) + 0.3 * noise


def share(data: Rows, number: int, dtype: torch.dtype) -> Rows:
    """This process's part of a batch of all."""
    x, y = (part[number * BATCH : (number + 1) * BATCH][rank() :: size()].to(dtype) for part in data)
    return x, y


def loss_of(model: Any, batch: Rows) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def factors(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """B (m, r) and A (r, n) of every layer that has an update, whole."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer) and layer.lora_A}
    found = {}
    for name, layer in layers.items():
        B, A = gathered([layer.lora_B["default"].weight, layer.lora_A["default"].weight])
        found[name] = B.detach().clone(), A.detach().clone()
    return found


def updates(model: Any) -> dict[str, Tensor]:
    """s B A of every layer that has directions."""
    products = {name: model.get_submodule(name).scaling["default"] * B @ A for name, (B, A) in factors(model).items()}
    return {name: update for name, update in products.items() if update.any()}


# Plain loops ---------------------------------------------------------------------------------------------------------


def by_layer(model: Any) -> Any:
    """Each layer by itself, and the rest as the root."""
    for layer in model.base_model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


@dataclass(frozen=True)
class Way:
    """One way to train in several processes."""

    wrap: Callable[[Any], Any] = lambda model: model
    parts: int = 1
    """Micro-batches of a step."""
    stage: int = 0
    """Of ZeRO, which holds float32 copies of what it trains; the others train in float64."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.stage else torch.float64


IN_VIEWS = partial(DistributedDataParallel, gradient_as_bucket_view=True)
OFFLOADED = {"zero_offload_optimizer": {"device": "cpu"}}
NOTHING_STAYS = {"zero_stage3_param_persistence_threshold": 0, "zero_stage3_prefetch_bucket_size": 0}
LOOPS = {
    "ddp": Way(DistributedDataParallel),
    "ddp, micro-batches": Way(IN_VIEWS, parts=2),
    "fsdp2": Way(by_layer),
    "fsdp2, micro-batches": Way(by_layer, parts=2),
}
ZERO = {
    "zero 2": Way(stage=2),
    "zero 3, nothing stays": Way(stage=3, parts=2, options=NOTHING_STAYS),
    "zero 3, offloaded": Way(stage=3, options=OFFLOADED),
}


class Loop:
    """One training of a net, which can stop and go on; the same batches whatever the number of processes."""

    def __init__(self, way: Way, batches: int = 20) -> None:
        torch.manual_seed(3)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=r"layers\.\d+")
        self.model: Any = get_peft_model(Net(), config, autocast_adapter_dtype=False).to(way.dtype)
        self.way, self.done = way, 0
        self.wrapped = way.wrap(self.model) if dist.is_initialized() else self.model
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.01)
        self.is_engine = way.stage > 0 and dist.is_initialized()
        if self.is_engine:
            self._become_engine()
        self.wrapped.train()
        self.model.base_model.model.layers[0].eval()  # a part that its owner evaluates
        self.data, asked = rows(STEPS * BATCH, seed=1), rows(batches * BATCH, seed=2)
        held_out = [share(asked, number, way.dtype) for number in range(batches)]
        self.checkups = Checkups(self.wrapped, self.optimizer, STEPS, held_out, at=AT, loss=loss_of)
        self.dead: dict[str, Tensor] = {}
        self.moved: list[int] = []
        self.traces: list[tuple[Any, Any]] = []

    def _become_engine(self) -> None:
        import deepspeed

        from zero_runs import zero

        config = zero(self.way.stage, gradient_accumulation_steps=self.way.parts, **self.way.options)
        self.wrapped = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=config)[0]
        self.optimizer = self.wrapped.optimizer

    def go_on(self, until: int = STEPS) -> Loop:
        for step in range(self.done, until):
            self._backward(step)
            if not self.is_engine:
                self.optimizer.step()
            self._check()
            self.optimizer.zero_grad()
        self.done = until
        return self

    def _backward(self, step: int) -> None:
        """Take the gradients of a batch; an engine takes the step, too."""
        x, y = share(self.data, step, self.way.dtype)
        parts = self.way.parts
        for part in range(parts):
            batch = x[part::parts], y[part::parts]
            if self.is_engine:
                self.wrapped.backward(loss_of(self.wrapped, batch))
                self.wrapped.step()
                continue
            with without_sync(self.wrapped) if part < parts - 1 else nullcontext():
                (loss_of(self.wrapped, batch) / parts).backward()

    def _check(self) -> None:
        """Count a step, and note what a checkup changes that it must not, and what was zero and is no more."""
        before = self._state()
        if self.checkups.step() is not None:
            self.traces.append((before, self._state()))
            self.dead = {name: ~B.any(0) & ~A.any(1) for name, (B, A) in factors(self.model).items()}
        elif self.dead and self.checkups._step < STEPS:  # then it may be compact
            self.moved += [
                self.checkups._step
                for name, (B, A) in factors(self.model).items()
                if B[:, self.dead[name]].any() or A[self.dead[name]].any()
            ]

    def _state(self) -> dict[str, Any]:
        gradients = [parameter.grad for parameter in self.model.parameters()]
        return {
            "gradients": [None if one is None else own_entries(one).clone() for one in gradients],
            "random": torch.get_rng_state(),
            "training": [module.training for module in self.wrapped.modules()],
            "trained": [parameter.requires_grad for parameter in self.model.parameters()],
        }

    def came_to(self) -> dict[str, Any]:
        return {
            "checkups": [found.as_dict() for found in self.checkups.history],
            "factors": factors(self.model),
            "updates": updates(self.model),
            "moved": self.moved,
            "traces": self.traces,
        }

    def save(self, folder: Path) -> None:
        """Save the adapter, whole, as PEFT does; the first rank writes it."""
        state = dict(self.model.state_dict())
        for name, (B, A) in factors(self.model).items():
            state |= {f"{name}.lora_B.default.weight": B, f"{name}.lora_A.default.weight": A}
        if rank() == 0:
            self.model.save_pretrained(folder, state_dict=state)


def loops(out: Path, ways: dict[str, Way] = LOOPS) -> None:
    for name, way in ways.items():
        loop = Loop(way).go_on()
        torch.save(loop.came_to(), out / f"{name}-{rank()}.pt")
        loop.save(out / f"adapter-{name}")


# The Trainer ---------------------------------------------------------------------------------------------------------

TRAINER_AT = (0.5, 0.8)
"""Checkups that cut on this small task, and not all."""


def trained(out: Path, way: str, **several: Any) -> dict[str, Any]:
    """What a Trainer comes to whose batches and held-out batches are shared by `several` processes."""
    base = tiny_bert(**CALM).to(torch.float32 if "zero" in way else torch.float64)
    torch.manual_seed(3)
    # Under ZeRO the moments of a head would begin anew, too; without a task no head is trained.
    task = None if "zero" in way else "SEQ_CLS"
    config = LoraConfig(r=4, lora_alpha=8, task_type=task, target_modules=r".*encoder.*(query|key|value|dense)")
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    trainer = trainer_for(
        model,
        out,
        EvidenceCallback(examples(128, seed=11), at=TRAINER_AT),
        save_strategy="no",
        max_steps=60,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        **several,
    )
    trainer.train_dataset = examples(480)
    trainer.train()
    (callback,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, EvidenceCallback)]
    return {
        "checkups": [found.as_dict() for found in callback.history],
        "updates": updates(trainer.model),
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def train(out: Path, way: str) -> None:
    several: dict[str, Any] = {"ddp_backend": "gloo", "ddp_timeout": 60}
    if way == "fsdp2":
        from sharded_runs import FSDP2, make_accelerate_shard_on_cpu

        make_accelerate_shard_on_cpu()
        several |= {"fsdp": True, "fsdp_config": FSDP2}
    if way == "zero 3":
        from zero_runs import zero

        several = {"deepspeed": {**zero(3), "train_micro_batch_size_per_gpu": 4}}
    torch.save(trained(out / way, way, **several), out / f"trainer-{way}-{rank()}.pt")


PARTS: dict[str, Callable[[Path], None]] = {
    "loops": loops,
    "zero": partial(loops, ways=ZERO),
    **{f"train {way}": partial(train, way=way) for way in ("ddp", "fsdp2", "zero 3")},
}

if __name__ == "__main__":
    if sys.argv[1] == "zero":
        import deepspeed

        deepspeed.init_distributed(timeout=TIMEOUT)
    elif not sys.argv[1].startswith("train"):  # the Trainer makes its own
        dist.init_process_group("gloo", timeout=TIMEOUT)
    main(PARTS, *sys.argv[1:])
