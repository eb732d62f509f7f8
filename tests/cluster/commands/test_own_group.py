"""A command's child in a process group of its own: signals, and the status that the command ends with."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

TIMEOUT_S = 30.0
BEGIN = """import os, signal, sys, time
from cluster.commands.own_group import END_SIGNALS, continue_in_own_group
for number in END_SIGNALS:  # whatever these tests were started with
    signal.signal(number, signal.SIG_DFL)
"""
SAY_UP = "print(os.getpid(), flush=True)\n"
WAIT = "[time.sleep(0.05) for _ in range(1200)]"  # in pieces: a signal just before a long sleep is seen after it


def start(before: str, after: str) -> tuple[subprocess.Popen[str], int]:
    """The command, and its child's pid once that runs."""
    code = f"{BEGIN}{before}\ncontinue_in_own_group()\n{after}"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    return process, int(process.stdout.readline())


def to_group(process: subprocess.Popen[str], number: int) -> None:
    os.killpg(process.pid, number)


def to_one(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)


@pytest.mark.parametrize("send", [to_group, to_one])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_asks_to_end_reaches_the_child_once_as_ctrl_c_and_it_ends_in_order(
    send: Callable[[subprocess.Popen[str], int], None], number: int
) -> None:
    process, _ = start(
        "",
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"try:\n    {SAY_UP}    {WAIT}\n"
        "except KeyboardInterrupt:\n    time.sleep(0.2)\n    print('in order', flush=True)\n",
    )
    send(process, number)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out, err) == (0, "in order\n", "")


def test_a_signal_that_comes_twice_at_once_is_passed_on_once_and_a_later_one_again() -> None:
    process, _ = start(
        "",
        "caught = []\nsignal.signal(signal.SIGINT, lambda number, frame: caught.append(number))\n"
        f"{SAY_UP}time.sleep(1.5)\nprint(len(caught), flush=True)\n",
    )
    to_group(process, signal.SIGTERM)
    time.sleep(0.1)
    to_one(process, signal.SIGTERM)
    time.sleep(0.7)
    to_one(process, signal.SIGTERM)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (0, "2\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_child_that_still_imports_ends_at_once_with_the_status_of_the_signal(number: int) -> None:
    process, _ = start("", f"{SAY_UP}{WAIT}\n")
    to_one(process, number)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out, err) == (128 + number, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_child_that_ends_with_ctrl_cs_status_shows_which_signal_it_was(number: int) -> None:
    process, _ = start(
        "",
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"try:\n    {SAY_UP}    {WAIT}\nexcept KeyboardInterrupt:\n    sys.exit(130)\n",
    )
    to_one(process, number)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + number


def test_the_status_is_the_childs() -> None:
    process, _ = start("", f"{SAY_UP}sys.exit(7)\n")
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 7


def test_a_child_that_is_killed_shows_in_the_status() -> None:
    process, child = start("", f"{SAY_UP}{WAIT}\n")
    os.kill(child, signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGKILL


def test_kill_9_ends_the_child_as_well() -> None:
    process, child = start("", f"{SAY_UP}{WAIT}\n")
    process.kill()
    process.communicate(timeout=TIMEOUT_S)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(child).wait(TIMEOUT_S)


def test_a_signal_that_the_command_was_started_to_ignore_is_ignored() -> None:
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    process, _ = start(ignore, f"{SAY_UP}time.sleep(0.5)\nsys.exit(3)\n")
    to_group(process, signal.SIGHUP)
    time.sleep(0.05)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 3
