"""The toy bundle of tests/runtime, with the values by which devices are checked."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("runtime_conftest", Path(__file__).parents[1] / "runtime/conftest.py")
_runtime = sys.modules.setdefault("runtime_conftest", importlib.util.module_from_spec(_spec))
if not hasattr(_runtime, "Toy"):
    _spec.loader.exec_module(_runtime)
make_toy, checks_of = _runtime.make_toy, _runtime.checks_of


@pytest.fixture
def toy(tmp_path, make_toy, checks_of):
    """A bundle of its own; `toy.seal()` makes its manifest right again after a change of its files."""
    made = make_toy(tmp_path / "toy")
    checks = checks_of(made)
    made = make_toy(tmp_path / "toy", checks=checks)
    object.__setattr__(made, "seal", lambda: _runtime._seal(made.path, checks=checks))
    return made
