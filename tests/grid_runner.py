"""A grid's runner, with stand-ins that only count, as a process to kill: `python grid_runner.py GRID.yaml [URL]`."""

import sys
from unittest import mock

from aroma_lab.study.grid import load_grid
from aroma_lab.study.run import run_grid

if __name__ == "__main__":
    grid = load_grid(sys.argv[1], storage=sys.argv[2] if len(sys.argv) > 2 else None)
    # Checking the methods' options loads PyTorch, which these trials do not need.
    with mock.patch("aroma_lab.study.run.check_methods"):
        outcome = run_grid(grid, module="grid_worker")
    print(len(outcome.finished), len(outcome.skipped), len(outcome.failed))
