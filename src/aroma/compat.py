"""Every private name of another package that AROMA reads or overrides, in one table.

A release of torch, peft, accelerate, transformers or DeepSpeed may rename any of them. Names that can be looked up are
checked at import: the error names the package, its version, and the versions that work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor, jit, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from .errors import IncompatibleError

TUNER_NAMES = {
    "peft.tuners.lora:LoraModel": (
        *("_create_new_module", "_check_target_module_exists", "_cast_adapter_dtype", "_check_merge_allowed"),
        *("_get_adapter_state_dict", "_remap_adapter_state_dict_for_load"),
    ),
    "peft.tuners.lora.layer:Linear": ("_cast_input_dtype",),
    "torch.nn:Module": ("_save_to_state_dict", "_load_from_state_dict", "_compiled_call_impl"),
    "torch.nn:Identity()": (
        *("_modules", "_buffers", "_forward_hooks", "_forward_pre_hooks"),
        *("_backward_hooks", "_backward_pre_hooks"),
    ),
    "torch.nn.modules.module": (
        *("_global_forward_hooks", "_global_forward_pre_hooks"),
        *("_global_backward_hooks", "_global_backward_pre_hooks"),
    ),
    "torch.autograd.forward_ad": ("_current_level",),
    "torch:_C": ("_len_torch_dispatch_stack",),
    "torch:_C._functorch": ("peek_interpreter_stack",),
}
"""What `aroma.tuner` needs, by where it is; "()" stands for an instance. Checked when `aroma.tuner` is imported."""

NAMES_AT_USE = {
    "torch, a compiled module": ("_orig_mod",),
    "torch, DistributedDataParallel": ("_ddp_params_and_buffers_to_ignore",),
    "torch, a scheduler": ("_last_lr",),
    "trl, a trainer": ("_prepare_dataset", "_formatting_func", "_metrics"),
    "deepspeed, a parameter of ZeRO-1 and -2": ("_hp_mapping",),
    "deepspeed, a parameter of ZeRO-3": ("ds_tensor", "ds_numel", "ds_shape", "ds_status", "_z3_optimizer"),
}
"""What only an object at hand has; nothing checks these before they are used."""


def require_names(names: Mapping[str, Iterable[str]]) -> None:
    """Check that every place of `names` has its names.

    Raises:
        IncompatibleError: Naming the first that is missing.
    """
    for where, wanted in names.items():
        module, _, path = where.partition(":")
        holder: Any = import_module(module)
        for part in filter(None, path.removesuffix("()").split(".")):
            holder = getattr(holder, part, None)
        holder = holder() if where.endswith("()") else holder
        for name in wanted:
            if not hasattr(holder, name):
                package = module.partition(".")[0]
                raise IncompatibleError(
                    f"{package} {metadata.version(package)}: {where.replace(':', '.')} has no {name!r}, which AROMA "
                    "needs; pip install --upgrade aroma-peft brings versions that work"
                )


# Readers -------------------------------------------------------------------------------------------------------------


def compiled_module(model: nn.Module) -> nn.Module | None:
    """Return the module inside of one that `torch.compile` returned; None for any other module."""
    return model._modules.get("_orig_mod")


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` was applied to the model, a part of it, or the model inside it, in place or not."""
    return any(compiled_module(one) is not None or one._compiled_call_impl is not None for one in model.modules())


def is_hooked(*modules: nn.Module) -> bool:
    """Whether calls of one of the modules are hooked, or its `forward` is replaced."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
        or any(
            "forward" in own
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            for own in map(vars, modules)
        )
    )


def is_traced(x: Tensor) -> bool:
    """Whether `x` (any shape) is being traced, so that a custom `autograd.Function` would be opaque.

    The tracer may be a compiler, a function transform, forward-mode differentiation, or a dispatch mode (selective
    checkpointing keeps results of operations, which may then not be written to). `x` itself counts if it is a tensor
    subclass, has no data, is nested, or is a scalar, which no layer takes.
    """
    return (
        torch.compiler.is_compiling()
        or jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or type(x) not in (Tensor, nn.Parameter)
        or x.is_meta
        or x.is_nested
        or not x.dim()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def report_rates(scheduler: object, rates: list[float]) -> None:
    """Let `scheduler`, if it is one of torch's, report `rates` as the last ones it set."""
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = rates


@contextmanager
def without_metrics(loss: object) -> Iterator[None]:
    """Keep a trainer of TRL, whose `compute_loss` is `loss`, from reporting the batches that it is called with."""
    noted = getattr(getattr(loss, "__self__", None), "_metrics", None)
    if not isinstance(noted, dict) or not all(isinstance(of, dict) for of in noted.values()):
        yield
        return
    before = {mode: {name: [*values] for name, values in of.items()} for mode, of in noted.items()}
    try:
        yield
    finally:
        for mode, of in before.items():
            noted[mode].clear()
            noted[mode].update(of)
