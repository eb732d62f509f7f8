"""Runs what a command starts in a process group of its own.

A shell that logs out, a supervisor or `kill -- -GROUP` signals all processes of a group at once: Ray's servers and ours
would end together, and nothing in order. So a child does the work in another group. The process that was called passes
on what asks it to end, always as Ctrl-C, waits, and ends as the child did.
"""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType

END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONCE_S = 0.5  # signals so close together are one: `make`, say, passes on to the command what its group was sent
LOOK_S = 0.05  # between two looks at the child
PR_SET_PDEATHSIG = 1  # of Linux


def continue_in_own_group() -> None:
    """Returns in the child, which Ctrl-C ends at once until it says otherwise. Raises SystemExit in the process that
    was called, when the child has ended: with its status, or 128 and the number of the signal that asked it to end
    where that, or Ctrl-C's status, is how it ended.

    Must be called before there are threads.
    """
    called = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)  # until each has its handlers
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        sys.exit(_wait_for(child))
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # kill -9 of the one that was called ends both
        if os.getppid() != called:
            os._exit(1)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # a terminal may be written to from here whatever it is set to
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)


def _wait_for(child: int) -> int:
    """The status to end with."""
    asked_by: list[int] = []
    passed_on_s = float("-inf")

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal passed_on_s
        if time.monotonic() - passed_on_s < ONCE_S:
            return
        passed_on_s = time.monotonic()
        asked_by.append(number)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGINT)

    for number in END_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and shells ask for what runs in the background
            signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)
    while True:  # a signal just before a wait without end would be seen when that ends
        ended, wait_status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(LOOK_S)
    status = os.waitstatus_to_exitcode(wait_status)
    if asked_by and status in (-signal.SIGINT, 128 + signal.SIGINT):  # as Ctrl-C, whatever was passed on
        return 128 + asked_by[0]
    return status if status >= 0 else 128 - status
