"""What a controller refuses, and what it says then. Nothing is changed by a look."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .errors import bad_value
from .sharding import is_flattened, is_zero, unwrapped_optimizer, world_size
from .target import TargetModule


def refuse_missing_pairs(optimizer: Any, modules: Iterable[TargetModule]) -> None:
    """Refuse an optimizer without the pair of a module that trains.

    Raises:
        ConfigError: Naming the first such module.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    flat = is_zero(unwrapped_optimizer(optimizer))
    for module in modules:
        if not all(id(parameter) in held or (flat and is_flattened(parameter)) for parameter in module.pair):
            raise bad_value(
                "optimizer",
                type(optimizer).__name__,
                f"it does not hold the trainable pair of {module.name!r}, so that module would never learn; make the "
                "optimizer after get_peft_model and, if you use it, fully_shard, over every parameter that requires a "
                "gradient",
            )


def refuse_other_modules(names: Sequence[str], saved: Sequence[str]) -> None:
    """Refuse a checkpoint that grows other modules, or the same in another order.

    Raises:
        ConfigError: Naming the first that differs.
    """
    if [*names] == [*saved]:
        return
    differing = sorted(set(names) ^ set(saved)) or names
    raise bad_value(
        "target_modules",
        differing[0],
        f"the checkpoint grows {len(saved)} modules and this model {len(names)}, and they differ in "
        f"{len(differing)}; make the adapter with the target_modules of the checkpoint",
    )


def refuse_changed_processes(processes: int, wrapper: Any) -> None:
    """Refuse to go on when processes have joined since the controller was made, or one may leave by itself.

    Args:
        processes: How many there were.
        wrapper: What the model is wrapped in, or None.

    Raises:
        ConfigError: Naming `world_size` or `join`.
    """
    if world_size() != processes:
        raise bad_value(
            "world_size",
            world_size(),
            f"the controller was made when it was {processes}; make it after init_process_group, when the model is "
            "wrapped in DistributedDataParallel or sharded by fully_shard",
        )
    join = getattr(wrapper, "_join_config", None)
    if join is not None and join.enable:
        raise bad_value(
            "join",
            True,
            "a rank whose data have run out would take no part in the checks of the others; leave the join context, "
            "and give all ranks equally many batches (DistributedSampler, accelerate and the Trainer do)",
        )
