"""Saves that are killed, or whose disk fails, at any operation on a file.

Every strike has a process of its own, forked in front of the save. `kill_at.c`, which a C compiler makes into a
library, counts the operations of the whole process, those of torch and safetensors included.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ADAPTERS = ("save_adapter into a new folder", "save_adapter over an adapter")
CHECKPOINT = "the Trainer's checkpoint"
HOW = {"killed": 0, "failed": errno.EIO}
"""How the operation ends: SIGKILL, or an error of the disk."""


def library(folder: Path) -> Path:
    """Compile `kill_at.c` into `folder`."""
    made = folder / "kill_at.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(made), str(TESTS / "kill_at.c"), "-ldl"], check=True)
    return made


def strikes(kind: str, every: int) -> list[dict[str, Any]]:
    """Strike saves of a kind in a process of its own, at every so many-th operation, counted from the last one."""
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [sys.executable, __file__, kind, str(every), scratch],
            env={**os.environ, "LD_PRELOAD": str(library(Path(scratch))), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=900,
        )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    told: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return told


# In the process that is preloaded ------------------------------------------------------------------------------------


def strike_at(k: int, folder: Path, error: int = 0) -> None:
    ctypes.CDLL(None).strike_at(ctypes.c_long(k), os.fsencode(folder), ctypes.c_int(error))


def in_a_child(work: Callable[[], Any], folder: Path, k: int, how: str = "killed") -> str:
    """Do `work` in a forked process that is struck at its k-th operation below `folder`; return how it ended."""
    child = os.fork()
    if child == 0:
        try:
            strike_at(k, folder, HOW[how])
            work()
            if k == 0:
                operations = ctypes.CDLL(None).operations()
                strike_at(0, folder / "none")
                (folder.parent / "operations").write_text(str(operations))
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode()[:500])
            os._exit(3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else {0: "went on", 3: "raised"}[os.WEXITSTATUS(status)]


def struck(
    begin: Callable[[], Any], save: Callable[[], Any], left: Callable[[], str], folder: Path, every: int
) -> list[dict[str, Any]]:
    """Begin anew and strike the save, again and again; return how each ended and what it left."""
    operations, told = int((folder.parent / "operations").read_text()), []
    for k in range(operations, 0, -every):
        for how in HOW:
            begin()
            ended = in_a_child(save, folder, k, how)
            told.append({"k": k, "of": operations, "how": how, "ended": ended, "left": left()})
    return told


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return the bytes of every file; None for a folder."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return {name: (folder / name).read_bytes() if (folder / name).is_file() else None for name in names}


def strike_adapters(kind: str, every: int, scratch: Path) -> list[dict[str, Any]]:
    from aroma import save_adapter, verify_adapter
    from aroma.errors import CheckpointError
    from models import adapted, batch, grow, train

    model = adapted("bert", lora_alpha=3)
    growth, _ = grow(model, batch("bert"), 10, total_steps=20)
    place, old = scratch / "work" / "adapter", scratch / "old"
    old.mkdir()
    if kind == "save_adapter over an adapter":
        save_adapter(model, old)
        (old / "notes.txt").write_text("the user's")
        (old / "checkpoint-3").mkdir()
    growth.controller.outer_step()  # without tensors of its own, unlike the old one
    train(model, batch("bert"), growth.controller.optimizer, 1)

    def begin() -> None:
        shutil.rmtree(scratch / "work", ignore_errors=True)
        shutil.copytree(old, place)

    def save() -> None:
        save_adapter(model, place)

    def left() -> str:
        try:
            verify_adapter(place)
        except CheckpointError:
            arriving = place / ".aroma-arriving"
            if not arriving.is_dir():
                assert not contents(old), "there was none before"
            else:  # as the error says
                for file in arriving.iterdir():
                    file.rename(place / file.name)
                arriving.rmdir()
        found = contents(place)
        found = {name: content for name, content in found.items() if not name.startswith(".aroma-saving-")}
        save()
        assert contents(place) == after, "the next save is as if nothing had been"
        return {True: "neither"}.get(found not in (before, after)) or ("old" if found == before else "new")

    begin()
    assert in_a_child(save, scratch / "work", 0) == "went on"
    before, after = contents(old), contents(place)
    return struck(begin, save, left, scratch / "work", every)


def strike_checkpoints(kind: str, every: int, scratch: Path) -> list[dict[str, Any]]:
    from transformers import TrainerCallback

    from aroma import AromaCallback, last_complete_checkpoint
    from trainer_runs import adapted, assert_same, on_disk, trainer_for

    out, kept = scratch / "work", scratch / "kept"
    told: list[dict[str, Any]] = []

    class Strikes(TrainerCallback):
        """At step 6 forks a process for every strike, which does the save."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step != 6:
                return
            shutil.copytree(out, kept)

            def begin() -> None:
                shutil.rmtree(out)
                shutil.copytree(kept, out)

            def save() -> None:
                trainer._save_checkpoint(trainer.model, trial=None)
                trainer.callback_handler.on_save(args, state, control)

            def left() -> str:
                whole = last_complete_checkpoint(out)
                step = int(str(whole).rsplit("-", 1)[1]) if whole else 0
                if whole:
                    assert_same(on_disk(whole), expected[step])
                return {3: "old", 6: "new", 0: "neither"}[step]

            assert in_a_child(save, out, 0) == "went on"
            expected = {6: on_disk(out / "checkpoint-6"), 3: on_disk(kept / "checkpoint-3")}
            told.extend(struck(begin, save, left, out, every))
            control.should_training_stop = True

    trainer = trainer_for(adapted(), out, AromaCallback(), Strikes(), max_steps=9, save_steps=3)
    trainer.train()
    return told


if __name__ == "__main__":
    kind, every, scratch = sys.argv[1:]
    work = strike_adapters if kind in ADAPTERS else strike_checkpoints
    print(json.dumps(work(kind, int(every), Path(scratch))))
