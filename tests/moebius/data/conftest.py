from __future__ import annotations

import runpy
from pathlib import Path

import pytest

png = runpy.run_path(str(Path(__file__).with_name("made.py")))["png"]


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in two folders."""
    root = tmp_path / "pictures"
    for index in range(12):
        place = root / ("a" if index % 2 else "b/c")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index:02d}.png").write_bytes(png(index * 20))
    return root
