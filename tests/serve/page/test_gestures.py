"""The page in Chromium: touch, wheel, drop, paste, camera, and results beyond the bitmaps that are kept."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.xdist_group("page")


def wait_for(page, text: str) -> None:
    page.page.wait_for_selector(f"#status:has-text('{text}')")


def touch(session, kind: str, *points: tuple[float, float]) -> None:
    session.send(
        "Input.dispatchTouchEvent",
        {"type": kind, "touchPoints": [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]},
    )


def test_a_pinch_zooms_and_shifts_and_paints_nothing(visit, jpeg):
    """Two fingers 60 px apart that end 180 px apart: three times the scale around their middle, which moves along."""
    page = visit(has_touch=True)
    page.open("a.jpg", jpeg)
    page["brush-size"].fill("30")
    x, y = page.at(100, 75)
    session = page.page.context.new_cdp_session(page.page)
    touch(session, "touchStart", (x - 30, y))
    touch(session, "touchStart", (x - 30, y), (x + 30, y))
    for step in range(1, 7):
        wide, right, down = 30 + 10 * step, 5 * step, 2 * step
        touch(session, "touchMove", (x - wide + right, y + down), (x + wide + right, y + down))
    touch(session, "touchEnd")
    if page["undo"].is_enabled():  # the first finger's dab, which is a change of its own
        page["undo"].click()
    assert not page.mask().any()
    page["brush-size"].fill("10")
    page.page.mouse.move(x + 30, y + 12)
    page.page.mouse.down()
    page.page.mouse.move(x + 30 + 90, y + 12, steps=3)
    page.page.mouse.up()
    rows, columns = np.nonzero(page.mask())
    scale = min(page["stage"].bounding_box()["width"] / 200, page["stage"].bounding_box()["height"] / 150, 8) * 0.98 * 3
    assert float(rows.mean()) + 0.5 == pytest.approx(75, abs=0.7)
    assert columns.min() + 5 == pytest.approx(100, abs=1)
    assert columns.max() + 1 - 5 == pytest.approx(100 + 90 / scale, abs=1)


def test_one_finger_paints(visit, jpeg):
    page = visit(360, 740, has_touch=True, is_mobile=True)
    page.open("a.jpg", jpeg)
    page["brush-size"].fill("12")
    page.page.touchscreen.tap(*page.at(100, 75))
    mask = page.mask()
    assert mask[75, 100]
    assert mask.sum() == pytest.approx(np.pi * 36, rel=0.2)


def test_the_wheel_with_alt_sizes_the_brush(visit, jpeg):
    page = visit()
    page.open("a.jpg", jpeg)
    page["brush-size"].fill("40")
    page.page.mouse.move(*page.at(50, 50))
    page.page.keyboard.down("Alt")
    page.page.mouse.wheel(0, -100)
    page.page.mouse.wheel(0, -100)
    page.page.wait_for_selector("#size-shown:has-text('53')")  # 40 x 1.15 x 1.15
    page.page.mouse.wheel(0, 100)
    page.page.wait_for_selector("#size-shown:has-text('46')")
    page.page.keyboard.up("Alt")
    page.page.mouse.click(*page.at(50, 50))
    rows, _ = np.nonzero(page.mask())
    assert rows.max() - rows.min() + 1 == pytest.approx(46, abs=1)  # and nothing was zoomed


def test_a_dropped_picture_is_opened(visit, jpeg):
    page = visit()
    data = page.page.evaluate_handle(
        """(text) => {
          const data = new DataTransfer();
          const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
          data.items.add(new File([bytes], "dropped.jpg", { type: "image/jpeg" }));
          return data;
        }""",
        base64.b64encode(jpeg).decode(),
    )
    for kind in ("dragover", "drop"):
        page["stage"].dispatch_event(kind, {"dataTransfer": data})
    wait_for(page, "dropped.jpg: 200 × 150")


def test_a_copied_picture_is_pasted(visit, draw):
    """Through the browser's own clipboard, which holds PNG."""
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.page.evaluate(
        """async (text) => {
          const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
          const blob = new Blob([bytes], { type: "image/png" });
          await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        base64.b64encode(draw.png(draw.colours(3, 40, 60))).decode(),
    )
    page.page.keyboard.press("Control+V")
    wait_for(page, "60 × 40")


def test_a_photograph_of_the_camera_is_opened(visit, jpeg):
    page = visit(360, 740, is_mobile=True, has_touch=True)
    camera = page.page.locator("#camera")
    assert camera.get_attribute("capture") is not None
    assert "image/" in camera.get_attribute("accept")
    camera.set_input_files({"name": "shot.jpg", "mimeType": "image/jpeg", "buffer": jpeg})
    wait_for(page, "shot.jpg: 200 × 150")


@pytest.mark.slow
def test_results_whose_bitmaps_were_freed_come_back(visit, draw):
    """Each picture has 6 megapixels, so that undoing twelve moments reaches behind the 64 that are kept."""
    page = visit()
    page.page.set_default_timeout(60_000)
    buffer = io.BytesIO()
    Image.fromarray(draw.colours(5, 20, 30)).resize((3000, 2000), Image.Resampling.NEAREST).save(
        buffer, "PNG", compress_level=1
    )
    page.open("large.png", buffer.getvalue())
    page["brush-size"].fill("40")
    results = []
    for i in range(12):
        page.page.mouse.click(*page.at(300 + 200 * i, 400 + 100 * i))
        page.run()
        results.append(page.saved("download"))
    for i in reversed(range(11)):
        page["undo"].click()  # the result
        page["undo"].click()  # its stroke, in its turn: while the result's picture is decoded again, or after it
        page.page.wait_for_selector("#stage[aria-busy=false]")
        assert page.saved("download") == results[i]
    for _ in range(3):
        page["undo"].click()
        page["redo"].click()
    page["undo"].click()
    page.page.wait_for_selector("#stage[aria-busy=false]")
    assert page["download"].is_disabled()
    assert page.mask()[400, 300]  # the first mask, folded twelve results ago
