"""Every tool of the page, used as a person does, with what must come of it. The served page and a site's share them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

Mask = np.ndarray


def pixels(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def draw_with_every_tool(page: Any) -> None:
    """Brush, eraser, line, lasso, rectangle, a line by Shift and strokes beyond the border, on 200 x 150 pixels."""
    page["brush-size"].fill("20")
    page.drag((50, 50), (100, 50))
    brush = page.mask()
    rows, columns = np.nonzero(brush)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((40, 59, 40, 109), abs=1)
    assert brush[50, 50:100].all()
    page["eraser"].click()
    page.drag((70, 20), (70, 90))
    erased = page.mask()
    assert not erased[45:55, 62:78].any()
    assert np.array_equal(erased[:, :55], brush[:, :55])
    page["line"].click()
    page.drag((20, 120), (180, 120))
    assert page.mask()[120, 20:180].all()
    page["undo"].click()
    page["lasso"].click()
    page.drag((120, 80), (180, 80), (180, 140), (120, 140))
    lasso = page.mask()
    assert lasso[85:135, 125:175].all()
    assert not lasso[145:, :].any()
    page["brush"].click()
    page["mask-clear"].click()
    page.page.mouse.click(*page.at(30, 30))
    page.page.keyboard.down("Shift")
    page.page.mouse.click(*page.at(170, 100))
    page.page.keyboard.up("Shift")
    straight = page.mask()
    assert all(straight[round(30 + 70 * t), round(30 + 140 * t)] for t in np.linspace(0, 1, 20))
    page.drag((100, 140), (100, 300))  # beyond the border
    assert page.mask()[149, 100]
    page["mask-clear"].click()
    page.page.get_by_test_id("rectangle").click()
    page.drag((10, 10), (60, 40))
    rectangle = page.mask()
    assert abs(int(rectangle.sum()) - 50 * 30) < 170


def load_change_and_undo_masks(page: Any, given: Mask, png: Any) -> None:
    """A mask of another size is refused. Then load, invert, grow, shrink, undo and redo.

    Args:
        page: with a picture of the mask's size and an empty mask.
        given: uint8 [H, W], marked in rows 40 to 79 and columns 48 to 79.
        png: encodes an array.
    """

    def load(data: bytes) -> None:
        page["mask-file"].set_input_files({"name": "m.png", "mimeType": "image/png", "buffer": data})

    load(png(given[:10, :10]))
    page.state("error")
    assert "10 × 10" in page.words()
    load(png(given))
    page.page.wait_for_selector("[data-testid=undo]:not(:disabled)")
    assert np.array_equal(page.mask(), given > 127)
    page["mask-invert"].click()
    assert np.array_equal(page.mask(), given <= 127)
    page["mask-invert"].click()
    page.page.locator("#mask-grow").click()
    grown = page.mask()
    assert grown[36:84, 44:84].all()
    assert grown.sum() == 48 * 40
    page.page.locator("#mask-shrink").click()
    assert np.array_equal(page.mask(), given > 127)
    for _ in range(5):
        page["undo"].click()
    assert not page.mask().any()
    assert page["undo"].is_disabled()
    for _ in range(5):
        page.page.keyboard.press("Control+Shift+Z")
    assert np.array_equal(page.mask(), given > 127)


def middle(mask: Mask) -> tuple[float, float]:
    """Row and column of the middle of what is marked; pixel i reaches from i to i + 1."""
    rows, columns = np.nonzero(mask)
    return float(rows.mean()) + 0.5, float(columns.mean()) + 0.5


def zoom_and_pan(page: Any) -> None:
    """Zoomed at the pointer, what lies under it stays; a stroke marks the same pixels. The mask is empty before."""
    page["brush"].click()
    page["brush-size"].fill("4")
    x, y = page.at(60, 70)
    page.page.mouse.move(x, y)
    for _ in range(5):
        page.page.mouse.wheel(0, -60)
    page.page.mouse.click(x, y)
    assert middle(page.mask()) == pytest.approx((70, 60), abs=0.6)
    page["pan"].click()
    page.page.mouse.move(x, y)
    page.page.mouse.down()
    page.page.mouse.move(x + 50, y + 30, steps=3)
    page.page.mouse.up()
    page["brush"].click()
    page["mask-clear"].click()
    page.page.mouse.click(x + 50, y + 30)
    assert middle(page.mask()) == pytest.approx((70, 60), abs=0.6)
    page["zoom-fit"].click()
    page["mask-clear"].click()
    page.page.mouse.click(*page.at(120, 30))
    assert middle(page.mask()) == pytest.approx((30, 120), abs=0.6)


def go_on_from_results(page: Any) -> None:
    """Run, compare, run on the result, undo and redo of results, and another one with another seed.

    Args:
        page: with a picture and an empty mask.
    """
    page.drag((60, 60), (80, 70))
    page.run()
    first = page.saved("download")
    page["compare"].click()
    assert page.page.locator("#compare-slider").is_visible()
    page["compare"].click()
    page.page.keyboard.down("c")
    page.page.keyboard.up("c")
    page.drag((150, 100), (160, 110))  # "and this too"
    page.run()
    second = page.saved("download")
    assert first != second
    page["undo"].click()
    assert page.saved("download") == first
    page["undo"].click()  # the stroke
    page["undo"].click()  # the first result: the source and its mask are back
    assert page["download"].is_disabled()
    assert page.mask()[60, 60]
    page["redo"].click()
    assert page.saved("download") == first
    page["another"].click()
    page.state("running", "done")
    page.page.wait_for_selector("#status:has-text('Done, seed')")
    assert page["seed"].input_value() != "0"
    assert f"seed {page['seed'].input_value()}" in page.words()
    assert page.saved("download") != first


def reload(page: Any) -> None:
    """Opens the page again. Picture, mask and result are as they were."""
    mask, there = page.mask(), page["download"].is_enabled()
    result = page.saved("download") if there else None
    page.page.wait_for_selector("body[data-kept=yes]")
    page.page.reload()
    page.page.wait_for_selector("#status:has-text('as you left them')")
    assert np.array_equal(page.mask(), mask)
    assert page["download"].is_enabled() == there
    if there:
        assert page.saved("download") == result
