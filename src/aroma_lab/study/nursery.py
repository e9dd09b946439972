"""A process that imports once what all trials need, and forks one for each: a start takes no ten seconds of imports.

    python -m aroma_lab.study.child PARENT aroma_lab.study.nursery SOCKET

Only Linux has it: a forked process must end with its parent, and elsewhere imported libraries do not survive a fork.
Nor does a library that has asked a GPU's driver, so where there is an accelerator, every trial imports for itself.
"""

from __future__ import annotations

import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from .child import end_with

_MESSAGE = 1 << 16
"""Most bytes of a message."""


def can_fork() -> bool:
    """Whether trials can be forked here."""
    import torch

    return sys.platform == "linux" and not torch.accelerator.is_available()


class Nursery:
    """The process that forks trials. It ends with this one, and its trials end with it."""

    def __init__(self) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "aroma_lab.study.child", str(os.getpid()), __name__, str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what a trial cannot import, it says itself
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._pids: list[int | None] = []
        self._codes: dict[int, int] = {}

    @property
    def is_alive(self) -> bool:
        """Whether it can fork."""
        return self._process.poll() is None

    def start(self, module: str, arguments: list[str], log: Path, lock: int) -> Forked:
        """Run a module as a program in a process of its own, as `python -m MODULE ARGUMENTS` does.

        Args:
            log: File for what it prints.
            lock: A file descriptor that the process inherits.
        """
        number = len(self._pids)
        self._pids.append(None)
        with log.open("wb") as stream, suppress(OSError):  # it has ended: so has what it should have started
            socket.send_fds(self._link, [json.dumps([number, module, *arguments]).encode()], [stream.fileno(), lock])
        return Forked(self, number)

    def close(self) -> None:
        """End it, and what it has started."""
        self._link.close()
        self._process.kill()
        self._process.wait()

    def code_of(self, number: int, seconds: float | None = 0.0) -> int | None:
        """Return the exit code of a process after waiting so long; None if it runs, −n if signal n ended it."""
        while number not in self._codes and self._hear(seconds):
            pass
        return self._codes.get(number)

    def pid_of(self, number: int) -> int | None:
        """Return the id of a process, once it has one; None if it has ended."""
        while self._pids[number] is None and number not in self._codes and self._hear(None):
            pass
        return None if number in self._codes else self._pids[number]

    def _hear(self, seconds: float | None) -> bool:
        """Take one message, if one comes within so many seconds; return whether there was one."""
        self._link.settimeout(seconds)
        try:
            message = self._link.recv(_MESSAGE)
        except (BlockingIOError, TimeoutError):
            return False
        except OSError:
            message = b""
        if not message:  # the nursery was killed, and the kernel has killed what it had started
            self._codes = {**dict.fromkeys(range(len(self._pids)), -signal.SIGKILL), **self._codes}
            return True
        number, pid, code = json.loads(message)
        if code is None:
            self._pids[number] = pid
        else:
            self._codes[number] = code
        return True


class Forked:
    """A process that a nursery has forked, with the part of `subprocess.Popen` that a trial needs."""

    def __init__(self, nursery: Nursery, number: int) -> None:
        self._nursery, self._number = nursery, number

    @property
    def returncode(self) -> int | None:
        """Exit code; None while it runs, −n if signal n ended it."""
        return self._nursery.code_of(self._number)

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return the exit code.

        Raises:
            subprocess.TimeoutExpired: It still runs after `timeout` seconds.
        """
        code = self._nursery.code_of(self._number, timeout)
        if code is None:
            raise subprocess.TimeoutExpired("trial", timeout or 0.0)
        return code

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        pid = None if self.poll() is not None else self._nursery.pid_of(self._number)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


# In the process ------------------------------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """Import, then fork a process for each message, and say which one has ended how."""
    with suppress(Exception):  # the trial will meet it again, and say so
        from ..run.worker import load

        load()
    parent, link = os.getpid(), socket.socket(fileno=descriptor)
    ends, wakes = os.pipe()
    for one in (ends, wakes):
        os.set_blocking(one, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    numbers: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(link, selectors.EVENT_READ)
        selector.register(ends, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if ends in ready:
                os.read(ends, _MESSAGE)
                _tell_ended(link, numbers)
            if link not in ready:
                continue
            message, descriptors, *_ = socket.recv_fds(link, _MESSAGE, 2)
            if not message:
                return
            number, *command = json.loads(message)
            pid = os.fork()
            if pid == 0:
                break
            for one in descriptors:
                os.close(one)
            numbers[pid] = number
            link.send(json.dumps([number, pid, None]).encode())
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    link.close()
    _be_trial(parent, command, *descriptors)


def _tell_ended(link: socket.socket, numbers: dict[int, int]) -> None:
    while numbers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        link.send(json.dumps([numbers.pop(pid), pid, os.waitstatus_to_exitcode(status)]).encode())


def _be_trial(parent: int, command: list[str], log: int, lock: int) -> None:
    """Run a module as a program, which holds `lock` until it ends."""
    os.setsid()
    end_with(parent)
    for stream in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(log, stream)
    os.close(log)
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
