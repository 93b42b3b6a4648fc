"""scripts/object_pictures.py: what it draws are pairs that differ in the masked region only."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[3] / "scripts/object_pictures.py"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pictures") / "out"
    subprocess.run([sys.executable, SCRIPT, out, "--count", "3", "--side", "96"], check=True)
    return out


def test_each_pair_trains_both_branches_on_one_mask(drawn):
    from moebius.data.sources import JsonLinesSource

    rows = JsonLinesSource(drawn / "pictures.jsonl").rows
    assert [row.task for row in rows] == ["foreground", "background"] * 3
    assert [row.mask for row in rows] == [f"{i // 2:05d}-mask.png" for i in range(6)]


def test_the_object_lies_inside_its_mask_and_is_seen(drawn):
    for line in (drawn / "pictures.jsonl").read_text().splitlines()[::2]:
        row = json.loads(line)
        shown, behind, mask = (
            np.asarray(Image.open(drawn / name)).astype(int)
            for name in (row["image"], row["image"].replace("object", "behind"), row["mask"])
        )
        assert shown.shape == (96, 96, 3)
        assert set(np.unique(mask)) == {0, 255}
        apart = np.abs(shown - behind).max(axis=2)
        assert not apart[mask == 0].any()
        assert (apart[mask > 0] > 8).mean() > 0.3
        assert 0.01 < (mask > 0).mean() < 0.6
