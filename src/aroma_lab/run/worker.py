"""`python -m aroma_lab.run.worker TRIAL.json FOLDER`: one trial in a process of its own.

Several processes that torchrun starts train replicas, and the first one writes.

Exit codes: 0 for a finished trial, 1 for one that failed, which leaves `failure.json`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from aroma.files import read_json

from .files import TrialFiles
from .machine import keep_freed_memory

_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
"""What the libraries read when they are loaded to size their pools of threads."""


def main(arguments: list[str]) -> int:
    """Run the trial described in a file, in a folder; return the exit code."""
    trial_file, folder = arguments
    try:
        threads = read_json(trial_file)["training"].get("threads")
        if threads is not None:  # before any library is loaded
            os.environ.update(dict.fromkeys(_POOLS, str(threads)))
        load()
        if threads is not None:  # the process may have been forked from one that had loaded them
            from threadpoolctl import threadpool_limits

            threadpool_limits(threads)
        from .processes import join
        from .run import run_trial
        from .trial import load_trial

        run_trial(load_trial(trial_file), Path(folder))
        join().destroy_process_group()
    except Exception as error:
        if os.environ.get("RANK", "0") == "0" and _is_own(Path(trial_file), Path(folder)):
            from .folder import TrialFolder

            TrialFolder(Path(folder)).record_failure(error)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def load() -> None:
    """Import what every trial needs."""
    keep_freed_memory()
    from aroma.cli.quiet import quiet

    quiet()
    from . import run  # noqa: F401
    from .machine import git_revision

    git_revision()  # of the source that was imported, whatever becomes of the files


def _is_own(trial_file: Path, folder: Path) -> bool:
    """Whether the folder is this trial's: a refused one may hold another trial, or a user's files."""
    there = TrialFiles(folder).trial
    if there.exists():
        return there.read_bytes() == trial_file.read_bytes()
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
