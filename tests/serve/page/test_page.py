"""The page in Chromium: every tool, keyboard only, phones, dark mode, accessibility, and what leaves the server."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.xdist_group("page")


def test_the_download_is_the_file_of_the_command_line(visit, jpeg, filled_by_command):
    """Paint, run, download: byte for byte what `moebius-inpaint` writes with the mask that the page saves."""
    page = visit()
    page.open("holiday.jpg", jpeg)
    page.drag((60, 60), (90, 80))
    mask = page.saved("mask-save")
    page.run()
    with page.page.expect_download() as download:
        page["download"].click()
    assert download.value.suggested_filename == "holiday-filled.jpg"
    assert Path(download.value.path()).read_bytes() == filled_by_command(jpeg, mask, ".jpg")


def test_every_tool_marks_what_it_is_drawn_over(visit, jpeg, tools):
    page = visit()
    page.open("a.jpg", jpeg)
    tools.draw_with_every_tool(page)
    page["select-object"].click()
    page.page.mouse.click(*page.at(150, 100))
    page.page.wait_for_selector("#status:has-text('Selected')")
    assert page.mask()[91:109, 141:159].all()
    assert page.mask()[15:35, 15:55].all()  # added to what was marked


def test_the_mask_is_loaded_inverted_grown_and_undone(visit, draw, jpeg, tools):
    page = visit()
    page.open("a.jpg", jpeg)
    tools.load_change_and_undo_masks(page, draw.mask(150, 200), draw.png)


def test_zoom_pan_and_what_is_painted_there(visit, jpeg, tools):
    page = visit()
    page.open("a.jpg", jpeg)
    tools.zoom_and_pan(page)


def test_results_are_undone_compared_and_gone_on_from(visit, jpeg, tools):
    page = visit()
    page.open("a.jpg", jpeg)
    tools.go_on_from_results(page)


def test_a_run_is_cancelled(visit, live, jpeg):
    page = visit()
    page.open("a.jpg", jpeg)
    page["run"].click()
    page.state("error")
    assert "Nothing is marked" in page.words()
    page.drag((60, 60), (90, 80))
    live.held.hold()
    page["run"].click()
    assert live.held.inside.wait(20)
    assert page["run"].is_hidden()
    before = live.held.steps
    page["cancel"].click()
    page.page.wait_for_selector("#status:has-text('Cancelled')")
    live.held.free.set()
    assert page.mask()[70, 75]
    page.run()  # the next one
    assert live.held.steps - before <= 1 + 6


def test_picture_and_mask_survive_a_reload(visit, jpeg, filled_by_command, tools):
    page = visit()
    page.open("holiday.jpg", jpeg)
    page.drag((60, 60), (90, 80))
    mask = page.saved("mask-save")
    tools.reload(page)
    page.run()
    assert page.saved("download") == filled_by_command(jpeg, mask, ".jpg")
    tools.reload(page)


def test_with_the_keyboard_only(visit):
    """From the first tab stop to a downloaded file."""
    page = visit()
    keys = page.page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(40):
            keys.press("Tab")
            if page.page.evaluate("document.activeElement?.dataset.testid") == name:
                return
        raise AssertionError(f"{name} cannot be reached by Tab")

    tab_to("sample")
    keys.press("Enter")
    page.state("ready")
    page.page.locator("body").press("b")
    tab_to("stage")
    for key in ("ArrowLeft", "ArrowUp", "p", "ArrowRight", "p", "]", "p"):
        keys.press(key)
    keys.press("Enter")
    page.state("done", "error")
    assert "Done" in page.words()
    keys.press("Control+z")
    page.state("ready")
    keys.press("Control+Shift+z")
    page.state("done")
    page.page.evaluate("document.activeElement.blur()")
    with page.page.expect_download():
        tab_to("download")
        keys.press("Enter")


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (360, "dark"),
        (1440, "light"),
        pytest.param(360, "light", marks=pytest.mark.slow),
        pytest.param(1440, "dark", marks=pytest.mark.slow),
    ],
)
def test_phones_and_desktops_in_light_and_dark(visit, width, scheme, tmp_path):
    """Nothing is wider than the screen, the stage is in view, and axe-core finds no serious fault."""
    page = visit(width, 740, scheme)
    folder = Path(os.environ.get("MOEBIUS_SCREENSHOTS", tmp_path))
    page["sample"].click()
    page.state("ready")
    page.size = (451, 300)
    page.drag((150, 120), (200, 160))
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    assert page["stage"].bounding_box()["y"] < 400
    for name in ("run", "undo", "brush", "mask-save", "open-file"):
        box = page[name].bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    faults(page)
    page.run()
    page["compare"].click()
    page.page.locator("summary", has_text="Settings").click()
    faults(page)
    folder.mkdir(exist_ok=True)
    page.page.screenshot(path=folder / f"page-{width}-{scheme}.png")


def faults(page) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    script = Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    page.page.evaluate(script)
    found = page.page.evaluate("axe.run()")
    serious = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
    assert not serious, [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in serious]


def test_a_token_is_asked_for_and_the_link_carries_it(visit, serve, jpeg):
    from moebius_serve.guard import Access

    locked = serve(access=Access(token="s3cret & more"))
    page = visit(server=locked, path="/#token=s3cret%20%26%20more")
    page.open("a.jpg", jpeg)
    page.drag((60, 60), (90, 80))
    page.run()
    assert "token" not in page.page.url


def test_the_page_of_the_api(visit, live, browser):
    context = browser.new_context()
    page = context.new_page()
    page.goto(live.url + "/docs")
    page.wait_for_selector("summary:has-text('/api/v1/jobs')")
    assert page.locator("summary").count() >= 15
    context.close()


@pytest.mark.slow
def test_a_stroke_on_12_megapixels_is_fluid(visit, draw, record_property, tools):
    """Frame times are reported, not asserted. The stroke is undone, and a run leaves unmasked pixels unchanged."""
    page = visit(1200, 800)
    buffer = io.BytesIO()
    Image.fromarray(draw.colours(3, 30, 40)).resize((4000, 3000), Image.Resampling.NEAREST).save(
        buffer, "PNG", compress_level=1
    )
    page.open("large.png", buffer.getvalue())
    page["brush-size"].fill("100")
    page.page.evaluate("""() => {
      window.frames_ = []; let last = performance.now(); window.go_ = true;
      const next = (now) => {
        window.frames_.push(now - last);
        last = now;
        if (window.go_) requestAnimationFrame(next);
      };
      requestAnimationFrame(next);
    }""")
    page.drag(*[(800 + 60 * i, 1500 + 500 * np.sin(i / 3)) for i in range(40)])
    times = page.page.evaluate("() => { window.go_ = false; return window.frames_.slice(1); }")
    figures = {"frames": len(times), "median_ms": float(np.median(times)), "worst_ms": max(times)}
    record_property("stroke", figures)
    print(figures)
    mask = page.mask()
    assert mask.shape == (3000, 4000)
    assert mask[1500, 800]
    page["undo"].click()
    assert not page.mask().any()
    page.page.mouse.click(*page.at(2000, 1000))
    mask = page.mask()
    page.page.locator("summary", has_text="Settings").click()
    page.page.locator("#blend").select_option("hard")
    page.page.locator("#dilate").fill("0")
    page.page.set_default_timeout(60_000)
    page.run()
    changed = (tools.pixels(page.saved("download")) != tools.pixels(buffer.getvalue())).any(axis=2)
    assert 0.9 * mask.sum() < changed.sum()
    assert not changed[~mask].any()


def test_the_token_can_be_typed(browser, serve):
    from moebius_serve.guard import Access

    locked = serve(access=Access(token="s3cret"))
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.goto(locked.url)
    page.get_by_role("textbox", name="Token").fill("wrong")
    page.get_by_role("button", name="Use it").click()
    page.get_by_role("textbox", name="Token").fill("s3cret")
    page.get_by_role("button", name="Use it").click()
    page.wait_for_selector("#mode option", state="attached")
    page.reload()  # kept for this tab
    page.wait_for_selector("#mode option", state="attached")
    context.close()
