"""Compressing in several processes, for torchrun: plain calls, and a Trainer under DDP, FSDP2 and ZeRO.

    torchrun --standalone --nproc-per-node 2 tests/compress_ranks.py calls OUT
    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 tests/compress_ranks.py zero OUT

Every rank writes what it came to into files of its own in OUT.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aroma import CompressCallback, compress
from distributed_runs import CALM, TIMEOUT, batch_of, main, rank, share, size, stacked, tell_refusals
from trainer_runs import examples, tiny_bert, trainer_for

COMPRESSING: Any = importlib.import_module("aroma.compression.compress")
STEPS, ROWS, BATCH = 24, 64, 4
"""Steps of a training, examples that decide, and rows of a batch of one process."""


def pull_without_noise() -> None:
    """Let every process pull on the outputs of an example alike: by themselves they draw noise of their own."""
    COMPRESSING.pull = lambda found, generator: (found.values.detach().softmax(-1) - 0.5) / len(found) ** 0.5


def adapted(dtype: torch.dtype = torch.float64) -> Any:
    base = tiny_bert(**CALM).to(dtype)
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS", target_modules=r".*encoder.*(query|key|value|dense)")
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def updates(model: nn.Module) -> dict[str, Tensor]:
    """s B A of every layer that has one."""
    return {
        name: layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A
    }


def came_to(model: nn.Module, compression: Any) -> dict[str, Any]:
    return {"compression": compression.as_dict(), "updates": updates(model)}


# Plain calls ---------------------------------------------------------------------------------------------------------


def learnt(dtype: torch.dtype) -> Any:
    """A model whose adapter changes what it answers."""
    model, draw = adapted(dtype), torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=draw).to(dtype)
    return model


def call(dtype: torch.dtype) -> dict[str, Any]:
    """Compress with this process's batches, after a step under DDP, whose hooks then lie on the parameters."""
    pull_without_noise()
    model = learnt(dtype)
    batches = [stacked(batch_of(number, BATCH)) for number in range(ROWS // BATCH)]
    if size() > 1:
        wrapped = DistributedDataParallel(model)
        wrapped(**batches[0]).loss.backward()
        found = compress(wrapped, share(batches), size=0.4)
    else:
        found = compress(model, batches, size=0.4)
    return came_to(model, found)


def not_finite_on_one(_: Path) -> None:
    model = learnt(torch.float32)
    if rank() == 1:
        model.get_base_model().classifier.modules_to_save["default"].bias.data[0] = torch.nan
    compress(model, share([stacked(batch_of(number, BATCH)) for number in range(8)]))


def none_on_one(_: Path) -> None:
    batches = [stacked(batch_of(number, BATCH)) for number in range(8)]
    compress(learnt(torch.float32), batches if rank() == 0 else [])


REFUSALS = [not_finite_on_one, none_on_one]
DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16}


def calls(out: Path) -> None:
    for name, dtype in DTYPES.items():
        torch.save(call(dtype), out / f"call-{name}-{rank()}.pt")
    tell_refusals(out, REFUSALS)


# The Trainer ---------------------------------------------------------------------------------------------------------


def trained(out: Path, data: Any = None, model: Any = None, **several: Any) -> dict[str, Any]:
    """What a Trainer comes to whose batches, of 4 rows, are shared by the processes, or of one process in turn."""
    pull_without_noise()
    callback = CompressCallback(data, examples=ROWS)
    trainer = trainer_for(
        adapted() if model is None else model,
        out,
        callback,
        save_strategy="no",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        gradient_accumulation_steps=2 // int(os.environ.get("WORLD_SIZE", "1")),
        **several,
    )
    trainer.train_dataset = examples(240)
    try:
        trainer.train()
    except Exception as error:
        return {"refused": str(error), "kind": type(error).__name__, "steps": trainer.state.global_step}
    found = came_to(trainer.model, callback.compression)
    return {**found, "wrapped": type(trainer.model_wrapped).__name__, "log": trainer.state.log_history[-1]}


GLOO: dict[str, Any] = {"ddp_backend": "gloo", "ddp_timeout": 60}


def train(out: Path) -> None:
    for name, data in (("seen", None), ("given", examples(ROWS, seed=11))):
        torch.save(trained(out / name, data, **GLOO), out / f"trainer-{name}-{rank()}.pt")


def fsdp2(out: Path) -> None:
    from sharded_runs import FSDP2, make_accelerate_shard_on_cpu

    make_accelerate_shard_on_cpu()
    several = {**GLOO, "fsdp": True, "fsdp_config": FSDP2}
    torch.save(trained(out, model=adapted(torch.float32), **several), out / f"fsdp2-{rank()}.pt")


def zero(out: Path) -> None:
    import zero_runs

    for stage in (2, 3):
        config = {**zero_runs.zero(stage), "train_micro_batch_size_per_gpu": BATCH}
        found = trained(out, model=adapted(torch.float32), deepspeed=config)
        torch.save(found, out / f"zero {stage}-{rank()}.pt")


PARTS: dict[str, Callable[[Path], None]] = {"calls": calls, "train": train, "fsdp2": fsdp2, "zero": zero}

if __name__ == "__main__":
    if sys.argv[1] == "calls":
        dist.init_process_group("gloo", timeout=TIMEOUT)
    elif sys.argv[1] == "zero":
        import deepspeed

        deepspeed.init_distributed(timeout=TIMEOUT)
    main(PARTS, *sys.argv[1:])
