"""The pages' parts: everything from outside is escaped, and what a plot draws is where its numbers are."""

import base64
import io
import re

import jinja2
import numpy as np
import pytest
from PIL import Image

from moebius_export.pages import plots, png_uri, render

HOSTILE = "<script>alert('x')</script>\""
TEMPLATE = """{% extends "base.html" %}{% import "parts.html" as parts with context %}{% block body %}
{{ parts.facts({name: name}) }}{{ parts.table((name, ""), [((name, "good"), (name, ""))]) }}
{{ parts.pictures([(name, uri)]) }}{{ parts.legend([name]) }}
{{ parts.headed(name, name, plots.bar({name: 1.0}, 1.0, name)) }}
{{ plots.log_lines([(name, [1.0])], 1.0, name)[0] }}{{ plots.lines([(name, [1.0])], 1.0, name) }}
{{ plots.interval(0.5, 1.0, 2.0, 2.0, name) }}{% endblock %}"""


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(TEMPLATE)
    return path


def test_everything_is_escaped(template):
    uri = png_uri(np.zeros((4, 4, 3), np.uint8))
    text = render(template, title=HOSTILE, name=HOSTILE, uri=uri)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 15
    assert "http" not in text
    assert text.endswith("</html>")


def test_a_name_that_was_forgotten_is_an_error(template):
    with pytest.raises(jinja2.UndefinedError):
        render(template, title="", name="")


def test_pictures_are_shrunk_pngs_inside_the_page():
    pixels = np.random.RandomState(0).randint(0, 256, (100, 50, 3)).astype(np.uint8)
    data = base64.b64decode(png_uri(pixels, 200).partition("base64,")[2])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    small = base64.b64decode(png_uri(pixels, 40).partition("base64,")[2])
    assert Image.open(io.BytesIO(small)).size == (20, 40)


def points(plot):
    return [
        [tuple(map(float, pair.split(","))) for pair in line.split()] for line in re.findall(r'points="([^"]+)"', plot)
    ]


def test_a_log_plot_puts_a_decade_every_tenfold():
    drawing, scale = plots.log_lines([("drift", [1e-6, 1e-5, 1e-4])], 1e-4, "label")
    (line,) = points(drawing)
    assert line == [(0, 200), (500, 105), (1000, 10)]
    assert "from 1e-6 to 1e-4" in scale


def test_what_has_no_logarithm_leaves_a_gap():
    drawing, _ = plots.log_lines([("drift", [0.0, 1e-6, float("nan"), 1e-4, 1e-4])], 1e-4, "label")
    first, second = points(drawing)
    assert [x for x, _ in first] == [250, 254]  # one value alone is a short stroke
    assert [x for x, _ in second] == [750, 1000]
    assert "<svg" in plots.log_lines([("nothing", [])], 0.0, "label")[0]
