"""Every private name of another package that AROMA reads or overrides, in one table.

A release of torch, peft, accelerate or DeepSpeed may rename any of them without notice. So they are looked for before
anything depends on them: those of the tuner when `aroma.tuner` is imported, those of the Trainer's callback when it is
imported, and those of DeepSpeed when a controller first meets it. What is missing is one error that names the package,
its version, and the versions that work. A check imports nothing that its caller has not imported already.

The functions at the end read the names that a plain attribute access would not explain.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from types import CodeType
from typing import Any, Literal

import torch
from torch import Tensor, jit, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from .errors import IncompatibleError

DISTRIBUTION = "aroma-peft"

How = Literal["attribute", "instance", "read by", "at use"]


@dataclass(frozen=True)
class PrivateName:
    """One private name of another package.

    Attributes:
        package: The distribution that defines it.
        where: Import path of the module, and of a class or function in it after a colon; for names that are checked
            at use, what carries the name, in words.
        name: The name.
        use: What AROMA does with it.
        how: How its presence is known. `"attribute"`: `where` has it. `"instance"`: a new instance of the class
            `where` has it. `"read by"`: the code of the function `where` mentions it. `"at use"`: the object that
            AROMA works on has it, so it is checked there.
    """

    package: str
    where: str
    name: str
    use: str
    how: How = "attribute"


_TUNER = "peft.tuners.lora:LoraModel"
_LAYER = "peft.tuners.lora.layer:Linear"
_MODULE = "torch.nn:Module"
_DDP = "torch.nn.parallel:DistributedDataParallel"

TUNER_NAMES = (
    # How adapters are made.
    PrivateName("peft", _TUNER, "_create_new_module", "make an AromaLinear of a target"),
    PrivateName("peft", _TUNER, "_check_target_module_exists", "leave out heads that train whole"),
    PrivateName("peft", _TUNER, "_cast_adapter_dtype", "cast pairs once only, since the optimizer holds them"),
    PrivateName("peft", _TUNER, "_check_merge_allowed", "refuse to merge into quantised weights before any is merged"),
    # How adapters are saved and loaded.
    PrivateName("peft", _TUNER, "_get_adapter_state_dict", "save the plain LoRA form"),
    PrivateName("peft", _TUNER, "_remap_adapter_state_dict_for_load", "load the plain LoRA form"),
    # The layer.
    PrivateName("peft", _LAYER, "_move_adapter_to_device_of_base_layer", "place the pair of an offloaded layer"),
    PrivateName("peft", _LAYER, "_check_forward_args", "refuse arguments of forward as PEFT does"),
    PrivateName("peft", _LAYER, "_cast_input_dtype", "cast inputs as PEFT does"),
    PrivateName("accelerate", "accelerate.hooks:add_hook_to_module", "_hf_hook", "where it computes", "read by"),
    # Modules of torch.
    PrivateName("torch", _MODULE, "_apply", "leave components in 32 bits when a model is cast to 16"),
    PrivateName("torch", _MODULE, "_save_to_state_dict", "save finished components without their padding"),
    PrivateName("torch", _MODULE, "_load_from_state_dict", "load finished components of any rank"),
    PrivateName("torch", _MODULE, "_compiled_call_impl", "know a module that was compiled in place"),
    *(
        PrivateName("torch", _MODULE, name, use, "instance")
        for name, use in (
            ("_modules", "find what torch.compile wraps without calling its __getattr__"),
            ("_buffers", "store finished components under the names that the state dict gives them"),
            ("_forward_hooks", "call a hooked module instead of multiplying with its weight"),
            ("_forward_pre_hooks", "the same"),
            ("_backward_hooks", "the same"),
            ("_backward_pre_hooks", "the same"),
        )
    ),
    *(
        PrivateName("torch", "torch.nn.modules.module", name, "the same, for hooks of all modules")
        for name in (
            "_global_forward_hooks",
            "_global_forward_pre_hooks",
            "_global_backward_hooks",
            "_global_backward_pre_hooks",
        )
    ),
    PrivateName("torch", "torch:Tensor", "_version", "know a pair that trains without a controller"),
    # Who traces a call.
    PrivateName("torch", "torch.autograd.forward_ad", "_current_level", "know forward-mode differentiation"),
    PrivateName("torch", "torch:_C", "_len_torch_dispatch_stack", "know dispatch modes"),
    PrivateName("torch", "torch:_C._functorch", "peek_interpreter_stack", "know function transforms"),
    # DistributedDataParallel.
    PrivateName(
        "torch", f"{_DDP}.__init__", "_ddp_params_and_buffers_to_ignore", "hide finished components", "read by"
    ),
    PrivateName(
        "torch",
        f"{_DDP}._set_params_and_buffers_to_ignore_for_model",
        "_ddp_ignored",
        "know the parameters that DDP leaves alone",
        "read by",
    ),
    PrivateName(
        "torch",
        "torch.distributed:Reducer",
        "_get_zeros_like_grad_buckets",
        "know the parameters whose gradients DDP averages",
    ),
    PrivateName(
        "torch",
        "torch.distributed.algorithms.join:Joinable.__init__",
        "_join_config",
        "refuse the join context",
        "read by",
    ),
    PrivateName(
        "torch",
        "torch.optim.lr_scheduler:LRScheduler.get_last_lr",
        "_last_lr",
        "let a scheduler report the rate that was used",
        "read by",
    ),
    PrivateName("torch", "a module that torch.compile returned", "_orig_mod", "find what it wraps", "at use"),
)
"""What `aroma.tuner` and the rooms above it need; checked when `aroma.tuner` is imported."""

TRAINER_NAMES = (
    PrivateName("trl", "a trainer of TRL", "_prepare_dataset", "prepare held-out rows as the training set", "at use"),
    PrivateName("trl", "SFTTrainer", "_formatting_func", "the same", "at use"),
    PrivateName("transformers", "transformers.trainer_callback", "ExportableState", "write into trainer_state.json"),
    PrivateName(
        "transformers",
        "transformers.trainer_callback:TrainerState.__post_init__",
        "stateful_callbacks",
        "read it back on resume",
        "read by",
    ),
    PrivateName(
        "transformers",
        "transformers.trainer_callback:CallbackHandler.add_callback",
        "callbacks",
        "put ranks into the logs before a tracker reads them",
        "read by",
    ),
)
"""What `AromaCallback` needs; checked when it is imported."""


def _of_deepspeed(where: str, **uses: str) -> tuple[PrivateName, ...]:
    return tuple(PrivateName("deepspeed", where, name, use, "at use") for name, use in uses.items())


ZERO_2_OPTIMIZER = _of_deepspeed(
    "the optimizer of ZeRO-1 and ZeRO-2",
    optimizer="find the moments",
    single_partition_of_fp32_groups="find the flat copies",
)
ZERO_2_PARAMETER = _of_deepspeed("a parameter that ZeRO-1 or ZeRO-2 trains", _hp_mapping="find its flat copy")
ZERO_2_MAPPING = _of_deepspeed(
    "a mapping from a parameter to its flat copy",
    lp_fragment_address="know which entries this rank holds",
    hp_fragment_address="know where they lie in the flat copy",
    param_group_index="know in which flat copy",
    get_hp_fragment="write to the flat copy",
)
ZERO_3_OPTIMIZER = _of_deepspeed(
    "the optimizer of ZeRO-3",
    optimizer="find the moments",
    get_param_id="find a parameter's flat copy",
    grad_position="the same",
    fp32_partitioned_groups_flat="the same",
)
ZERO_3_PARAMETER = _of_deepspeed(
    "a parameter that ZeRO-3 shards",
    ds_tensor="read and write this rank's entries",
    ds_numel="know which entries they are",
    ds_shape="know the whole shape",
    ds_status="write into a parameter that is whole for a while",
    ds_process_group="refuse shards over some of the processes",
    _z3_optimizer="find its flat copy",
)
_ZERO_OPTIONAL = (
    *_of_deepspeed("this rank's entries of a quantised parameter", ds_quant_scale="refuse it"),
    *_of_deepspeed("a parameter with a second copy of its shards", ds_zero_param_process_group="refuse it"),
    *_of_deepspeed("a parameter that ZeRO-1 or ZeRO-2 trains", _dp_group="refuse shards over some of the processes"),
    *_of_deepspeed(
        "an optimizer with an option that AROMA refuses",
        params_in_nvme_and_cpu="refuse parameters in files",
        swap_optimizer="refuse moments in files",
        round_robin_gradients="refuse a wrong record of positions",
        zenflow="refuse transposed weights",
        backup_optimizer="refuse two optimizers",
        bit16_groups="refuse an engine that holds a resting adapter, too",
        overflow="know a step that changed nothing",
    ),
)
"""Present only where something is to be refused, so their absence says nothing."""

DEEPSPEED_NAMES = (
    *ZERO_2_OPTIMIZER,
    *ZERO_2_PARAMETER,
    *ZERO_2_MAPPING,
    *ZERO_3_OPTIMIZER,
    *ZERO_3_PARAMETER,
    *_ZERO_OPTIONAL,
)
"""What `aroma.sharding.zero` needs; checked when a controller meets an optimizer of DeepSpeed."""

NAMES = (*TUNER_NAMES, *TRAINER_NAMES, *DEEPSPEED_NAMES)


# Checks --------------------------------------------------------------------------------------------------------------


def require_names(names: Iterable[PrivateName]) -> None:
    """Check that `names` exist, except those that are checked at use.

    Raises:
        IncompatibleError: Naming the first that is missing.
    """
    for name in names:
        if name.how != "at use" and not _exists(name):
            raise incompatible(name)


def require_attributes(names: Iterable[PrivateName], holder: object) -> None:
    """Check that `holder`, an object of another package, has `names`, which are checked at use.

    Raises:
        IncompatibleError: Naming the first that is missing.
    """
    for name in names:
        if not hasattr(holder, name.name):
            raise incompatible(name)


def incompatible(name: PrivateName) -> IncompatibleError:
    """Return (not raise) the error of a name that is missing."""
    where = name.where if name.how == "at use" else name.where.replace(":", ".")
    return IncompatibleError(
        f"{name.package} {_installed(name.package)}: {where} has no {name.name!r}, which AROMA needs to {name.use}; "
        f"install a version that works: {_requirement(name.package)}"
    )


def _exists(name: PrivateName) -> bool:
    holder = _find(name.where)
    if holder is None:
        return False
    if name.how == "instance":
        return hasattr(holder(), name.name)
    if name.how == "read by":
        return _mentions(inspect.unwrap(holder).__code__, name.name)
    return hasattr(holder, name.name)


def _find(where: str) -> Any:
    """Return the module, class or function at an import path; None if there is none."""
    module, _, path = where.partition(":")
    try:
        found: Any = import_module(module)
    except ImportError:
        return None
    for part in path.split(".") if path else ():
        found = getattr(found, part, None)
    return found


def _mentions(code: CodeType, name: str) -> bool:
    return name in code.co_names or any(constant == name for constant in code.co_consts)


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


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
    """Return the module inside of one that `torch.compile` returned; None for any other module.

    Raises:
        IncompatibleError: torch.compile returned `model`, but keeps the module elsewhere.
    """
    inner = model._modules.get("_orig_mod")
    if inner is None and type(model).__name__ == "OptimizedModule":
        raise incompatible(next(name for name in TUNER_NAMES if name.name == "_orig_mod"))
    return inner


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


def averaged_by_ddp(wrapper: nn.parallel.DistributedDataParallel) -> list[Tensor]:
    """Return the parameters (any shapes) whose gradients DistributedDataParallel averages: those that trained then."""
    buckets = wrapper.reducer._get_zeros_like_grad_buckets()
    return [parameter for bucket in buckets for parameter in bucket.parameters()]


def waits_for_all(wrapper: nn.parallel.DistributedDataParallel) -> bool:
    """Whether DistributedDataParallel waits in every backward for the gradients of all that it averages."""
    return not (wrapper.find_unused_parameters or wrapper.static_graph)


def is_joined(wrapper: object) -> bool:
    """Whether a DistributedDataParallel model is in its `join` context."""
    join = getattr(wrapper, "_join_config", None)
    return join is not None and bool(join.enable)


def report_rates(scheduler: object, rates: list[float]) -> None:
    """Let `scheduler`, if it is one of torch's, report `rates` as the last ones it set."""
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = rates


def execution_device(module: nn.Module) -> torch.device:
    """Return where accelerate lets a module compute whose weights it has offloaded."""
    hook: Any = module._hf_hook
    return torch.device(hook.execution_device)


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
