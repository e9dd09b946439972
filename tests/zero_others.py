"""Under DeepSpeed's ZeRO, for `ranks`: two adapters.

    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 tests/zero_others.py several OUT

Every rank writes what each training came to into files of its own in OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from adapter_ranks import Adapter, came_to, two_adapters
from aroma import attach
from distributed_runs import TIMEOUT, tell_refusals
from small_nets import Net, loss_of, trainable
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


def engine_of(model: nn.Module, stage: str, optimizer: Any) -> Any:
    return deepspeed.initialize(model=model, optimizer=optimizer, config=STAGES[stage])[0]


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


def _one_engine_for_both(stage: str) -> None:
    model = two_adapters(Net())
    model.base_model.set_adapter(["default", "other"])
    engine = engine_of(model, stage, torch.optim.AdamW(trainable(model)))
    model.set_adapter("default")
    attach(engine, engine.optimizer, total_steps=20)


def one_engine_for_both(_: Path) -> None:
    _one_engine_for_both("zero 2")


def one_engine_for_both_under_zero_3(_: Path) -> None:
    _one_engine_for_both("zero 3")


REFUSALS = [
    one_engine_for_both,
    one_engine_for_both_under_zero_3,
]


def alone(out: Path) -> None:
    """What one process comes to."""
    for order in {*ORDERS.values()}:
        torch.save(came_to(order, base=Net()), out / f"adapters-{order}-alone.pt")


def several(out: Path) -> None:
    """What two processes come to."""
    deepspeed.init_distributed(timeout=TIMEOUT)
    rank = dist.get_rank()
    for stage, order in ORDERS.items():
        found = came_to(order, engines(stage), out / f"adapters-{stage}", base=Net())
        torch.save(found, out / f"adapters-{stage}-{rank}.pt")
    (out / "others").mkdir(exist_ok=True)
    tell_refusals(out / "others", REFUSALS)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    {"alone": alone, "several": several}[sys.argv[1]](Path(sys.argv[2]))
