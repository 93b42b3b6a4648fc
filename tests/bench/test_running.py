"""The parent: order, ratios, failures. Workers are played by functions."""

import pytest

from moebius_bench.measure.processes import Answer
from moebius_bench.measure.rounds import Plan, bundle_facts, measure_variants
from moebius_bench.measure.variants import Variant
from moebius_runtime.errors import BundleError


@pytest.fixture
def play(tiny_bundle, worker_result, rate_result, cost_result):
    """Measures variants whose workers are `answers[name]`: a function of the round, or None for the usual result."""

    def measure(names, answers=None, rounds=3, baseline=None, precision="fp32", **plan):
        seen, counts = [], {}

        def run(job):
            seen.append((job.kind, job.runtime))
            if job.kind == "rate" and job.precision == "int8_cpu":
                macs = {name: 4 * value for name, value in rate_result["macs_per_second"].items()} | {"count": 7}
                return Answer(dict(rate_result, runtime=job.runtime, kind="bytes", macs_per_second=macs))
            if job.kind == "rate":
                return Answer(dict(rate_result, runtime=job.runtime))
            if job.kind == "cost":
                return Answer(cost_result)
            if job.kind == "profile":
                return Answer(None, "no profile here")
            counts[job.runtime] = counts.get(job.runtime, 0) + 1
            answer = (answers or {}).get(job.runtime, lambda number: Answer(worker_result()))(counts[job.runtime])
            return answer

        variants = [
            Variant(str(tiny_bundle), name, precision, 2, None, name, baseline=name == baseline) for name in names
        ]
        return measure_variants(variants, Plan(rounds=rounds, **plan), run, lambda number, what: None), seen

    return measure


def test_variants_run_in_turn_after_the_machine_s_rate(play):
    measured, seen = play(["A", "B"], rounds=2)
    round_ = [("rate", "A"), ("rate", "B"), ("measure", "A"), ("measure", "B")]
    assert seen == [*round_, *round_, ("cost", "A"), ("cost", "B")]
    assert measured.order == ["A", "B", "A", "B"]


def test_a_slow_variant_is_found_although_the_machine_drifts(play, worker_result):
    """B takes twice as long; every round the machine gets half as fast."""
    answers = {
        "A": lambda number: Answer(worker_result(0.1 * 2**number)),
        "B": lambda number: Answer(worker_result(0.2 * 2**number)),
    }
    measured, _ = play(["B", "A"], answers, rounds=4)
    step = next(r for r in measured.ratios if r.what == "step")
    assert (step.above, step.below) == ("B", "A")
    assert step.rounds == pytest.approx([2.0] * 4)
    total = next(r for r in measured.ratios if r.what == "total")
    assert 1 < total.median < 2  # the other stages take the same time in both


def test_a_baseline_is_held_against_every_variant(play):
    measured, _ = play(["A", "B", "base"], baseline="base")
    assert [(r.above, r.below) for r in measured.ratios if r.what == "step"] == [("base", "A"), ("base", "B")]


def test_the_row_of_a_variant(play):
    row = play(["A"], rounds=2)[0].variants[0]
    assert (row.status, row.steps, row.peak_memory) == ("ok", 8, 3_000_000_000)
    assert row.stage_seconds["encode"].median == pytest.approx(0.4)  # both runs of a picture
    assert row.stage_seconds["step"].median == pytest.approx(0.8)
    assert row.cold_seconds["step"].median == pytest.approx(0.3)
    assert row.load_seconds["unet"].median == 2.0
    assert row.step.p50 == pytest.approx(0.1)
    assert row.step.count == 16
    assert row.total_seconds.median == pytest.approx(0.01 + 0.4 + 0.8 + 0.5 + 0.02)
    assert row.output_sha256 == ["ab" * 32] * 2


def test_speed_is_held_against_the_machine_s_own_rate(play):
    step = play(["A"])[0].variants[0].cost["step"]
    assert step.macs == 315_977_082_112  # both branches: the graph with guidance ran
    assert step.macs_per_second == pytest.approx(3.15977082112e12)
    assert step.share_of_rate == pytest.approx(3159.77082112 / 132)
    assert (step.byte_macs, step.least_seconds) == (0, pytest.approx(315.977082112 / 132))


def test_products_of_bytes_are_held_against_the_rate_of_bytes(play, cost_result):
    """300 of the step's 315.98 GMAC are of bytes, which this machine makes four times as fast."""
    cost_result["unet"]["bytes"] = 300_000_000_000
    measured, seen = play(["A"], rounds=1, precision="int8_cpu")
    assert seen[:3] == [("rate", "A"), ("rate", "A"), ("measure", "A")]
    assert [rate.kind for rate in measured.rates] == ["fp32", "bytes"]
    step = measured.variants[0].cost["step"]
    least = 300 / 528 + 15.977082112 / 132
    assert (step.byte_macs, step.least_seconds) == (300_000_000_000, pytest.approx(least))
    assert step.share_of_rate == pytest.approx(least / 0.1)


def test_the_conditional_graph_s_cost_counts_where_it_ran(play, worker_result):
    result = worker_result()
    result["load_seconds"] = {"vae_encoder": 1.0, "unet_conditional": 1.0, "vae_decoder": 1.0}
    row = play(["A"], {"A": lambda number: Answer(result)})[0].variants[0]
    assert row.cost["step"].macs == 157_988_541_056


def test_a_variant_that_fails_is_reported_and_the_others_go_on(play, worker_result):
    def second_time(number):
        return Answer(worker_result()) if number == 1 else Answer(None, "out of memory")

    measured, seen = play(["A", "B"], {"B": second_time}, rounds=3)
    good, bad = measured.variants
    assert (good.status, good.step.count) == ("ok", 24)
    assert (bad.status, bad.reason, bad.step, bad.cost) == ("failed", "out of memory", None, {})
    assert seen.count(("measure", "B")) == 2  # not tried again
    assert measured.ratios == []


def test_a_picture_that_changes_between_rounds_is_not_ok(play, worker_result):
    answers = {"A": lambda number: Answer(worker_result(sha256=f"{number:064d}"))}
    row = play(["A"], answers)[0].variants[0]
    assert row.status == "unstable"
    assert "differs between rounds" in row.reason


def test_what_could_not_be_measured_is_said(play):
    measured, _ = play(["A"], profile=True)
    assert measured.notes == ["A: no profile: no profile here"]
    assert measured.variants[0].profile == []


def test_energy_is_that_of_the_counted_picture(play, worker_result):
    """10 W before the picture begins at 5 s, 20 W from then on."""
    samples = [(4.0, 10.0), (4.999, 10.0), (5.0, 20.0), (8.0, 20.0)]
    answers = {"A": lambda number: Answer(worker_result(began=5.0), samples=samples)}
    power = play(["A"], answers)[0].variants[0].power
    assert power.watts.median == pytest.approx(20)
    assert power.joules_per_picture.median == pytest.approx(20 * 1.73)


def test_device_memory_is_the_peak_of_all_rounds(play, worker_result):
    peaks = {"A": lambda number: Answer(worker_result(), peak_device_memory=number * 100)}
    assert play(["A"], peaks)[0].variants[0].peak_device_memory == 300
    assert play(["A"])[0].variants[0].peak_device_memory is None


def test_facts_of_a_bundle(tiny_bundle, tmp_path):
    facts = bundle_facts(str(tiny_bundle))
    assert (facts.preset, facts.stand_in, facts.image_size) == ("tiny", True, 128)
    assert facts.files["unet/model.onnx.data"] == (tiny_bundle / "unet/model.onnx.data").stat().st_size
    assert len(facts.manifest_sha256) == 64
    with pytest.raises(BundleError):
        bundle_facts(str(tmp_path))
