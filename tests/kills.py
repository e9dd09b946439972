"""Saves that are killed, or whose disk fails, at any operation on a file.

Every strike has a process of its own, forked in front of the save. `kill_at.c`, which a C compiler makes into a
library, counts the operations of the whole process, those of torch and safetensors included.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent

ADAPTERS = {
    "save_adapter into a new folder": {"old": False},
    "save_adapter over an adapter": {},
    "save_adapter over an adapter, in a folder with folders": {"folders": True},
    "save_adapter over an adapter, without renameat2": {"exchange": False},
}
CHECKPOINTS = {
    "the Trainer's checkpoint": {},
    "the Trainer's checkpoint, save_total_limit=1": {"save_total_limit": 1},
}
HOW = {"killed": 0, "failed": errno.EIO}
"""How the operation ends: SIGKILL, or an error of the disk."""


def library(folder: Path) -> Path:
    """Compile `kill_at.c` into `folder`."""
    made = folder / "kill_at.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(made), str(TESTS / "kill_at.c"), "-ldl"], check=True)
    return made


def strikes(
    kinds: Iterable[str], seed: int = 0, count: int | None = None, every: int = 1
) -> dict[str, list[dict[str, Any]]]:
    """Strike saves in a process of its own; return what each strike left, by kind of save.

    Args:
        kinds: Of ADAPTERS and CHECKPOINTS.
        seed: Chooses the operations.
        count: Strikes of each kind; None for all of them.
        every: Strike at every so many-th operation, counted from the last.
    """
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [sys.executable, __file__, json.dumps([*kinds]), str(seed), str(count or 0), str(every), scratch],
            env={**os.environ, "LD_PRELOAD": str(library(Path(scratch))), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=900,
        )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    told: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return told


# In the process that is preloaded ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Which operations are struck, and how."""

    seed: int
    count: int
    every: int

    def of(self, operations: int) -> list[tuple[int, str]]:
        everything = [(k, how) for k in reversed(range(operations, 0, -self.every)) for how in HOW]
        return random.Random(self.seed).sample(everything, min(self.count or len(everything), len(everything)))


def in_a_child(work: Callable[[], Any], folder: Path, k: int, how: str = "killed") -> str:
    """Do `work` in a forked process that is struck at its k-th operation below `folder`; return how it ended."""
    child = os.fork()
    if child == 0:
        try:
            strike_at(k, folder, HOW[how])
            work()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode()[:500])
            os._exit(3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return {0: "went on", 3: "raised"}[os.WEXITSTATUS(status)]


def strike_at(k: int, folder: Path, error: int = 0) -> None:
    ctypes.CDLL(None).strike_at(ctypes.c_long(k), os.fsencode(folder), ctypes.c_int(error))


def operations_of(work: Callable[[], Any], folder: Path) -> int:
    """Return how many operations below `folder` the work takes."""
    counter = folder.parent / "counter"

    def count() -> None:
        work()
        counter.write_text(str(ctypes.CDLL(None).operations()))

    assert in_a_child(count, folder, 0) == "went on"
    return int(counter.read_text())


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return the bytes of every file; None for a folder."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return {name: (folder / name).read_bytes() if (folder / name).is_file() else None for name in names}


def strike_adapters(kind: str, choice: Choice, scratch: Path) -> list[dict[str, Any]]:
    import aroma.folders
    from aroma import save_adapter, verify_adapter
    from models import adapted, batch, grow, train

    options = ADAPTERS[kind]
    exchange = aroma.folders._exchange
    if not options.get("exchange", True):
        aroma.folders._exchange = lambda *_: False
    model = adapted("bert", lora_alpha=3)
    growth, _ = grow(model, batch("bert"), 10, total_steps=20)
    (scratch / "work").mkdir()
    place, old = scratch / "work" / "adapter", scratch / "old"
    if options.get("old", True):
        save_adapter(model, old)
        (old / "notes.txt").write_text("the user's")
        if options.get("folders"):
            (old / "checkpoint-3").mkdir()
    growth.controller.outer_step()  # without tensors of its own, unlike the old one
    train(model, batch("bert"), growth.controller.optimizer, 1)

    def begin() -> None:
        shutil.rmtree(scratch / "work")
        (scratch / "work").mkdir()
        if old.exists():
            shutil.copytree(old, place)

    def save() -> None:
        save_adapter(model, place)

    before = contents(old)
    begin()
    operations = operations_of(save, scratch / "work")
    after = contents(place)
    assert before.keys() - after.keys() <= {"aroma_state.safetensors"}
    told = []
    for k, how in choice.of(operations):
        begin()
        ended = in_a_child(save, scratch / "work", k, how)
        raw = contents(place)
        if place.exists():
            verify_adapter(place)
        left = contents(place)
        state = {True: "neither"} | {left == before: "old"} | {left == after: "new"}
        save()
        told.append(
            {
                "k": k,
                "of": operations,
                "how": how,
                "ended": ended,
                "left": state[True],
                "raw": "whole" if raw in (before, after) else "mixed",
                "next save": contents(place) == after and os.listdir(scratch / "work") == ["adapter"],
            }
        )
    aroma.folders._exchange = exchange
    return told


def strike_checkpoints(kind: str, choice: Choice, scratch: Path) -> list[dict[str, Any]]:
    from transformers import TrainerCallback

    from aroma import last_complete_checkpoint
    from trainer_runs import Run, assert_same, on_disk, train

    out, kept, told = scratch / "work", scratch / "kept", []

    class Done(Exception):
        """Ends the training."""

    class Strikes(TrainerCallback):
        """At step 6, before its save, forks a process for every strike; each ends after the save at the latest."""

        def __init__(self) -> None:
            self.is_child = False

        def on_save(self, *_: Any, **__: Any) -> None:
            if self.is_child:
                raise Done

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step != 6:
                return
            shutil.copytree(out, kept)
            counter = scratch / "counter"
            if (ended := self.child(0, "killed", counter)) is None:
                return
            assert ended == "went on"
            operations = int(counter.read_text())
            expected = {6: on_disk(scratch / "whole" / "checkpoint-6"), 3: on_disk(kept / "checkpoint-3")}
            for k, how in choice.of(operations):
                ended = self.child(k, how, None)
                if ended is None:
                    return
                whole = last_complete_checkpoint(out)
                step = int(str(whole).rsplit("-", 1)[1]) if whole else None
                if step:
                    assert_same(on_disk(Path(str(whole))), expected[step])
                entry = {"k": k, "of": operations, "how": how, "ended": ended}
                told.append({**entry, "left": {3: "old", 6: "new", None: "neither"}[step]})
            raise Done

        def child(self, k: int, how: str, counter: Path | None) -> str | None:
            """Fork; None in the child, which goes on with its save."""
            shutil.rmtree(out)
            shutil.copytree(kept, out)
            if (child := os.fork()) == 0:
                self.is_child = True
                self.counter = counter
                strike_at(k, out, HOW[how])
                return None
            status = os.waitpid(child, 0)[1]
            if counter is not None:
                shutil.copytree(out, scratch / "whole")
            if os.WIFSIGNALED(status):
                return signal.Signals(os.WTERMSIG(status)).name
            return {0: "went on", 3: "raised"}[os.WEXITSTATUS(status)]

    strikes = Strikes()
    try:
        train(out, Run(steps=9, training={"save_steps": 3, **CHECKPOINTS[kind]}), callbacks=(strikes,))
    except Done:
        assert told or strikes.is_child
    except BaseException as error:
        if not strikes.is_child:
            raise
        os.write(2, f"{type(error).__name__}: {error}\n".encode()[:500])
        os._exit(3)
    if strikes.is_child:
        if strikes.counter is not None:
            operations = ctypes.CDLL(None).operations()
            strike_at(0, scratch / "none")
            strikes.counter.write_text(str(operations))
        os._exit(0)
    return told


def main(kinds: str, seed: str, count: str, every: str, scratch: str) -> None:
    choice, told = Choice(int(seed), int(count), int(every)), {}
    for number, kind in enumerate(json.loads(kinds)):
        work = strike_adapters if kind in ADAPTERS else strike_checkpoints
        folder = Path(scratch) / str(number)
        folder.mkdir()
        told[kind] = work(kind, choice, folder)
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
