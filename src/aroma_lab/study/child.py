"""`python -m aroma_lab.study.child PARENT MODULE ARGUMENTS`: a module as a program that ends with its parent.

Only Linux can do so. Elsewhere a trial whose parent was killed runs to its end, with the lock of its folder.
"""

import ctypes
import os
import runpy
import signal
import sys


def end_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the call
            sys.exit("the parent has ended")


if __name__ == "__main__":
    _, parent, *sys.argv = sys.argv
    end_with(int(parent))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
