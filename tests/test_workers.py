"""The suite in the background of a shell."""

from __future__ import annotations

import signal
import subprocess
import sys


def test_an_interrupt_reaches_processes_of_tests():
    """A shell lets what it starts in the background ignore SIGINT, and so do all processes from there on."""
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"True"
