"""What a trial's process has imported before it is forked, and calls."""

from importlib import import_module
from pathlib import Path
from typing import Any

from aroma.cli.quiet import quiet

from ..run.machine import git_revision, keep_freed_memory

quiet()  # before the imports that print
_RUNNER = import_module("aroma_lab.run.run")
git_revision()  # of the source that is imported here, whatever becomes of the files


def run_trial(trial: Any, folder: Path) -> None:
    """Run a trial in its folder; see `aroma_lab.run.run.run_trial`."""
    keep_freed_memory()
    _RUNNER.run_trial(trial, folder)
