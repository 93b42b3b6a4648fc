"""`moebius-export tune`: what it compares, how it judges, and what it writes. No test asserts a time."""

import math

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from moebius_export.commands.app import app
from moebius_export.errors import ExportError
from moebius_export.lowering import tune as tuning
from moebius_export.lowering.lowering import Lowering, read_lowerings, shipped
from moebius_export.lowering.relower import relowered
from moebius_export.lowering.tune import BODIES, WHOLE, body_times, candidate_tiles, candidates, tune
from moebius_runtime.kernels import SWITCH

PRESENT = Lowering(tiles={16: (1, 16), 8: (1, 8)})


def event(name, milliseconds):
    return {"name": f"{name}_kernel_time", "dur": 1000 * milliseconds}


def test_candidates_divide_their_side_and_each_comes_once():
    assert candidate_tiles(8) == [(1, 8), (2, 8), (4, 4), (4, 8), (8, 8)]
    assert candidate_tiles(64)[-1] == (1, 64)
    assert candidate_tiles(6) == [(1, 6)]
    *tiled, convolution = candidates(PRESENT)
    for side in PRESENT.tiles:
        seen = [one.tiles[side] for one in tiled]
        assert set(candidate_tiles(side)) <= {*seen, PRESENT.tiles[side]}
    assert convolution.form == "convolution"


def test_times_go_to_the_body_that_a_node_is_of():
    events = [
        event("down/MatMul", 1),
        event("_inlfunc_LocalLambda_q", 2),
        event("ReorderOutput_token_9", 4),  # inside a body
        event("_inlfunc_LocalLambda_y", 8),
        event("ReorderInput_token_8", 16),  # between two
        event("_inlfunc_FeedForward_y", 32),
        event("_inlfunc_LocalLambda_token_10_y", 64),
        event("_inlfunc_LocalLambda_token_9_y", 128),
    ]
    assert body_times(events, [16, 8, 16]) == {16: 14 + 64, 8: 128, BODIES: 206, WHOLE: 255}
    with pytest.raises(ExportError, match="3 bodies of LocalLambda where the graph has 2"):
        body_times(events, [16, 8])


@pytest.fixture
def planted(monkeypatch):
    """Sets what bodies take, by (form, side, tile), where nothing is said 10 ms; the present's repeats differ by 1."""

    def plant(milliseconds, once_more=None):
        calls = []

        class Played:
            def __init__(self, *_):
                pass

            def __call__(self, present, tried):
                calls.append(tried)
                said = milliseconds if len(calls) == 1 or once_more is None else once_more

                def times(lowering):
                    sides = {
                        side: [said.get((lowering.form, side, tile), 10) + extra for extra in (-1, 0, 1)]
                        for side, tile in lowering.tiles.items()
                    }
                    sides[BODIES] = [sum(run) for run in zip(*sides.values(), strict=True)]
                    return sides | {WHOLE: [100 + run for run in sides[BODIES]]}

                return [tuning._Beside(one, times(one), times(present)) for one in tried]

        monkeypatch.setattr(tuning, "_Comparison", Played)
        return calls

    return plant


def test_the_best_of_each_resolution_is_kept_and_measured_together(planted, fused_bundle):
    calls = planted({("tiles", 16, (4, 4)): 5, ("tiles", 16, (2, 8)): 4, ("tiles", 8, (4, 8)): 6})
    result = tune(fused_bundle, 3)
    assert result.present == PRESENT
    assert result.chosen == Lowering(tiles={16: (2, 8), 8: (4, 8)})
    assert calls[1] == [result.chosen]
    kept = {(row.side, row.name): row.ratio for row in result.rows if row.kept}
    assert kept == {(16, "2x8"): 0.4, (8, "4x8"): 0.6, (BODIES, "chosen, once more"): 0.5}


def test_a_gain_within_the_spread_of_the_repeats_is_no_gain(planted, fused_bundle):
    calls = planted({("tiles", 16, (4, 4)): 8.1, ("tiles", 8, (4, 4)): 12})
    result = tune(fused_bundle, 3)
    assert result.spread[16] == 2
    assert result.chosen == PRESENT
    assert len(calls) == 1
    assert not any(row.kept for row in result.rows)


def test_a_gain_that_does_not_come_again_is_given_up(planted, fused_bundle):
    planted({("tiles", 16, (4, 4)): 5}, once_more={})
    result = tune(fused_bundle, 3)
    assert result.chosen == PRESENT
    assert result.rows[-1].name == "chosen, once more"
    assert not any(row.kept for row in result.rows)


def test_the_convolution_is_taken_where_it_beats_the_best_tiles_together(planted, fused_bundle):
    convolution = {("convolution", 16, (1, 16)): 2, ("convolution", 8, (1, 8)): 3}
    planted(convolution)
    assert tune(fused_bundle, 3).chosen.form == "convolution"
    planted(convolution | {("tiles", 16, (4, 4)): 1, ("tiles", 8, (4, 4)): 1})
    assert tune(fused_bundle, 3).chosen == Lowering(tiles={16: (4, 4), 8: (4, 4)})


def test_a_file_in_the_convolution_form_is_compared_from_the_default_tiles(planted, fused_bundle_copy):
    model = onnx.load(str(fused_bundle_copy / "unet/model.onnx"), load_external_data=False)
    relower_in_place(fused_bundle_copy, relowered(model, Lowering(form="convolution")))
    planted({})
    result = tune(fused_bundle_copy, 3)
    assert result.present == PRESENT
    assert "the body 'convolution'" in result.notes[0]


def relower_in_place(bundle, model):
    """Exchanges the guided U-Net, with a manifest that fits."""
    from moebius_runtime.bundle.manifest import FileInfo, read_manifest, write_manifest
    from moebius_runtime.files import sha256_file

    path = bundle / "unet/model.onnx"
    path.write_bytes(model.SerializeToString())
    manifest = read_manifest(bundle)
    info = FileInfo(size=path.stat().st_size, sha256=sha256_file(path))
    write_manifest(manifest.model_copy(update={"files": manifest.files | {"unet/model.onnx": info}}), bundle)


# ---- with sessions that run ---------------------------------------------------------------------------------------


def planted_fault(model, lowering):
    """As `relowered`, but for one resolution's tiles of 4x4 a wrong index: a neighbourhood moved by one position."""
    changed = relowered(model, lowering)
    for tensor in changed.graph.initializer:
        if tensor.name.startswith("local_lambda.neighbours.16x16.4x4"):
            table = np.roll(onnx.numpy_helper.to_array(tensor), 1)
            tensor.CopyFrom(onnx.numpy_helper.from_array(table, tensor.name))
    return changed


def test_a_candidate_that_disagrees_is_refused_and_never_kept(fused_bundle):
    result = tune(fused_bundle, 2, rewrite=planted_fault)
    (first, *rest) = result.refused
    assert (first.side, first.name) == (16, "4x4")
    assert "differs by" in first.refused
    assert math.isnan(first.milliseconds)
    assert not first.kept
    assert {row.side for row in rest} == {8}  # it was run with one of the other resolution
    assert result.chosen.tiles[16] != (4, 4)
    assert all(row.milliseconds > 0 for row in result.rows if not row.refused)


def test_every_layer_is_found_in_the_profile_in_every_form(fused_bundle):
    result = tune(fused_bundle, 2)
    assert not result.refused
    assert {row.side for row in result.rows} >= {16, 8, WHOLE}
    names = {(row.side, row.name) for row in result.rows}
    for side, tile in PRESENT.tiles.items():
        assert {f"{t[0]}x{t[1]}" for t in candidate_tiles(side) if t != tile} == {n for s, n in names if s == side}


@pytest.mark.slow
def test_the_command_writes_a_file_that_the_export_reads(fused_bundle, tmp_path):
    out = tmp_path / "l.json"
    before = (fused_bundle / "unet/model.onnx").read_bytes()
    result = CliRunner().invoke(app, ["tune", str(fused_bundle), "--out", str(out), "--rounds", "2"])
    assert result.exit_code == 0, result.output
    lowerings = read_lowerings(out)
    assert set(lowerings) == set(shipped())
    assert lowerings["tensorrt"] == shipped()["tensorrt"]
    assert set(lowerings["ort-cpu"].tiles) == {64, 32, 16, 8}
    assert "whole step" in result.output
    assert f"--lowering {out}" in result.output
    assert (fused_bundle / "unet/model.onnx").read_bytes() == before


def test_the_command_says_where_compiled_kernels_make_the_choice_idle(planted, fused_bundle, tmp_path, monkeypatch):
    planted({})
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr("moebius_runtime.kernels.library_path", lambda: tmp_path)
    result = CliRunner().invoke(app, ["tune", str(fused_bundle), "--out", str(tmp_path / "l.json")])
    assert result.exit_code == 0
    assert "with compiled kernels this node is one kernel" in result.stderr


def test_a_disagreement_leaves_with_exit_code_1(fused_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "AGREEMENT", -1.0)
    result = CliRunner().invoke(app, ["tune", str(fused_bundle), "--out", str(tmp_path / "l.json"), "--rounds", "2"])
    assert result.exit_code == 1
    assert "refused: differs by" in result.stderr
    assert read_lowerings(tmp_path / "l.json") == shipped()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--rounds", "1"], "--rounds 1: expected 2 to 100"), (["--out", "."], "it is a folder")],
)
def test_wrong_use(fused_bundle, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["tune", str(fused_bundle), *arguments])
    assert words in str(result.exception)
    assert result.exception.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_fused_operators_is_refused(tiny_bundle, tmp_path):
    result = CliRunner().invoke(app, ["tune", str(tiny_bundle), "--out", str(tmp_path / "l.json")])
    assert "no node LocalLambda" in str(result.exception)
    assert list(tmp_path.iterdir()) == []
