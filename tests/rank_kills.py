"""Trainings of several processes, of which one is killed at a step or at a file operation of a save.

The others must end by themselves, with an error, and the next run must go on from the last whole checkpoint and end as
the uninterrupted one did. ZeRO needs DeepSpeed: AROMA_DEEPSPEED is the folder that holds it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

import distributed_runs
from aroma import last_complete_checkpoint
from aroma.checkpoint import verify_checkpoint
from distributed_runs import ManyRun, rank_of_launch
from kills import library, strike_at
from ranks import deepspeed_environment, forking, run_ranks
from sharded_runs import FSDP2, make_accelerate_shard_on_cpu
from trainer_runs import assert_same, die

WAYS = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")
STEPS, SAVE_STEPS = 9, 3
GRACE = 100
"""Seconds within which all ranks end after one has died; collectives wait for 60."""
METHOD = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.1, "inner_criterion": "update_change"}


@dataclass(frozen=True)
class Moment:
    """When a rank dies: at the k-th file operation from the end of a step on, or at once for k = 0."""

    rank: int
    step: int
    k: int

    @classmethod
    def drawn(cls, rng: random.Random, processes: int) -> Moment:
        rank = rng.randrange(processes)
        # Rank 0 writes most; the others their random numbers, and shards.
        if rng.random() < 0.3:
            return cls(rank, rng.randint(1, STEPS), 0)
        return cls(rank, rng.choice([3, 6, 9]), rng.randint(1, 60 if rank == 0 else 2))


class Strike(TrainerCallback):
    def __init__(self, moment: Moment, out: Path) -> None:
        self.moment, self.out = moment, out

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.moment.step and rank_of_launch() == self.moment.rank:
            if self.moment.k == 0:
                die()
            strike_at(self.moment.k, self.out.absolute())


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


def train(out: Path, way: str, moment: str) -> None:
    """Be one rank, which begins or goes on."""
    if way == "FSDP2":
        make_accelerate_shard_on_cpu()
    run = ManyRun(steps=STEPS, method=METHOD, training=options(way), early_stop=False)
    callbacks = (Strike(Moment(**json.loads(moment)), out),) if moment else ()
    distributed_runs.train(out, run, last_complete_checkpoint(out), callbacks)


# Killing and comparing -----------------------------------------------------------------------------------------------


def kill(scratch: Path, way: str, processes: int, moments: list[Moment]) -> list[dict[str, Any]]:
    """Kill a rank at every moment, and resume; return what happened."""
    context = forking("rank_kills")
    whole = scratch / f"{way}-{processes}"

    def launched(out: Path, moment: Moment | None = None) -> list[int]:
        asked = json.dumps(moment.__dict__) if moment else ""
        said, codes = run_ranks(context, processes, __file__, "train", str(out), way, asked, grace=GRACE)
        (out / "said.txt").write_text(said)
        return codes

    codes = launched(whole)
    assert not any(codes), (whole / "said.txt").read_text()[-4000:]
    told = []
    for number, moment in enumerate(moments):
        out = scratch / f"{way}-{processes}-{number}"
        codes = launched(out, moment)
        entry: dict[str, Any] = {**moment.__dict__, "way": way, "processes": processes, "codes": codes}
        if not any(codes):
            told.append({**entry, "outcome": "outlived"})
            continue
        entry["went on from"] = str(last_complete_checkpoint(out))[-12:]
        if sorted(codes)[0] != -9 or any(code in (0, -9) for who, code in enumerate(codes) if who != moment.rank):
            outcome = "others did not end by themselves"
        elif any(again := launched(out)):
            outcome = f"could not go on: {again}"
        else:
            outcome = "equal" if is_same(out, whole) else "silently wrong"
        told.append({**entry, "outcome": outcome})
        if outcome == "equal":
            shutil.rmtree(out)
    return told


def is_same(one: Path, other: Path) -> bool:
    """Whether the last checkpoints of two runs are equal, bit for bit, in what is of the training."""
    first, second = (folder / f"checkpoint-{STEPS}" for folder in (one, other))
    names, others = (set(verify_checkpoint(folder)["files"]) for folder in (first, second))
    if names != others:
        return False
    # These say where and when, too.
    for name in names - {"trainer_state.json", "training_args.bin"}:
        if (first / name).read_bytes() != (second / name).read_bytes():
            if (first / name).suffix not in (".pt", ".pth", ".bin"):
                return False
            try:
                assert_same(*(torch.load(folder / name, weights_only=False) for folder in (first, second)), name)
            except AssertionError as error:
                print(error, file=sys.stderr)
                return False
    return True


def kills(ways: list[str], processes: list[int], seed: int, moments: int) -> list[dict[str, Any]]:
    """Kill ranks of every way at so many moments, in a process whose children count their file operations."""
    with tempfile.TemporaryDirectory() as scratch:
        shim = library(Path(scratch))
        found = deepspeed_environment() if any(way.startswith("ZeRO") for way in ways) else {}
        done = subprocess.run(
            [sys.executable, __file__, "kill", scratch, json.dumps([ways, processes, seed, moments])],
            env={**os.environ, **found, "LD_PRELOAD": str(shim)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    told: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return told


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        torch.set_num_threads(1)
        train(Path(sys.argv[2]), *sys.argv[3:])
        if dist.is_initialized():
            dist.destroy_process_group()
    else:
        all_ways, counts, seed, moments = json.loads(sys.argv[3])
        told = []
        for way in all_ways:
            for count in counts:
                rng = random.Random(f"{seed} {way} {count}")
                drawn = [Moment.drawn(rng, count) for _ in range(moments)]
                told += kill(Path(sys.argv[2]), way, count, drawn)
                print(way, count, Counter(entry["outcome"] for entry in told), file=sys.stderr, flush=True)
        print(json.dumps(told))
