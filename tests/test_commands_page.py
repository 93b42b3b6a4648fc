"""docs/commands.md is what the commands say of themselves today."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_page_is_current(monkeypatch):
    pytest.importorskip("tomllib", reason="the script needs Python 3.11")
    pytest.importorskip("torch", reason="the page covers the commands of PyTorch's side too")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import commands_page

    assert commands_page.PAGE.read_text(encoding="utf-8") == commands_page.page(), "run `make docs`"
    sys.modules.pop("commands_page")
