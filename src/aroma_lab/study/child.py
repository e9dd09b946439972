"""`python -m aroma_lab.study.child PARENT MODULE ARGUMENTS`: a module as a program that ends with its parent.

Only Linux can do so. Elsewhere a trial whose parent was killed runs to its end, with the lock of its folder.
"""

import ctypes
import os
import runpy
import signal
import sys

if __name__ == "__main__":
    _, parent, *sys.argv = sys.argv
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):  # it ended before the call
            sys.exit("the parent has ended")
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
