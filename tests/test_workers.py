"""The suite's own ways: what pytest-xdist's workers share, and how an interrupt reaches them."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def shared() -> None:
    """Stands for an expensive fixture of a module."""


def test_a_fixture_of_a_module_keeps_its_tests_on_one_worker(shared, request):
    if not getattr(request.config.option, "loadgroup", False):  # set by xdist in its workers
        pytest.skip("only with several workers: pytest -n 2 --dist loadgroup")
    assert request.node.nodeid.endswith("@tests/test_workers.py")


def test_an_interrupt_reaches_processes_of_tests():
    """A shell lets what it starts in the background ignore SIGINT, and so do all processes from there on."""
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"True"
