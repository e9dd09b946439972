"""One process of the trainings of `rank_kills`: it trains until it is killed, goes on, or compares two runs.

The process from which all of them are forked imports this too, and with it what each would make anew. Nothing of that
starts a thread, a process group or accelerate's state, which would not survive a fork.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

import distributed_runs
from aroma import last_complete_checkpoint
from aroma.checkpoint import verify_checkpoint
from aroma.tuner import dropout
from distributed_runs import ManyRun, rank_of_launch
from kills import strike_at
from rank_kills import SAVE_STEPS, STEPS, Moment
from sharded_runs import FSDP2, make_accelerate_shard_on_cpu
from trainer_runs import adapted, assert_same, die, steps_of

METHOD: dict[str, Any] = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.1, "inner_criterion": "update_change"}


class Strike(TrainerCallback):
    """Kills this process at its moment."""

    def __init__(self, moment: Moment, out: Path) -> None:
        self.moment, self.out = moment, out

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.moment.step and rank_of_launch() == self.moment.rank:
            if self.moment.k == 0:
                die()
            strike_at(self.moment.k, self.out)


class Count(TrainerCallback):
    """Counts the file operations from the end of a step to that of its save."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.operations: dict[int, int] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        strike_at(0, self.out)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.operations[state.global_step] = ctypes.CDLL(None).operations()


def options(way: str) -> dict[str, Any]:
    """TrainingArguments of one way to share the work."""
    several: dict[str, Any] = {"save_steps": SAVE_STEPS, "per_device_train_batch_size": 4, "save_total_limit": 2}
    if way == "FSDP2":
        return {**several, "fsdp": True, "fsdp_config": FSDP2}
    if way.startswith("ZeRO"):
        from zero_runs import zero

        config = zero(int(way[-1]), zero_stage3_gather_16bit_weights_on_model_save=True)
        auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
        return {**several, "deepspeed": {**config, **auto, "gradient_clipping": "auto"}}
    return several


def train(place: str, way: str, moment: str) -> None:
    """Begin or go on in `place`/run, until it is killed at `moment` if one is given."""
    folder, rank = Path(place), rank_of_launch()
    out = folder / "run"
    said = os.open(folder / f"said-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if way == "FSDP2":
        make_accelerate_shard_on_cpu()
    count = Count(out)
    callbacks = (Strike(Moment(**json.loads(moment)), out),) if moment else (count,)
    found = last_complete_checkpoint(out)
    distributed_runs.train(out, ManyRun(STEPS, METHOD, options(way), early_stop=False), found, callbacks)
    told = {"operations": count.operations, "began at": int(found.rsplit("-", 1)[1]) if found else 0}
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def compare(one: str, other: str) -> None:
    """Compare the last checkpoints of two runs, bit for bit, in what is of the training.

    Raises:
        AssertionError: Where they differ.
    """
    first, second = folders = [Path(place, "run", f"checkpoint-{STEPS}") for place in (one, other)]
    # A kill after the Trainer's last file leaves it out of the record.
    names, others = (set(verify_checkpoint(folder)["files"]) - {"trainer_state.json"} for folder in folders)
    assert names == others, f"files {sorted(names ^ others)}"
    assert_same(*map(untimed, folders), "trainer_state.json")
    for name in sorted(names - {"training_args.bin"}):  # which says where and when, too
        if (first / name).read_bytes() != (second / name).read_bytes():
            assert (first / name).suffix in (".pt", ".pth", ".bin"), name
            assert_same(*(plain(opened(folder, name)) for folder in folders), name)


def opened(checkpoint: Path, name: str) -> Any:
    """What torch saved in a file; where ZeRO-3 pads parameters, it leaves what the memory held, which becomes 0."""
    content = torch.load(checkpoint / name, weights_only=False)
    groups = content.get("optimizer_state_dict", {}).get("fp32_flat_groups") if "optim_states" in name else None
    if groups is not None:
        beside = (checkpoint / name).with_name(Path(name).name.replace("optim_states", "model_states"))
        rank, size = int(name.split("_rank_")[1].split("_")[0]), len([*beside.parent.glob("*optim_states.pt")])
        shapes = torch.load(beside, weights_only=False)["param_shapes"]
        for group, shapes_of_group in zip(groups, shapes, strict=True):
            end = 0
            for shape in shapes_of_group.values():
                part = -(-shape.numel() // size)
                own = min(part, max(0, shape.numel() - rank * part))
                group.data[end + own : end + part] = 0
                end += part
            assert end == len(group)
    return content


def plain(value: Any) -> Any:
    """`value` with what an object holds in place of the object, which equals only itself: DeepSpeed's loss scaler."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    alone = type(value).__eq__ is object.__eq__
    return [type(value).__name__, plain(vars(value))] if alone and hasattr(value, "__dict__") else value


def untimed(checkpoint: Path) -> list[Any]:
    """What trainer_state.json says without times of day and durations."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [state["global_step"], state["epoch"], steps_of(state["log_history"]), state["stateful_callbacks"]]


def warm() -> None:
    """Make what every process would."""
    torch.set_num_threads(1)
    adapted(**METHOD)
    dropout._banks(METHOD["lora_dropout"], torch.device("cpu"))
    if "DS_ACCELERATOR" in os.environ:
        import zero_runs  # noqa: F401


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"train": train, "compare": compare}[sys.argv[1]](*sys.argv[2:])
else:
    warm()
