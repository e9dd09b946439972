"""Trainings of several processes, of which one is killed: right after a step, or at a file operation of a save.

The others must end by themselves, each with one error. The next run must go on from the last whole checkpoint and end
as the uninterrupted one did, bit for bit. ZeRO needs DeepSpeed: AROMA_DEEPSPEED is the folder that holds it.

All processes are forked from one that has imported everything, and the uninterrupted run is done once for each way and
number of processes. It counts the file operations of every process in every save; the moments are drawn from those.
"""

from __future__ import annotations

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

from kills import library
from ranks import TESTS, Ended, deepspeed_environment, forking, run_ranks

WAYS = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")
STEPS, SAVE_STEPS = 9, 3
GRACE = 100
"""Seconds within which all ranks end after one has died; collectives wait for 60."""
RANK = str(TESTS / "killed_rank.py")


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
        compared = run_ranks(forking("killed_rank"), 1, RANK, "compare", str(folder), str(self.whole))
        if any(compared.codes):
            return {**told, "outcome": f"silently wrong: {compared.said.strip().splitlines()[-1]}"}
        return {**told, "outcome": "equal"}

    def _launch(self, folder: Path, moment: Moment | None = None) -> Ended:
        folder.mkdir(exist_ok=True)
        asked = json.dumps(asdict(moment)) if moment else ""
        context = forking("killed_rank")
        return run_ranks(context, self.processes, RANK, "train", str(folder), self.way, asked, grace=GRACE)

    def _said(self, folder: Path, rank: int) -> str:
        return (folder / f"said-{rank}.txt").read_text()

    def _told(self, folder: Path) -> list[dict[str, Any]]:
        return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(self.processes)]


Asked = Sequence[tuple[str, int, Sequence[int]]]
"""Ways, each with a number of processes, and the numbers of the moments."""


def kills(asked: Asked, seed: int) -> Iterator[dict[str, Any]]:
    """Kill ranks at moments of a seed; yield what happened at each, as soon as it is known.

    That is done in a process of its own, which has a library loaded that counts what its children do to files.
    """
    found = deepspeed_environment() if any(way.startswith("ZeRO") for way, _, _ in asked) else {}
    with tempfile.TemporaryDirectory() as scratch:
        shim = library(Path(scratch))
        with subprocess.Popen(
            [sys.executable, __file__, scratch, str(seed), json.dumps(asked)],
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
    main(*sys.argv[1:])
