"""The pages' parts: everything from outside is escaped, and what a plot draws is where its numbers are."""

import base64
import io
import re

import numpy as np
from PIL import Image

from moebius_runtime import webpage

HOSTILE = "<script>alert('x')</script>\""


def test_everything_is_escaped():
    parts = [
        webpage.facts({HOSTILE: HOSTILE}),
        webpage.table((HOSTILE, ""), [((HOSTILE, "good"), (HOSTILE, ""))]),
        webpage.log_plot([(HOSTILE, [1.0])], 1.0, HOSTILE),
        webpage.pictures([(HOSTILE, np.zeros((4, 4, 3), np.uint8))]),
    ]
    text = webpage.document(HOSTILE, parts)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 8
    assert "http" not in text
    assert text.endswith("</html>\n")


def test_pictures_are_shrunk_pngs_inside_the_page():
    pixels = np.random.RandomState(0).randint(0, 256, (100, 50, 3)).astype(np.uint8)
    data = base64.b64decode(webpage.png_uri(pixels, 200).partition("base64,")[2])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    small = base64.b64decode(webpage.png_uri(pixels, 40).partition("base64,")[2])
    assert Image.open(io.BytesIO(small)).size == (20, 40)


def points(plot):
    return [
        [tuple(map(float, pair.split(","))) for pair in line.split()] for line in re.findall(r'points="([^"]+)"', plot)
    ]


def test_a_log_plot_puts_a_decade_every_tenfold():
    (line,) = points(webpage.log_plot([("drift", [1e-6, 1e-5, 1e-4])], 1e-4, "label"))
    assert line == [(0, 200), (500, 105), (1000, 10)]


def test_what_has_no_logarithm_leaves_a_gap():
    plot = webpage.log_plot([("drift", [0.0, 1e-6, float("nan"), 1e-4, 1e-4])], 1e-4, "label")
    first, second = points(plot)
    assert [x for x, _ in first] == [250, 254]  # one value alone is a short stroke
    assert [x for x, _ in second] == [750, 1000]
    assert "nan" in plot  # in words
    assert "<svg" in webpage.log_plot([("nothing", [])], 0.0, "label")
