"""The golden values of the page's engine are those of this runtime: scripts/page_*golden.py write them."""

from __future__ import annotations

import base64
import importlib.util
import json
import zlib
from pathlib import Path

import numpy as np
import PIL

_SCRIPTS = Path(__file__).parents[2] / "scripts"


def _script(name):
    spec = importlib.util.spec_from_file_location(name, _SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page_golden, page_pictures_golden = map(_script, ("page_golden", "page_pictures_golden"))


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


def test_the_golden_pictures_are_what_the_runtime_fills(golden):
    got, expected = page_pictures_golden.content(), json.loads((golden / "page_pictures.json").read_text())
    assert got["pictures"].keys() == expected["pictures"].keys()
    if int(PIL.__version__.split(".")[0]) < 13:  # its resize begins with the columns, always
        for content in (got, expected):
            content["resizes"] = content["resizes"][: -page_pictures_golden.ROWS_FIRST]
    for name, case in expected["pictures"].items():
        apart = _changes(got["pictures"][name].pop("changes")) - _changes(case.pop("changes"))
        # A value on the edge of two levels may fall on either side where `log` or the resize rounds otherwise.
        assert np.abs(apart.astype(np.int8)).max() <= 1, name
    same(got, expected)


def _changes(packed):
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8)
