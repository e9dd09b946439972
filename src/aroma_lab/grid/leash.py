"""`python -m aroma_lab.grid.leash MODULE ARGUMENTS`: runs a module that ends when its parent does.

A worker whose runner was killed would train on, unseen, in a folder that the next runner wants. Its standard input is
a pipe of which the runner holds the other end; when the runner is gone, for whatever reason, the pipe ends, and so
does the worker. What a kill at that moment leaves is what any kill leaves: whole files, and the last checkpoint.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading

ORPHANED = 75
"""Exit code of a worker whose runner is gone."""


def main() -> None:
    """Run the module named by the first argument as a program, with the others as its arguments."""
    threading.Thread(target=_wait_for_end, args=(os.dup(0),), daemon=True).start()
    # The module is not to see the pipe: what it starts would inherit it, or could read it.
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _wait_for_end(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os._exit(ORPHANED)


if __name__ == "__main__":
    main()
