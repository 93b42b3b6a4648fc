"""`moebius-bench layers`: run for real on the tiny sizes, and forms that differ are not timed."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from moebius.network.lambda_layers import InteractiveLambda, LocalLambda  # noqa: E402
from moebius_bench.paper import layers  # noqa: E402
from moebius_runtime.errors import OutputError  # noqa: E402


@pytest.fixture(autouse=True)
def _threads():
    """The command sets the number of threads of its process; here the process is every test's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cases():
    return {(case.name, case.size[0]): case for case in layers.layer_cases("tiny", 2)}


@pytest.mark.slow
def test_a_real_run(tmp_path):
    file = tmp_path / "layers.json"
    command = [sys.executable, "-m", "moebius_bench.cli", "layers", "--preset", "tiny", "--rounds", "2"]
    done = subprocess.run(
        [*command, "--threads", "1", "--json", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = layers.LayerReport.model_validate_json(file.read_text())
    assert (report.batch, report.rounds, report.rate.threads, report.weights) == (2, 2, 1, "stand-in:0")
    assert [(row.layer, row.side, row.channels, row.passes) for row in report.rows] == [
        (layer, side, channels, passes)
        for side, channels in ((16, 16), (8, 32))
        for layer in ("Local-λ", "Interactive-λ")
        for passes in ("forward", "forward+backward")
    ]
    for row in report.rows:
        assert 0 < row.difference <= layers.TOLERANCE  # two ways to compute round differently
        assert [row.seconds[form].count for form in ("reference", "fast")] == [2, 2]
        assert row.ratio.count == len(row.ratios) == 2
        for form, share in row.share_of_rate.items():
            if row.passes == "forward":
                rate = row.macs[form] / row.seconds[form].median / report.rate.macs_per_second.median
                assert share == pytest.approx(rate)
            else:
                assert share is None
        assert f"{row.ratio.median:.2f}x" in done.stdout
    assert "16x16 C=16" in done.stdout
    assert "8x8 C=32" in done.stdout


def test_products_are_counted_by_hand():
    """Local-λ and Interactive-λ as written, batch 2, 16x16, C = 16, 4 heads of depth 4, window 7, 6 tokens of 20."""
    n, c, h, d, m, context = 256, 16, 4, 4, 6, 20
    local = n * (c * c + 2 * c * d) + n * d * d + n * d * d * 7 * 7 + 2 * n * h * d * d
    interactive = n * c * c + 2 * m * context * d + m * d * d + n * m * d * d + 2 * n * h * d * d
    rows = {}
    for case in cases().values():
        rows |= {(row.layer, row.side): row.macs["reference"] for row in layers._time(case, 1, 0.0, 1e9)}
    assert rows["Local-λ", 16] == 2 * local
    assert rows["Interactive-λ", 16] == 2 * interactive


def test_the_timed_modes_and_forms(monkeypatch):
    """Forward in inference without gradients, both passes in training; forms side by side, each first in turn."""
    seen = []
    case = cases()["Local-λ", 8]
    case.layer.register_forward_hook(
        lambda layer, *_: seen.append((layer.form, layer.training, torch.is_grad_enabled()))
    )
    monkeypatch.setattr(layers, "module_macs", lambda *_: {"all": 1})
    rows = list(layers._time(case, 2, 0.0, 1.0))
    order = ["fast", "reference", "reference", "fast", "fast", "reference"]  # the first pair is not counted
    assert seen == [(form, False, False) for form in order] + [(form, True, True) for form in order]
    assert [row.ratio.count for row in rows] == [2, 2]


def test_ratios_are_as_written_over_fast(monkeypatch):
    """By a clock that goes 3 s for the form as written and 2 s for the fast one."""
    case = cases()["Interactive-λ", 8]
    now = 0.0

    def clock():
        return now

    def work(*_):
        nonlocal now
        now += {"reference": 3.0, "fast": 2.0}[case.layer.form]

    monkeypatch.setattr(layers, "module_macs", lambda *_: {"all": 4})
    monkeypatch.setattr(layers.time, "perf_counter", clock)
    case.layer.register_forward_hook(work)
    forward, both = layers._time(case, 3, 0.0, 8.0)
    assert forward.ratios == both.ratios == [1.5] * 3
    assert forward.share_of_rate == {"reference": pytest.approx(4 / 3 / 8), "fast": pytest.approx(4 / 2 / 8)}


@pytest.mark.parametrize(
    ("key", "kind"), [(("Local-λ", 16), LocalLambda), (("Interactive-λ", 8), InteractiveLambda)], ids=["local", "inter"]
)
def test_a_wrong_output_is_not_timed(key, kind, monkeypatch):
    """Ten tolerances off."""
    right = kind._fast
    monkeypatch.setattr(kind, "_fast", lambda *inputs: right(*inputs) * (1 + 10 * layers.TOLERANCE))
    monkeypatch.setattr(layers, "_time", lambda *_: pytest.fail("timed"))
    with pytest.raises(OutputError, match=r"the output in inference by 1\.0e-04.*nothing was timed"):
        layers.compare_forms(cases()[key])
    with pytest.raises(OutputError, match="differs from the original"):
        layers.measure_layers("tiny", 2, 1, 1, {}, lambda _: None)


def test_a_wrong_gradient_alone_is_seen(monkeypatch):
    """The right output, and a gradient of x that lacks a part; as is one that is not a number."""
    right = InteractiveLambda._fast
    for factor, words in ((1 + 1e-4, r"the gradient of x by"), (float("nan"), r"the gradient of x by nan")):

        def wrong(layer, x, context, size, factor=factor):
            x = x.clone()
            if x.requires_grad:
                x.register_hook(lambda gradient: gradient * factor)
            return right(layer, x, context, size)

        monkeypatch.setattr(InteractiveLambda, "_fast", wrong)
        with pytest.raises(OutputError, match=words) as raised:
            layers.compare_forms(cases()["Interactive-λ", 16])
        assert "output" not in str(raised.value)


def test_a_missing_gradient_is_seen(monkeypatch):
    right = InteractiveLambda._fast
    monkeypatch.setattr(
        InteractiveLambda, "_fast", lambda layer, x, context, size: right(layer, x, context.detach(), size)
    )
    with pytest.raises(OutputError, match="the fast form gives context no gradient"):
        layers.compare_forms(cases()["Interactive-λ", 16])
