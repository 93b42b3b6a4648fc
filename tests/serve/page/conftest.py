"""Fixtures of the tests of the page: Debian's Chromium by playwright, and what a person does on the page."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


_SPEC = importlib.util.spec_from_file_location("page_tools", Path(__file__).with_name("tools.py"))
_TOOLS = sys.modules["page_tools"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_TOOLS)


@pytest.fixture(scope="session")
def tools() -> ModuleType:
    """What a person does with the page's tools: tools.py."""
    return _TOOLS


class Clicked:
    """A segmentation model that finds a square around the click."""

    name = "squares"

    def segment(self, rgb, clicks):
        area = np.zeros(rgb.shape[:2], bool)
        x, y = int(clicks[0, 0]), int(clicks[0, 1])
        area[y - 10 : y + 10, x - 10 : x + 10] = True
        return area


@pytest.fixture(scope="module")
def live(serve):
    return serve(segmenter=Clicked())


@pytest.fixture(scope="module")
def browser() -> Iterator:
    sync_api = pytest.importorskip("playwright.sync_api", reason="tests of the page need: pip install playwright")
    if not CHROMIUM:
        pytest.skip("tests of the page need Chromium: apt install chromium, or CHROMIUM=PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """The page, with what a person does on it in one line each."""

    def __init__(self, page, url) -> None:
        self.page, self.url = page, url
        self.problems: list[str] = []
        self.requests: list[str] = []
        page.on("request", lambda one: self.requests.append(one.url))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda one: self.problems.append(one.text) if one.type in ("error", "warning") else None)
        page.goto(url)
        page.wait_for_selector("#mode option", state="attached")
        self.size = (0, 0)

    def __getitem__(self, name):
        return self.page.get_by_test_id(name)

    def state(self, *states: str) -> None:
        # Selectors, as the page's policy forbids what evaluates strings.
        self.page.wait_for_selector(", ".join(f"body[data-state={one}]" for one in states))

    def words(self) -> str:
        return self["status"].inner_text()

    def open(self, name: str, data: bytes) -> None:
        self.size = Image.open(io.BytesIO(data)).size
        self["open-file"].set_input_files({"name": name, "mimeType": "image/*", "buffer": data})
        self.page.wait_for_selector(f"#status:has-text('{name}: ')")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A pixel of the picture on the screen, where the picture is shown as a whole."""
        box, (width, height) = self["stage"].bounding_box(), self.size
        scale = min(box["width"] / width, box["height"] / height, 8) * 0.98
        return (
            box["x"] + (box["width"] - width * scale) / 2 + x * scale,
            box["y"] + (box["height"] - height * scale) / 2 + y * scale,
        )

    def drag(self, *points: tuple[float, float], button: str = "left") -> None:
        mouse = self.page.mouse
        places = [self.at(*point) for point in points]
        mouse.move(*places[0])
        mouse.down(button=button)
        for place in places[1:]:
            mouse.move(*place, steps=4)
        mouse.up(button=button)

    def mask(self) -> np.ndarray:
        """What "Save" of the mask gives, bool [H, W]."""
        return np.asarray(Image.open(io.BytesIO(self.saved("mask-save"))).convert("L")) > 127

    def saved(self, name: str) -> bytes:
        with self.page.expect_download() as download:
            self[name].click()
        return Path(download.value.path()).read_bytes()

    def run(self) -> None:
        self["run"].click()
        self.state("done", "error")
        assert "Done" in self.words(), self.words()


@pytest.fixture
def visit(browser, live):
    """visit(width=1440, height=900, scheme="light", **of the browser's context): the page, checked at the end."""
    opened = []

    def open_page(width=1000, height=700, scheme="light", server=live, path="/", **more) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **more)
        context.set_default_timeout(20_000)
        page = Page(context.new_page(), server.url + path)
        opened.append((context, page, server))
        return page

    yield open_page
    for context, page, server in opened:
        foreign = [url for url in page.requests if not url.startswith((server.url, "blob:", "data:"))]
        context.close()
        assert foreign == []
        assert page.problems == []


@pytest.fixture(scope="module")
def jpeg(draw) -> bytes:
    """200 x 150, with EXIF, as a camera would give it."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    smooth = Image.fromarray(draw.colours(3, 15, 20)).resize((200, 150), Image.Resampling.BICUBIC)
    smooth.save(buffer, "JPEG", quality=92, exif=exif)
    return buffer.getvalue()
