"""The golden values of the page's engine are those of this runtime: scripts/page_golden.py writes them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np

_PATH = Path(__file__).parents[2] / "scripts/page_golden.py"
_spec = importlib.util.spec_from_file_location("page_golden", _PATH)
page_golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(page_golden)


def same(got, expected, where=""):
    """Equal, numbers up to the last bits of this machine's `log`."""
    assert type(got) is type(expected), where
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key, value in expected.items():
            same(got[key], value, f"{where}.{key}")
    elif isinstance(expected, list) and expected and isinstance(expected[0], float):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6, err_msg=where)
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for index, value in enumerate(expected):
            same(got[index], value, f"{where}[{index}]")
    else:
        assert got == expected, where


def test_the_golden_file_is_what_the_runtime_computes(golden):
    same(page_golden.content(), json.loads((golden / "page_engine.json").read_text()))
