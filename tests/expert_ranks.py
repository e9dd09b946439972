"""A toy with 16 experts under FSDP2 and DDP, for torchrun: experts and parts of a fused weight.

    torchrun --standalone --nproc-per-node 2 tests/expert_ranks.py OUT

Every rank writes what each loop came to into a file of its own in OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from aroma import AromaConfig, save_adapter
from distributed_runs import TIMEOUT, whole
from small_nets import WIDTH, Loop, decisions, rows, updates

EXPERTS, LAYERS, STEPS, TOKENS = 16, 1, 60, 192

METHOD: dict[str, Any] = {
    **{"inner_check_interval": 2, "inner_tolerance": 0.5, "max_inner_steps": 4},
    **{"outer_tolerance": 0.02, "component_seed": 5, "rewarmup_steps": 1},
}


class Block(nn.Module):
    """16 experts, of which the signs of four numbers choose one for every token, beside a linear layer."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        config: Any = transformers.MixtralConfig(
            hidden_size=WIDTH, intermediate_size=12, num_local_experts=EXPERTS, num_attention_heads=2
        )
        config._experts_implementation = "batched_mm"
        self.experts: Any = MixtralExperts(config)
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / WIDTH**0.5

    def forward(self, x: Tensor) -> Tensor:
        """Map x (T, n) to the same shape."""
        bits = (x[:, :4] > 0).long() * torch.tensor([1, 2, 4, 8])
        chosen = bits.sum(1, keepdim=True)
        result: Tensor = x + torch.tanh(self.project(x)) + self.experts(x, chosen, torch.ones_like(x[:, :1]))
        return result


class Toy(nn.Module):
    """Some blocks."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        self.layers = nn.ModuleList(Block(generator) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (T, n) to the same shape."""
        for layer in self.layers:
            x = layer(x)
        return x


def toy() -> Any:
    """The toy in float64 with a growing adapter, where rounding is no excuse."""
    config = AromaConfig(
        **METHOD,
        target_modules=["project"],
        split_modules={"project": [10, 6]},
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    return get_peft_model(Toy().double(), config, autocast_adapter_dtype=False)


def sharded(model: Any) -> Any:
    """Each block by itself, and the rest as the root."""
    if dist.is_initialized():
        for layer in model.base_model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def replicated(model: Any) -> Any:
    return DistributedDataParallel(model) if dist.is_initialized() else model


REPLICATED_STEPS = 36
"""After some outer steps."""


def loop(wrap: Callable[[Any], Any] = sharded) -> Loop:
    return Loop(toy(), wrap=wrap, steps=STEPS, size=TOKENS)


def ended(training: Loop) -> dict[str, Any]:
    """What a loop came to, whole on all ranks."""
    controller = training.growth.controller
    return {
        "events": decisions(training.events),
        "ranks": [(summary.name, summary.rank) for summary in controller.summary()],
        "weight norms": [matrix.weight_norm for matrix in controller.modules],
        "weights": updates(training.model),
    }


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    training = loop().go_on()
    torch.save(whole(ended(training)), out / f"sharded-{dist.get_rank()}.pt")
    save_adapter(training.model, out / "adapter")
    training.model.eval()
    with torch.no_grad():
        said = training.model(rows(12, seed=7, dtype=torch.float64)[0])
    torch.save(said, out / f"said-{dist.get_rank()}.pt")
    replicas = loop(replicated).go_on(REPLICATED_STEPS)
    torch.save(ended(replicas), out / f"replicas-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
