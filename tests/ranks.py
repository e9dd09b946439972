"""Groups of processes as torchrun starts them, forked from a process that has imported everything already.

Several tests start dozens of tiny trainings, and the imports of one process take longer than its training. A script is
run as `torchrun --standalone --nproc-per-node N SCRIPT ...` runs it: as `__main__`, with the same variables in the
environment, and the end of one process ends the others.

    python tests/ranks.py PRELOADED JOBS.json

runs launches for an environment of its own: JOBS is a list of [processes, program, argument...].
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
SECONDS = 300
"""Within which a launch ends: twice the time-outs of the collectives."""


@cache
def forking(*modules: str) -> ForkServerContext:
    """Return processes that have `modules` imported already, and no thread yet.

    A process has one fork server: the modules of the first call count.
    """
    context = multiprocessing.get_context("forkserver")
    # Read when the server starts, at the first process.
    context.set_forkserver_preload([*modules, "frozen"])
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1")
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def processes() -> ForkServerContext:
    """Return what starts processes in all tests of one worker."""
    return forking("trainer_runs", "trial_runs", "distributed_runs", "sharded_runs")


class Ended(NamedTuple):
    """How a launch ended."""

    said: str
    """What the processes printed."""
    codes: list[int]
    """Their exit codes."""
    seconds: float
    """From the end of the first that failed to the end of the last; 0 if none failed."""


def run_ranks(context: ForkServerContext, count: int, program: str, *arguments: str, grace: float = 2) -> Ended:
    """Run a script, or a module, in `count` processes.

    When one has failed, the others have `grace` seconds to see it and end; then they are killed.
    """
    from torch.distributed import TCPStore

    # As torchrun's agent keeps it: no port is chosen before somebody listens there.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        common = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": 0,
        }
        ranks = []
        for rank in range(count):
            variables = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
            ranks.append(context.Process(target=_rank, args=(variables, str(said), program, arguments)))
            ranks[-1].start()
        deadline, failed = time.monotonic() + SECONDS, 0.0
        waiting = {process.sentinel: process for process in ranks}
        while waiting and (ended := wait([*waiting], max(deadline - time.monotonic(), 0))):
            if any(waiting.pop(sentinel).exitcode for sentinel in ended):
                # Those that the end of one concerns see it by themselves, and say so.
                failed = failed or time.monotonic()
                deadline = min(deadline, failed + grace)
        for process in waiting.values():
            process.kill()
        for process in ranks:
            process.join()
        seconds = time.monotonic() - failed if failed else 0.0
        codes = [int(process.exitcode or 0) for process in ranks]
        return Ended(said.read_text() if said.exists() else "", codes, seconds)


def launch(count: int, program: str, *arguments: str, fails: bool = False) -> str:
    """Run a script or module in several processes; return what they said, and how each ended."""
    said, codes, _ = run_ranks(processes(), count, program, *arguments)
    assert any(codes) == fails, f"exit codes {codes} after: {said[-4000:]}"
    return said + "".join(f"exitcode  : {code}\n" for code in codes)


def torchrun(count: int, program: str, *arguments: str, fails: bool = False) -> str:
    """Do the same with torchrun itself, which takes longer."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [*command, *([] if program.endswith(".py") else ["-m"]), program, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert (done.returncode != 0) == fails, done.stdout[-4000:]
    return done.stdout


@cache
def deepspeed_environment() -> dict[str, str]:
    """Return what processes need in their environment to find DeepSpeed.

    It is looked for beside the other packages, or in the folder that `AROMA_DEEPSPEED` names: with it among the
    others, the Trainer of every other test would import it too. `.ci/run` installs it into such a folder.
    """
    folder = os.environ.get("AROMA_DEEPSPEED", "")
    assert folder or importlib.util.find_spec("deepspeed"), (
        "these tests need DeepSpeed: pip install deepspeed, or as .ci/run does, and set AROMA_DEEPSPEED"
    )
    found = {"DS_ACCELERATOR": "cpu"}
    if folder:
        found["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    return found


def _rank(variables: dict[str, str], said: str, program: str, arguments: tuple[str, ...]) -> None:
    """Be one process of a launch."""
    import faulthandler

    import torch

    os.environ.update(variables)
    output = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    faulthandler.dump_traceback_later(SECONDS - 20)
    torch.set_num_threads(1)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def main(preloaded: str, jobs: str) -> None:
    context = forking(preloaded)
    for count, program, *arguments in json.loads(Path(jobs).read_text()):
        said, codes, _ = run_ranks(context, count, program, *arguments)
        print(said)
        if any(codes):
            sys.exit(f"{program} {' '.join(arguments)}: exit codes {codes}")


if __name__ == "__main__":
    main(*sys.argv[1:])
