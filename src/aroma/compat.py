"""Every private name of another package that AROMA reads or overrides, in one table.

A release of torch, peft, accelerate, transformers or DeepSpeed may rename any of them. What can be looked up is
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

DISTRIBUTION = "aroma-peft"

TUNER_NAMES = {
    "peft.tuners.lora:LoraModel": (
        "_create_new_module",
        "_check_target_module_exists",
        "_cast_adapter_dtype",
        "_check_merge_allowed",
        "_get_adapter_state_dict",
        "_remap_adapter_state_dict_for_load",
    ),
    "peft.tuners.lora.layer:Linear": ("_cast_input_dtype",),
    "torch.nn:Module": ("_save_to_state_dict", "_load_from_state_dict", "_compiled_call_impl"),
    "torch.nn:Identity()": (
        "_modules",
        "_buffers",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    ),
    "torch.nn.modules.module": (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    ),
    "torch.autograd.forward_ad": ("_current_level",),
    "torch:_C": ("_len_torch_dispatch_stack",),
    "torch:_C._functorch": ("peek_interpreter_stack",),
}
"""What `aroma.tuner` needs, by where it is; "()" stands for an instance. Checked when `aroma.tuner` is imported."""

TRAINER_NAMES = {"transformers.trainer_callback": ("ExportableState",)}
"""What `AromaCallback` needs; checked when it is imported."""

NAMES_AT_USE = {
    "torch, a compiled module": ("_orig_mod",),
    "torch, DistributedDataParallel": ("_ddp_params_and_buffers_to_ignore", "_ddp_ignored", "_join_config"),
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
        holder = _find(where)
        for name in wanted:
            if not hasattr(holder, name):
                package = where.partition(":")[0].partition(".")[0]
                raise IncompatibleError(
                    f"{package} {metadata.version(package)}: {where.replace(':', '.')} has no {name!r}, which AROMA "
                    f"needs; install a version that works: {_requirement(package)}"
                )


def _find(where: str) -> Any:
    """Return the module, class or instance at an import path; None if there is none."""
    module, _, path = where.partition(":")
    try:
        found: Any = import_module(module)
    except ImportError:
        return None
    for part in path.removesuffix("()").split(".") if path else ():
        found = getattr(found, part, None)
    return found() if where.endswith("()") else found


def _requirement(package: str) -> str:
    """Return what our own metadata require of `package`, such as `peft>=0.21`."""
    try:
        required = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        required = []
    found = (line.partition(";")[0].strip() for line in required)
    return next((line for line in found if line.lower().startswith(package)), f"see {DISTRIBUTION}'s pyproject.toml")


# Readers -------------------------------------------------------------------------------------------------------------


def compiled_module(model: nn.Module) -> nn.Module | None:
    """Return the module inside of one that `torch.compile` returned; None for any other module."""
    return model._modules.get("_orig_mod")


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` was applied to `module` itself, in place (`module.compile()`) or not."""
    return compiled_module(module) is not None or module._compiled_call_impl is not None


def has_hooks(module: nn.Module) -> bool:
    """Whether calls of `module` are hooked, or its `forward` is replaced."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def has_global_hooks() -> bool:
    """Whether calls of all modules are hooked."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def is_jit_tracing() -> bool:
    """Whether torch.jit traces a module."""
    tracing: bool = jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing


def is_transformed() -> bool:
    """Whether forward-mode differentiation, a dispatch mode or a function transform is at work."""
    return (
        forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def hide_from_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Let DistributedDataParallel leave parameters and buffers of `model` alone, by their names in it."""
    hidden = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names}
    model._ddp_params_and_buffers_to_ignore = sorted(hidden)  # type: ignore[assignment]


def is_ignored_by_ddp(parameter: Tensor) -> bool:
    """Whether DistributedDataParallel leaves a parameter (any shape) alone, so that it may differ between ranks."""
    return hasattr(parameter, "_ddp_ignored")


def is_joined(wrapper: object) -> bool:
    """Whether a DistributedDataParallel model is in its `join` context."""
    join = getattr(wrapper, "_join_config", None)
    return join is not None and bool(join.enable)


def report_rates(scheduler: object, rates: list[float]) -> None:
    """Let `scheduler`, if it is one of torch's, report `rates` as the last ones it set."""
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = rates


@contextmanager
def without_metrics(loss: object) -> Iterator[None]:
    """Keep a trainer of TRL from noting metrics of what its `compute_loss` is called with, if `loss` is that.

    It would report the mean over them and the batches of its next evaluation.
    """
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
