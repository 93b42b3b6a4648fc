"""The report as text, JSON and page."""

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from moebius_bench.measure.processes import Answer
from moebius_bench.measure.results import GraphProfile, OpShare, Report, Settings
from moebius_bench.measure.rounds import Plan, measure_variants
from moebius_bench.measure.variants import Variant
from moebius_bench.report import messages
from moebius_bench.report.html_report import page
from moebius_bench.report.text_report import print_report


@pytest.fixture
def report(tiny_bundle, worker_result, rate_result, cost_result):
    """Two variants and a failed one, with a profile, power and names that are no HTML."""
    seconds = {"A <fast>": 0.1, "B": 0.25}

    def run(job):
        if job.kind == "rate":
            return Answer(rate_result)
        if job.kind == "cost":
            return Answer(cost_result)
        if job.runtime == "C":
            return Answer(None, "the process was ended by SIGKILL")
        samples = [(-1.0, 7.0), (100.0, 7.0)]
        return Answer(worker_result(seconds[job.runtime]), samples=samples)

    variants = [Variant(str(tiny_bundle), name, "fp32", 2, None, name) for name in ("A <fast>", "B", "C")]
    measured = measure_variants(variants, Plan(rounds=2), run, lambda number, what: None, "a test")
    shares = [OpShare(name=f"down_blocks.{i}/Conv&{i}", seconds=0.01, share=0.1, count=i) for i in range(10)]
    profile = GraphProfile(graph="unet", runs=2, by_type=shares, by_node=shares, by_part=shares, by_provider=shares[:1])
    rows = [measured.variants[0].model_copy(update={"profile": [profile]}), *measured.variants[1:]]
    settings = Settings(
        rounds=2, repeats=1, warmup_steps=1, seed=0, guidance_scale=None, picture="drawn", order=measured.order
    )
    return Report(
        created="2026-11-21T00:00:00+00:00",
        version="0.1.0",
        machine={"cpu": "A <processor>", "cores": "2"},
        gpus=[{"index": "0", "when": "before", "name": "NVIDIA X"}],
        installed={"numpy": 70_000_000, "onnxruntime": 69_000_000},
        settings=settings,
        variants=rows,
        ratios=measured.ratios,
        rates=measured.rates,
        notes=["stand-in weights [bold]"],
    )


def text(report, width=None):
    stream = io.StringIO()
    print_report(
        report, Console(file=stream, width=width, force_terminal=width is not None, color_system=None, soft_wrap=True)
    )
    return stream.getvalue()


def test_the_text(report):
    found = text(report)
    for words in (
        "A <fast>",
        "8 x 100 ms",
        "8 x 250 ms",
        "failed: the process was ended by SIGKILL",
        "A <fast> over B, step: 0.40x (0.40 to 0.40, 2 rounds)",
        "step: 315.98 GMAC a run, 3159.77 GMAC/s, 2394% of the matrix-product rate",
        "matrix-product rate of this machine: 132.00 GMAC/s fp32",
        "min = 100 ms, max = 100 ms, mean = 100 ms, median = 100 ms, p90 = 100 ms, p99 = 100 ms, drift 1.000",
        "Not measured: the first picture of each process, with 1 step",
        "read from a test",
        "note: stand-in weights [bold]",
        "installed: 139 MB",
        "down_blocks.9/Conv&9",
    ):
        assert words in found, words
    assert re.search(r"^C +- .*failed$", found, re.MULTILINE)


def test_the_table_fits_a_narrow_terminal(report):
    table = text(report, width=80).split("\n\n")[0]
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in table
    for name in ("encode", "step", "decode", "total", "memory", "status"):
        assert name in lines[0]


def test_json_keeps_everything(report):
    again = Report.model_validate_json(report.model_dump_json(indent=1))
    assert again == report
    content = report.model_dump(mode="json")
    assert content["schema_version"] == 1
    assert {"machine", "settings", "variants", "ratios", "rates", "notes", "installed", "gpus"} <= content.keys()
    row = content["variants"][0]
    assert {"step", "stage_seconds", "cold_seconds", "load_seconds", "peak_memory", "cost", "profile"} <= row.keys()
    assert row["bundle"]["manifest_sha256"]


class _Reader(HTMLParser):
    """Collects tags and text, and counts what is opened and closed."""

    VOID = ("meta", "img", "br", "line", "rect", "polyline", "circle")

    def __init__(self):
        super().__init__()
        self.open, self.words, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_whole_and_asks_for_nothing(report):
    html = page(report)
    reader = _Reader()
    reader.feed(html)
    assert reader.open == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe", html)
    assert not [a for a in reader.attributes if a[1] in ("src", "href") or a[1].startswith("on")]
    assert ("meta", "name", "viewport") in reader.attributes
    assert "prefers-color-scheme:dark" in html


def test_the_page_says_what_the_text_says(report):
    reader = _Reader()
    reader.feed(page(report))
    words = " ".join(reader.words)
    for row in report.variants:
        assert row.name in words
    for part in (
        messages.ratio_line(report.ratios[0]),
        messages.step_line(report.variants[0]),
        messages.rate_line(report.rates[0]),
        messages.warmup_line(report),
        "C: the process was ended by SIGKILL",
        "A <processor>",
        "stand-in weights [bold]",
        "down_blocks.9/Conv&9",
    ):
        assert part in words, part
    assert words.count("J a picture") >= 2


def test_drawings_keep_to_their_scale(report):
    html = page(report)
    bars = re.findall(r'<rect style="fill:var\(--c\d\)" x="([\d.]+)" y="2" width="([\d.]+)"', html)
    assert len(bars) >= 10  # five stages of two variants
    assert all(float(x) + float(width) <= 1000.1 for x, width in bars)
    points = [float(y) for path in re.findall(r'points="([^"]+)"', html) for y in re.findall(r",([\d.]+)", path)]
    assert points
    assert min(points) >= 10  # the slowest step of all touches the top line
    assert max(points) <= 200


def test_a_report_without_a_finished_variant(report):
    failed = report.model_copy(update={"variants": [report.variants[2]], "ratios": [], "rates": []})
    assert "SIGKILL" in page(failed)
    assert "SIGKILL" in text(failed)


TIMES = [
    (0.0000214, "0.0214 ms"),
    (0.0431, "43.1 ms"),
    (0.9994, "999 ms"),
    (0.9996, "1 s"),
    (8.124, "8.12 s"),
    (12.34, "12.3 s"),
    (61.2, "61 s"),
]


@pytest.mark.parametrize(("value", "words"), TIMES)
def test_times_in_words(value, words):
    assert messages.seconds(value) == words


def test_sizes_in_words():
    assert [messages.size(v) for v in (12, 1_234, 904_888_320, 1_200_000_000)] == [
        "12 B",
        "1.23 kB",
        "905 MB",
        "1.2 GB",
    ]
