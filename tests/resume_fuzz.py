"""Checkpoints that are damaged at random, and what a run that is to go on from them does.

For every damage a run has two checkpoints: a whole one of step 3, and the damaged one of step 6, which is asked
for by `last_complete_checkpoint` and named directly to the Trainer. Then it was

- a clear error: both passed it over, with one line that says why;
- equal: the run went on from it, and ended as the uninterrupted one did, bit for bit;
- an unrelated traceback, silently wrong, or a hang: what must never be.
"""

from __future__ import annotations

import random
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from aroma import AromaCallback, last_complete_checkpoint
from aroma.errors import CheckpointError
from corruptions import KINDS, Harm
from trainer_runs import Run, adapted, assert_same, on_disk, train, trainer_for

RUN = Run(steps=8, method={"lora_alpha": 3, "inner_criterion": "update_change"}, training={"save_steps": 3})
BAD = ("unrelated traceback", "silently wrong", "hang")
SECONDS = 60
"""After which a resume counts as hanging."""


class Hang(BaseException):
    """Nothing catches it on the way."""


# Damages that only checkpoints have ----------------------------------------------------------------------------------


def file_of_another_step(rng: random.Random, folder: Path, other: Path) -> str:
    earlier = folder.parent / "checkpoint-3"
    names = sorted(file.name for file in folder.iterdir() if (earlier / file.name).is_file())
    taken = rng.sample(names, rng.choice([1, 1, 2, len(names) - 1]))
    for name in taken:
        shutil.copy(earlier / name, folder / name)
    return ", ".join(sorted(taken))


def state_of_torch_edited(rng: random.Random, folder: Path, other: Path) -> str:
    """A valid file with another number in it."""
    name = rng.choice(["optimizer.pt", "scheduler.pt", "rng_state.pth"])
    with torch.serialization.safe_globals([]):
        content = torch.load(folder / name, weights_only=False)
    if name == "optimizer.pt":
        state = content["state"][rng.choice(sorted(content["state"]))]
        state[rng.choice(["exp_avg", "exp_avg_sq", "step"])].mul_(1.5)
    elif name == "scheduler.pt":
        content["last_epoch"] += 1
    else:
        content["cpu"] = torch.Generator().manual_seed(rng.randrange(100)).get_state()
    torch.save(content, folder / name)
    return name


def file_that_nobody_saved(rng: random.Random, folder: Path, other: Path) -> str:
    name = rng.choice(["model.safetensors", "pytorch_model.bin", "scaler.pt", "optimizer.bin", "rng_state_1.pth"])
    shutil.copy(other / "adapter_model.safetensors", folder / name)
    return name


OWN: dict[str, Harm] = {
    function.__name__.replace("_", " "): function
    for function in (file_of_another_step, state_of_torch_edited, file_that_nobody_saved)
}


# Outcomes ------------------------------------------------------------------------------------------------------------


class Fuzzer:
    """Damages checkpoints and resumes them.

    Args:
        scratch: An empty folder.
    """

    def __init__(self, scratch: Path) -> None:
        self.whole, self.other, self.out = (scratch / name for name in ("whole", "other", "run"))
        train(self.whole, RUN)
        train(self.other, Run(steps=6, method={**RUN.method, "component_seed": 9}, training=RUN.training))
        self.expected = on_disk(self.whole / "checkpoint-8")
        self.asking: Any = None

    def outcome(self, name: str, seed: int) -> tuple[str, str] | None:
        """Return what became of one damage, and what it was; None if it could not be done."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        for step in (3, 6):
            shutil.copytree(self.whole / f"checkpoint-{step}", self.out / f"checkpoint-{step}")
        shutil.copy(self.whole / "events.jsonl", self.out)
        folder = self.out / "checkpoint-6"
        harm = {**KINDS, **OWN}[name]
        done = harm(random.Random(f"{name} {seed}"), folder, self.other / "checkpoint-6")
        if done is None:
            return None
        try:
            with limited(SECONDS):
                return self._resume(folder), done
        except Hang:
            return "hang", done

    def _resume(self, folder: Path) -> str:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                found = last_complete_checkpoint(self.out)
            said = [str(each.message) for each in caught if "passed over" in str(each.message)]
            if found == str(self.out / "checkpoint-3"):
                # Gone altogether it is no checkpoint that was passed over.
                if folder.exists() and not (len(said) == 1 and len(said[0].splitlines()) == 2):
                    return "silently wrong"
                return self._named_directly(folder)
            trainer = train(self.out, RUN, str(folder))
        except Exception:
            return "unrelated traceback"
        try:
            assert trainer.state.global_step == RUN.steps
            assert_same(on_disk(self.out / "checkpoint-8"), self.expected)
        except AssertionError:
            return "silently wrong"
        return "equal"

    def _named_directly(self, folder: Path) -> str:
        if self.asking is None:  # one for all of them: a refused folder changes nothing in it
            self.asking = trainer_for(adapted(**RUN.method), self.out, AromaCallback(), max_steps=RUN.steps)
        try:
            self.asking.train(resume_from_checkpoint=str(folder))
        except CheckpointError as error:
            return "clear error" if len(str(error).splitlines()) == 1 else "unrelated traceback"
        return "silently wrong"


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise Hang in the block after some seconds."""

    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


NAMES = (*KINDS, *OWN)


def damages(scratch: Path, seed: int, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Damage checkpoints, of all kinds in turn; yield what became of each. `outcome` is None if it could not be done.

    Args:
        scratch: An empty folder.
        seed: Decides, with its number, what a damage is.
        numbers: Which damages.
    """
    fuzzer = Fuzzer(scratch)
    for number in numbers:
        name, own = NAMES[number % len(NAMES)], seed * 100_000 + number // len(NAMES)
        outcome, done = fuzzer.outcome(name, own) or (None, "")
        yield {"seed": seed, "number": number, "name": name, "own": own, "outcome": outcome, "done": done}


def counted(told: Iterable[dict[str, Any]]) -> tuple[dict[str, Counter[str]], list[str]]:
    """Return the outcomes by kind, and the bad ones in words."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in NAMES}
    bad = []
    for each in told:
        if each["outcome"] is not None:
            counts[each["name"]][each["outcome"]] += 1
        if each["outcome"] in BAD:
            bad.append("{outcome}: {name} #{own}: {done}".format(**each))
    return counts, bad
