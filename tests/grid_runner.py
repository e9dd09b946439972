"""A grid's runner, with workers that only count, as a process to kill: `python grid_runner.py GRID.yaml`."""

import sys
from unittest import mock

from aroma_lab.grid.reader import load_grid
from aroma_lab.grid.run import run_grid

if __name__ == "__main__":
    # Checking the methods' options loads PyTorch, which these trials have no use for.
    with mock.patch("aroma_lab.grid.run.check_methods"):
        outcome = run_grid(load_grid(sys.argv[1]), module="grid_worker")
    print(len(outcome.finished), len(outcome.skipped), len(outcome.failed))
