"""Under DeepSpeed's ZeRO, for `ranks`: convolutions and embeddings, two adapters, experts and parts of fused weights.

    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 tests/zero_others.py several OUT

Every rank writes what each training came to into files of its own in OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn

from adapter_ranks import Adapter, came_to, two_adapters
from aroma import AromaConfig, aroma_layers, attach, save_adapter
from distributed_runs import TIMEOUT, tell_refusals
from expert_ranks import METHOD as EXPERTS_METHOD
from expert_ranks import TOKENS, Toy
from small_nets import Net as SmallNet
from small_nets import loss_of, rows, share, trainable
from test_kinds import METHOD, Net, grown
from zero_runs import NOTHING_STAYS, zero

FREE = {"gradient_clipping": 0.0}
"""DeepSpeed clips by default, and one process does not."""
STAGES = {
    "zero 1": zero(1, **FREE),
    "zero 2": zero(2, **FREE),
    "zero 3": zero(3, **FREE, **NOTHING_STAYS),
}
ORDERS = {"zero 1": "one after another", "zero 2": "in turns", "zero 3": "in turns"}
"""How two adapters train."""
STEPS = 36


def engine_of(model: nn.Module, stage: str, optimizer: Any) -> Any:
    return deepspeed.initialize(model=model, optimizer=optimizer, config=STAGES[stage])[0]


def trained(model: Any, losses: Callable[[Any, int], Tensor], stage: str, out: Path | None = None) -> dict[str, Any]:
    """Train for STEPS on `losses`, of the model and the number of a step; in one process where `stage` is empty."""
    optimizer = torch.optim.Adam(trainable(model), lr=0.02)
    engine = engine_of(model, stage, optimizer) if stage else model
    events: list[Any] = []
    attach(engine, engine.optimizer if stage else optimizer, total_steps=60, on_event=events.append)
    engine.train()
    for step in range(STEPS):
        loss = losses(engine, step)
        if stage:
            engine.backward(loss)
            engine.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if out is not None:
        save_adapter(model, out)
    updates = {name: layer.components("default") for name, layer in aroma_layers(model).items()}
    return {
        "events": [(event.step, event.module, event.kind, event.rank) for event in events],
        "updates": {name: (B @ A).detach() for name, (B, A) in updates.items()},
    }


def kinds(stage: str = "", out: Path | None = None) -> dict[str, Any]:
    """All kinds of layers, in float32, which ZeRO trains."""
    net = Net(["conv1d", "conv2d", "conv3d", "embedding"]).float()
    for held in (net.inputs, net.targets):
        held.update({name: part.float() for name, part in held.items() if part.is_floating_point()})
    own, rank = (3, dist.get_rank()) if stage else (6, 0)

    def losses(model: Any, step: int) -> Tensor:
        start = 6 * (step % 4) + own * rank
        loss: Tensor = model(slice(start, start + own))
        return loss

    return trained(grown(net, **METHOD), losses, stage, out)


def blocks(stage: str = "", out: Path | None = None, **fields: Any) -> dict[str, Any]:
    """16 experts, and two parts of a linear layer."""
    named = {
        "target_modules": ["project"],
        "split_modules": {"project": [10, 6]},
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    config = AromaConfig(**EXPERTS_METHOD, **{**named, **fields})
    data = rows(TOKENS * STEPS)
    return trained(
        get_peft_model(Toy(), config, autocast_adapter_dtype=False),
        lambda model, step: loss_of(model, share(data, step * TOKENS, TOKENS)),
        stage,
        out,
    )


def engines(stage: str) -> type[Adapter]:
    """Adapters with an engine each."""

    class Engine(Adapter):
        def distribute(self, rate: float) -> None:
            super().distribute(rate)
            self.wrapped = engine_of(self.model, stage, self.optimizer)
            self.optimizer = self.wrapped.optimizer

        def learn(self, batch: Any) -> None:
            self.wrapped.backward(loss_of(self.wrapped, batch))
            self.wrapped.step()

    return Engine


# Refusals ------------------------------------------------------------------------------------------------------------


def parts_under_zero_3(_: Path) -> None:
    blocks("zero 3", target_parameters=None)


def experts_under_zero_3(_: Path) -> None:
    blocks("zero 3", target_modules=[], split_modules=None)


def parts_loaded_in_shards(_: Path) -> None:
    with deepspeed.zero.Init(config_dict_or_path=STAGES["zero 3"]):
        base = nn.ModuleDict({"project": nn.Linear(16, 16)})
    get_peft_model(base, AromaConfig(target_modules=["project"], split_modules={"project": 2}))


def _one_engine_for_both(stage: str) -> None:
    model = two_adapters(SmallNet())
    model.base_model.set_adapter(["default", "other"])
    engine = engine_of(model, stage, torch.optim.AdamW(trainable(model)))
    model.set_adapter("default")
    attach(engine, engine.optimizer, total_steps=20)


def one_engine_for_both(_: Path) -> None:
    _one_engine_for_both("zero 2")


def one_engine_for_both_under_zero_3(_: Path) -> None:
    _one_engine_for_both("zero 3")


REFUSALS = [
    parts_under_zero_3,
    experts_under_zero_3,
    parts_loaded_in_shards,
    one_engine_for_both,
    one_engine_for_both_under_zero_3,
]


def alone(out: Path) -> None:
    """What one process comes to."""
    torch.save(blocks(), out / "blocks-alone.pt")
    torch.save(kinds(), out / "kinds-alone.pt")
    for order in {*ORDERS.values()}:
        torch.save(came_to(order, base=SmallNet()), out / f"adapters-{order}-alone.pt")


def several(out: Path) -> None:
    """What two processes come to."""
    deepspeed.init_distributed(timeout=TIMEOUT)
    rank = dist.get_rank()
    torch.save(blocks("zero 2", out / "blocks"), out / f"blocks-{rank}.pt")
    for stage, order in ORDERS.items():
        torch.save(kinds(stage, out / f"kinds-{stage}"), out / f"kinds-{stage}-{rank}.pt")
        found = came_to(order, engines(stage), out / f"adapters-{stage}", base=SmallNet())
        torch.save(found, out / f"adapters-{stage}-{rank}.pt")
    (out / "others").mkdir(exist_ok=True)
    tell_refusals(out / "others", REFUSALS)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    {"alone": alone, "several": several}[sys.argv[1]](Path(sys.argv[2]))
