"""Several processes, behind one protocol: replicas (DDP), FSDP2 and DeepSpeed's ZeRO."""

from .fsdp2 import sharding_modules
from .processes import (
    agree,
    is_distributed,
    is_zero,
    of_first_rank,
    processes_of_node,
    refuse_changed_processes,
    refuse_together,
    require_equal_replicas,
    unwrapped,
    unwrapped_optimizer,
    world_size,
)
from .protocol import (
    FSDP2,
    REPLICAS,
    ZERO,
    Handle,
    Sharding,
    gathered,
    is_sharded,
    own_entries,
    refuse_missing_pairs,
    refuse_sharding,
    shard_like,
    sharded_matrix,
    sharding_facts,
    sharding_of,
    sharding_of_model,
    summed,
    write,
)
from .replicas import Entries, Factors, OptimizerState
from .zero import Partition, StepHooks, is_flattened, is_partitioned

# Names that the layer still uses; each goes with its last caller.
local = FSDP2.own_entries
partition_of = ZERO.matrix


__all__ = [
    "FSDP2",
    "REPLICAS",
    "ZERO",
    "Entries",
    "Factors",
    "Handle",
    "OptimizerState",
    "Partition",
    "Sharding",
    "StepHooks",
    "agree",
    "gathered",
    "is_distributed",
    "is_flattened",
    "is_partitioned",
    "is_sharded",
    "is_zero",
    "local",
    "of_first_rank",
    "own_entries",
    "partition_of",
    "processes_of_node",
    "refuse_changed_processes",
    "refuse_missing_pairs",
    "refuse_sharding",
    "refuse_together",
    "require_equal_replicas",
    "shard_like",
    "sharded_matrix",
    "sharding_facts",
    "sharding_modules",
    "sharding_of",
    "sharding_of_model",
    "summed",
    "unwrapped",
    "unwrapped_optimizer",
    "world_size",
    "write",
]
