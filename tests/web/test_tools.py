"""Every tool of the page on a site, as tests/serve/page shows them on the served page."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.xdist_group("site"), pytest.mark.slow]  # the served page has short ones


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_mask_tools_zoom_and_pan(site, picture, tools, visit, serve_site):
    page = visit(serve_site(site).url)
    page.open("a.png", picture)
    assert page["select-object"].is_hidden()  # it needs a server
    tools.draw_with_every_tool(page)
    page.open("b.png", picture)
    given = np.zeros((150, 200), np.uint8)
    given[40:80, 48:80] = 255
    tools.load_change_and_undo_masks(page, given, png)
    page["mask-clear"].click()
    tools.zoom_and_pan(page)
    tools.reload(page)


def test_results(site, picture, tools, visit, serve_site):
    """Run, compare, run on the result, undo, redo, another one; the result survives a reload, and its file is PNG."""
    page = visit(serve_site(site).url)
    page.open("a.png", picture)
    page.page.locator("summary", has_text="Settings").click()
    page["mode"].select_option("fast")
    tools.go_on_from_results(page)
    tools.reload(page)
    with page.page.expect_download() as download:
        page["download"].click()
    assert download.value.suggested_filename == "a-filled.png"
    apart = (tools.pixels(page.saved("download")) != tools.pixels(picture)).any(axis=2)
    assert 0 < apart.sum() < 0.5 * apart.size


def test_a_run_is_cancelled_and_the_next_one_goes_through(site, paint, visit, serve_site):
    """1000 steps would take minutes; the next run has its own number."""
    page = visit(serve_site(site).url)
    mask = paint(page)
    page.page.locator("summary", has_text="Settings").click()
    page.page.locator("#steps").fill("1000")
    page["run"].click()
    page.page.wait_for_selector("#status:has-text('of 1000')")
    assert page["run"].is_hidden()
    page["cancel"].click()
    page.page.wait_for_selector("#status:has-text('Cancelled')")
    assert page.saved("mask-save") == mask
    page.page.locator("#steps").fill("2")
    page.run()
