"""Two growing adapters of one net: in one process and, for torchrun, under DistributedDataParallel and FSDP2.

    torchrun --standalone --nproc-per-node 2 tests/adapter_ranks.py OUT

Every rank writes what the adapters came to into files of its own in OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from aroma import AromaConfig, aroma_layers, attach, save_adapter
from aroma.sharding import sharding_modules
from distributed_runs import TIMEOUT, rank, whole
from small_nets import STEPS, Net, copied, loss_of, rows, share, trainable

METHOD: dict[str, Any] = {
    **{"inner_check_interval": 2, "inner_tolerance": 0.8, "max_inner_steps": 8, "component_seed": 5},
    "target_modules": r"layers\.\d+",
}
UNLIKE = {**METHOD, "component_seed": 11}
"""That of the second adapter."""


def save(model: Any, folder: Path | str, name: str) -> None:
    """Save an adapter: the first rank a replica, all ranks their shards."""
    if rank() == 0 or sharding_modules(model):
        save_adapter(model, folder, name)
    if dist.is_initialized():
        dist.barrier()


class Saved(NamedTuple):
    """A training of one adapter that can go on."""

    folder: Path
    optimizer: dict[str, Any]
    done: int


class Adapter:
    """A training of one adapter of a net, step by step."""

    wrapped: Any
    """What is called: the model, or what makes it one of several processes."""

    def __init__(self, model: Any, name: str, rate: float, share: int, saved: Saved | None = None) -> None:
        model.set_adapter(name)
        self.model, self.name, self.events = model, name, []
        dtype = next(model.parameters()).dtype
        self.x, self.y = (part.to(dtype) for part in rows(8 * STEPS, seed=20 + share))
        self.distribute(rate)
        options: dict[str, Any] = {}
        if saved is not None:
            set_optimizer_state_dict(self.model, self.optimizer, saved.optimizer)
            options = {"resume_from": str(saved.folder)}
        self.growth = attach(
            self.wrapped, self.optimizer, total_steps=STEPS, adapter_name=name, on_event=self.events.append, **options
        )
        self.done = 0 if saved is None else saved.done

    def distribute(self, rate: float) -> None:
        """Wrap the model, and make the optimizer."""
        self.wrapped, self.optimizer = self.model, torch.optim.AdamW(trainable(self.model), lr=rate)

    def step(self) -> None:
        self.model.set_adapter(self.name)
        self.learn(share((self.x, self.y), 8 * self.done, 8))
        self.done += 1

    def learn(self, batch: Any) -> None:
        """Take one optimizer step on this process's part of a batch."""
        self.optimizer.zero_grad()
        loss_of(self.wrapped, batch).backward()
        self.optimizer.step()

    def save(self, folder: Path) -> Saved:
        save(self.model, folder, self.name)
        # Without the tensors that the next steps change in place.
        return Saved(folder, copied(get_optimizer_state_dict(self.model, self.optimizer)), self.done)

    def came_to(self) -> dict[str, Any]:
        layers = aroma_layers(self.model, self.name)
        return {
            "components": [layer.components(self.name) for layer in layers.values()],
            "optimizer": self.optimizer.state_dict(),
            "controller": self.growth.controller.state_dict(),
            "events": [event.as_dict() for event in self.events],
            "summary": self.growth.controller.summary(),
        }


def plain_net(method: dict[str, Any] = METHOD, base: torch.nn.Module | None = None) -> Any:
    return get_peft_model(base or Net(), AromaConfig(**method), autocast_adapter_dtype=False)


def two_adapters(base: torch.nn.Module | None = None) -> Any:
    """A net, in float64 by default, with two adapters that have not trained."""
    model = plain_net(METHOD, Net().double() if base is None else base)
    model.add_adapter("other", AromaConfig(**UNLIKE), autocast_adapter_dtype=False)
    return model


# Several processes ---------------------------------------------------------------------------------------------------

ORDERS = ("in turns", "one after another")
HALF = STEPS // 2
"""Steps of each adapter."""
SAVED_AT = 26
"""Steps after which the second one is saved; it still grows when it is compared."""


class Replicated(Adapter):
    """With a wrapper of its own."""

    def distribute(self, rate: float) -> None:
        super().distribute(rate)
        self.wrapped = DistributedDataParallel(self.model)


class Sharded(Adapter):
    """Over a model that is sharded once, with both adapters in it."""

    def distribute(self, rate: float) -> None:
        if not isinstance(self.model, FSDPModule):
            for layer in self.model.base_model.model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        super().distribute(rate)


WAYS: dict[str, type[Adapter]] = {"ddp": Replicated, "fsdp2": Sharded}


def came_to(order: str, way: type[Adapter] = Adapter, out: Path | None = None, **base: Any) -> dict[str, Any]:
    """Train two adapters, and return by their names what each came to; saved in folders that begin with `out`."""
    model = two_adapters(**base)
    both = []
    for number, name in enumerate(("default", "other")):
        both.append(way(model, name, (0.01, 0.02)[number], number))
        for _ in range(HALF if order == "one after another" else 0):
            both[-1].step()
    for one in both * (HALF if order == "in turns" else 0):
        one.step()
    found = {}
    for one in both:
        if out is not None:
            save(model, f"{out}-{one.name}", one.name)
        layers = aroma_layers(model, one.name)
        updates = {name: layer.components(one.name) for name, layer in layers.items()}
        found[one.name] = {
            "events": [(event.step, event.module, event.kind, event.rank) for event in one.events],
            "ranks": {name: len(A) for name, (_, A) in updates.items()},
            "updates": {name: (B @ A).detach() for name, (B, A) in updates.items()},
        }
    return found


def resumed(way: type[Adapter], out: Path) -> list[dict[str, Any]]:
    """Return what the second adapter came to without a stop, and what it came to in a model made anew from files."""
    model = two_adapters()
    first = way(model, "default", 0.01, 0)
    for _ in range(HALF):
        first.step()
    save(model, f"{out}-default", "default")
    second = way(model, "other", 0.02, 1)
    for _ in range(SAVED_AT):
        second.step()
    saved = second.save(Path(f"{out}-other"))
    anew = two_adapters()
    for name in ("default", "other"):
        anew.load_adapter(f"{out}-{name}", name, is_trainable=True)
    again = way(anew, "other", 0.02, 1, saved)
    found = []
    for one in (second, again):
        one.events.clear()
        for _ in range(HALF // 2):
            one.step()
        resting = aroma_layers(one.model, "default").values()
        components = [layer.components("default") for layer in resting]
        found.append(whole({"second": one.came_to(), "first": components}))
    return found


def main(out: Path) -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    for way, kind in WAYS.items():
        for order in ORDERS:
            found = came_to(order, kind, out / f"{way}-{order}")
            torch.save(found, out / f"{way}-{order}-{dist.get_rank()}.pt")
        torch.save(resumed(kind, out / f"{way}-resumed"), out / f"{way}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
