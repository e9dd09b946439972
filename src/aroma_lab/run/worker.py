"""`python -m aroma_lab.run.worker TRIAL.json FOLDER`: one trial; the workers of a grid call `attempt`.

Several processes that torchrun starts train replicas, and the first one writes.

Exit codes: 0 for a finished trial, 1 for one that failed, which leaves `failure.json`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from aroma.errors import AromaError

from .machine import free_memory, git_revision, keep_freed_memory
from .trial import Trial, load_trial

_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
"""What the libraries read when they are loaded to size their pools of threads."""


def main(arguments: list[str]) -> int:
    """Run the trial described in a file, in a folder; return the exit code."""
    trial_file, folder = arguments
    failure = attempt(load_trial(trial_file), Path(folder))
    if failure is None:
        from .processes import join

        join().destroy_process_group()
    return 0 if failure is None else 1


def attempt(trial: Trial, folder: Path) -> Exception | None:
    """Run a trial in a folder, and return why it failed; a process can run several, one after another."""
    threads = trial.training.threads
    if threads is not None:  # before any library is loaded
        os.environ.update(dict.fromkeys(_POOLS, str(threads)))
    try:
        from aroma.cli.quiet import quiet

        quiet()
        from threadpoolctl import threadpool_limits

        from .run import run_trial

        git_revision()  # of the source that was imported, whatever becomes of the files
        keep_freed_memory()
        free_memory()
        if threads is not None:  # an earlier trial may have had others
            threadpool_limits(threads)
        run_trial(trial, folder)
    except Exception as error:
        if os.environ.get("RANK", "0") == "0" and _is_own(trial, folder):
            from .folder import TrialFolder

            TrialFolder(folder).record_failure(error)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error
    return None


def _is_own(trial: Trial, folder: Path) -> bool:
    """Whether the folder is this trial's: a refused one may hold another trial, or a user's files."""
    from .folder import TrialFolder

    try:
        TrialFolder(folder).check(trial)
    except AromaError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
