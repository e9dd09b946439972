"""Trainings of several processes, of which one is killed: right after a step, or at a file operation of a save.

The others must end by themselves, each with one error. The next run must go on from the last whole checkpoint and end
as the uninterrupted one did, bit for bit. ZeRO needs DeepSpeed: AROMA_DEEPSPEED is the folder that holds it.

All processes are forked from one that has imported everything, and the uninterrupted run is done once for each way and
number of processes. It counts the file operations of every process in every save; the moments are drawn from those.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
from ranks import Ended, deepspeed_environment, forking, run_ranks
from sharded_runs import FSDP2, make_accelerate_shard_on_cpu
from trainer_runs import assert_same, die, steps_of

WAYS = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")
STEPS, SAVE_STEPS = 9, 3
GRACE = 100
"""Seconds within which all ranks end after one has died; collectives wait for 60."""
METHOD = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.1, "inner_criterion": "update_change"}
FINE = ("equal", "outlived")
"""Outcomes that are no failure. A process that dies too late for the others to notice is outlived."""


@dataclass(frozen=True)
class Moment:
    """When a rank dies: at the k-th file operation from the end of a step on, or at once for k = 0."""

    rank: int
    step: int
    k: int

    @classmethod
    def drawn(cls, rng: random.Random, operations: list[dict[str, int]]) -> Moment:
        """Draw one; `operations` are those of every rank in the save after every step."""
        rank = rng.randrange(len(operations))
        if rng.random() < 0.3:
            return cls(rank, rng.randint(1, STEPS), 0)
        step = rng.choice(sorted(operations[rank]))
        return cls(rank, int(step), rng.randint(1, operations[rank][step]))

    def could_go_on_from(self) -> set[int]:
        """The steps whose checkpoint may be the last whole one; 0 is a run that begins anew."""
        before = (self.step - 1) // SAVE_STEPS * SAVE_STEPS
        return {before, self.step} if self.k else {before}


# One rank ------------------------------------------------------------------------------------------------------------


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


def train(folder: Path, way: str, moment: str) -> None:
    """Be one rank, which begins or goes on in `folder`/run, and is killed at `moment` if one is given."""
    rank, out = rank_of_launch(), folder / "run"
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


# Killing and comparing -----------------------------------------------------------------------------------------------


class Killing:
    """The runs of one way to share the work, with one number of processes.

    Args:
        scratch: A folder.
        way: One of WAYS.
        processes: How many there are.
    """

    def __init__(self, scratch: Path, way: str, processes: int) -> None:
        self.scratch, self.way, self.processes = scratch, way, processes
        self.whole = scratch / f"{way}-{processes}-whole"
        ended = self._launch(self.whole)
        assert not any(ended.codes), self._said(self.whole, 0)
        self.operations = [told["operations"] for told in self._told(self.whole)]

    def moments(self, seed: int) -> Iterator[Moment]:
        rng = random.Random(f"{seed} {self.way} {self.processes}")
        while True:
            yield Moment.drawn(rng, self.operations)

    def kill(self, moment: Moment) -> dict[str, Any]:
        """Kill a rank, and let the next run go on; return what happened."""
        folder = self.scratch / f"{self.way}-{self.processes}"
        shutil.rmtree(folder, ignore_errors=True)
        ended = self._launch(folder, moment)
        told = {**asdict(moment), "codes": ended.codes, "seconds": round(ended.seconds, 1)}
        if not any(ended.codes):
            return {**told, "outcome": "outlived"}
        others = [rank for rank in range(self.processes) if rank != moment.rank]
        said = {rank: self._said(folder, rank) for rank in others}
        told["errors"] = sorted({text.strip().splitlines()[-1] for text in said.values() if text.strip()})
        if ended.codes[moment.rank] != -9 or any(ended.codes[rank] in (0, -9) for rank in others):
            return {**told, "outcome": "others did not end by themselves"}
        if any(ended.codes[rank] != 1 or said[rank].count("Traceback (most") != 1 for rank in others):
            return {**told, "outcome": "others did not end with one error", "said": said}
        return {**told, **self._resumed(folder, moment)}

    def _resumed(self, folder: Path, moment: Moment) -> dict[str, Any]:
        again = self._launch(folder)
        if any(again.codes):
            said = [self._said(folder, rank)[-4000:] for rank in range(self.processes)]
            return {"outcome": f"could not go on: {again.codes}", "said": said}
        began = {told["began at"] for told in self._told(folder)}
        told = {"began at": sorted(began)}
        if len(began) != 1 or not began <= moment.could_go_on_from():
            return {**told, "outcome": "went on from another checkpoint"}
        difference = differing(folder / "run", self.whole / "run")
        return {**told, "outcome": f"silently wrong: {difference}" if difference else "equal"}

    def _launch(self, folder: Path, moment: Moment | None = None) -> Ended:
        folder.mkdir(exist_ok=True)
        asked = json.dumps(asdict(moment)) if moment else ""
        context = forking("warm")
        return run_ranks(context, self.processes, __file__, "train", str(folder), self.way, asked, grace=GRACE)

    def _said(self, folder: Path, rank: int) -> str:
        return (folder / f"said-{rank}.txt").read_text()

    def _told(self, folder: Path) -> list[dict[str, Any]]:
        return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(self.processes)]


def differing(one: Path, other: Path) -> str:
    """Return where the last checkpoints of two runs differ, in what is of the training; empty where they are equal."""
    first, second = folders = [folder / f"checkpoint-{STEPS}" for folder in (one, other)]
    names, others = (set(verify_checkpoint(folder)["files"]) - {"trainer_state.json"} for folder in folders)
    if names != others:
        return f"files {sorted(names ^ others)}"
    try:
        assert_same(*map(settled, folders), "trainer_state.json")
        for name in sorted(names - {"training_args.bin"}):  # which says where and when, too
            if (first / name).read_bytes() == (second / name).read_bytes():
                continue
            if (first / name).suffix not in (".pt", ".pth", ".bin"):
                return name
            assert_same(*(torch.load(folder / name, weights_only=False) for folder in folders), name)
    except AssertionError as error:
        return str(error)
    return ""


def settled(checkpoint: Path) -> list[Any]:
    """What trainer_state.json says without times of day and durations."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [state["global_step"], state["epoch"], steps_of(state["log_history"]), state["stateful_callbacks"]]


Asked = Sequence[tuple[str, int, Sequence[int]]]
"""Ways, each with a number of processes, and the numbers of the moments."""


def kills(asked: Asked, seed: int) -> Iterator[dict[str, Any]]:
    """Kill ranks at moments of a seed; yield what happened at each, as soon as it is known."""
    zero = [(way, processes, numbers) for way, processes, numbers in asked if way.startswith("ZeRO")]
    for part in ([each for each in asked if each not in zero], zero):
        if part:
            yield from _kills(part, seed, deepspeed_environment() if part is zero else {})


def _kills(asked: Asked, seed: int, found: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Do so in a process of its own, which has a library loaded that counts what its children do to files."""
    with tempfile.TemporaryDirectory() as scratch:
        shim = library(Path(scratch))
        with subprocess.Popen(
            [sys.executable, __file__, "kill", scratch, str(seed), json.dumps(asked)],
            env={**os.environ, **found, "LD_PRELOAD": str(shim)},
            stdout=subprocess.PIPE,
            text=True,
        ) as running:
            assert running.stdout is not None
            for line in running.stdout:
                yield json.loads(line)
        assert running.returncode == 0, f"exit code {running.returncode}"


def main(scratch: str, seed: str, asked: str) -> None:
    for way, processes, numbers in json.loads(asked):
        killing = Killing(Path(scratch), way, processes)
        for number, moment in zip(range(max(numbers) + 1), killing.moments(int(seed)), strict=False):
            if number in numbers:
                told = {"way": way, "processes": processes, "seed": int(seed), "number": number}
                print(json.dumps({**told, **killing.kill(moment)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        torch.set_num_threads(1)
        train(Path(sys.argv[2]), *sys.argv[3:])
        if dist.is_initialized():
            dist.destroy_process_group()
    else:
        main(*sys.argv[2:])
