"""The beginning of the command."""

import signal
import subprocess
import sys

import pytest

# Ctrl-C while the command's modules are imported: what is imported next raises the signal.
INTERRUPTED = """
import os, signal, sys
from cluster.commands.main import main

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "cluster.commands.cli":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
sys.argv = ["mobula", "--version"]
main()
"""


@pytest.mark.parametrize("is_ignored", [False, True])
def test_ctrl_c_while_modules_are_imported_ends_the_command_without_a_traceback(is_ignored: bool) -> None:
    """Unless it was started to ignore it, as a shell does with what runs in the background."""
    handler = "SIG_IGN" if is_ignored else "default_int_handler"  # whatever these tests were started with
    before = f"import signal; signal.signal(signal.SIGINT, signal.{handler})\n"
    ended = subprocess.run(
        [sys.executable, "-c", before + INTERRUPTED], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stderr == ""
    assert ended.returncode == (0 if is_ignored else -signal.SIGINT)
    assert ended.stdout.startswith("mobula ") is is_ignored
