"""Lowerings of Local-λ: the file, the export with it, and a model that is lowered again."""

import json

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from moebius.network.lambda_ops import default_tile
from moebius_export.commands.app import app
from moebius_export.errors import ExportError
from moebius_export.graph.cost import node_costs, total_macs
from moebius_export.graph.functions import FORMS
from moebius_export.graph.sessions import session_of_bytes
from moebius_export.lowering.lowering import TARGETS, Lowering, lowering_of, read_lowerings, shipped, write_lowerings
from moebius_export.lowering.relower import local_lambdas, present_lowering, relowered
from moebius_export.onnx_export.export import ExportOptions, export_onnx

OTHER = Lowering(form="tiles", tiles={16: (4, 4), 8: (2, 4)})
# float32 sums in another order through six layers; a wrong place or tap costs 1e-2 and more
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def unet(fused_bundle):
    path = fused_bundle / "unet/model.onnx"
    return path, onnx.load(str(path), load_external_data=False)


def inputs():
    rng = np.random.default_rng(3)
    sample = rng.standard_normal((1, 9, 16, 16), dtype=np.float32)
    return {"sample": sample, "timestep": np.array([400]), "guidance_scale": np.array([2.0], np.float32)}


def output(path, model):
    return session_of_bytes(model.SerializeToString(), path, False).run(None, inputs())[0]


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def attributes(model):
    return [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in local_lambdas(model)]


# ---- the file ----------------------------------------------------------------------------------------------------


def test_every_target_ships_with_a_choice_of_a_known_form():
    assert set(shipped()) == set(TARGETS)
    assert {lowering.form for lowering in shipped().values()} == set(FORMS)
    for side, tile in shipped()["ort-cpu"].tiles.items():
        assert tile == default_tile(side, side)


def test_a_file_comes_back_as_it_was_written(tmp_path):
    lowerings = {"ort-cpu": OTHER, "generic": Lowering(form="convolution")}
    write_lowerings(lowerings, tmp_path / "l.json")
    assert read_lowerings(tmp_path / "l.json") == lowerings
    assert OTHER.tile(16) == (4, 4)
    assert OTHER.tile(32) == default_tile(32, 32)  # not named


def of_tiles(**tiles):
    return json.dumps({"ort-cpu": {"form": "tiles", "tiles": tiles}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "content: Invalid JSON"),
        ("[]", "content: Input should be an object, got"),
        ("{" * 10_000, "content: Invalid JSON"),
        (" " * 70_000 + "{}", "over 64 KiB"),
        ('{"gpu": {"form": "tiles"}}', "gpu"),
        ('{"ort-cpu": {"form": "dense"}}', "ort-cpu.form: Input should be 'tiles' or 'convolution', got 'dense'"),
        ('{"ort-cpu": {"form": "tiles", "tile": {}}}', "ort-cpu.tile: Extra inputs are not permitted"),
        (of_tiles(**{"64": [3, 8]}), "tiles of 3x8 do not divide 64x64"),
        (of_tiles(**{"64": [0, 8]}), "ort-cpu.tiles.64.0: Input should be greater than or equal to 1, got 0"),
        (of_tiles(**{"64": [-2, 8]}), "greater than or equal to 1, got -2"),
        (of_tiles(**{"64": [2.0, 8]}), "ort-cpu.tiles.64.0: Input should be a valid integer, got 2.0"),
        (of_tiles(**{"64": [True, 8]}), "ort-cpu.tiles.64.0: Input should be a valid integer, got True"),
        (of_tiles(**{"64": [2]}), "ort-cpu.tiles.64"),
        (of_tiles(**{"64": [2, 8, 1]}), "ort-cpu.tiles.64"),
        (of_tiles(**{"0": [1, 1]}), "ort-cpu.tiles.0"),
        (of_tiles(**{"x": [1, 1]}), "ort-cpu.tiles.x"),
        (of_tiles(**{"64": [64, 64]}), "tiles of 64x64 have 4096 positions, at most 256"),
        (of_tiles(**{"99999999999999999999": [1, 1]}), "ort-cpu.tiles.9999"),
    ],
)
def test_hostile_files_are_refused_with_what_was_found_and_what_is_expected(tmp_path, text, words):
    path = tmp_path / "l.json"
    path.write_text(text)
    with pytest.raises(ExportError) as caught:
        read_lowerings(path)
    message = str(caught.value)
    assert words in message
    assert '{"ort-cpu": {"form": "tiles", "tiles": {"64": [2, 8]}}}' in message
    assert "moebius-export tune" in message
    assert len(message) < 600


@pytest.mark.parametrize("content", [b"\xff\xfe", b'{"ort-cpu\x1b[31m": {}}'])
def test_bytes_that_are_no_text_and_control_characters(tmp_path, content):
    (tmp_path / "l.json").write_bytes(content)
    with pytest.raises(ExportError) as caught:
        read_lowerings(tmp_path / "l.json")
    assert str(caught.value).isprintable()


def test_a_folder_a_missing_file_and_a_missing_target(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(ExportError, match="expected lowerings such as"):
            read_lowerings(path)
    write_lowerings({"ort-cpu": OTHER}, tmp_path / "l.json")
    assert lowering_of(tmp_path / "l.json", "ort-cpu") == OTHER
    with pytest.raises(ExportError, match="lowerings for ort-cpu, none for generic"):
        lowering_of(tmp_path / "l.json", "generic")


# ---- the export with a file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lowering", "missing.json"], "missing.json: No such file"),
        (["--no-fuse", "--lowering", "l.json"], "--lowering l.json has no effect with --no-fuse"),
        (["--target", "gpu"], "--target gpu: expected one of ort-cpu, tensorrt, webgpu, generic"),
    ],
)
def test_wrong_options_of_the_export(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["onnx", "--out", "b", *arguments])
    assert words in str(result.exception)
    assert result.exception.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_export_with_a_lowering_is_what_lowering_its_file_again_gives(unet, tmp_path):
    path, model = unet
    options = ExportOptions(weights="stand-in", vae="stand-in", preset="tiny", lowering=OTHER)
    export_onnx(tmp_path / "b", options)
    exported_path = tmp_path / "b/unet/model.onnx"
    exported = onnx.load(str(exported_path), load_external_data=False)
    again = relowered(model, OTHER)
    assert present_lowering(exported) == OTHER == present_lowering(again)
    assert attributes(exported) == attributes(again)
    assert total_macs(node_costs(exported)) == total_macs(node_costs(again))
    # Two exports, maybe by two processes: PyTorch sums the constants in another order on other threads (1.3e-6 seen).
    assert distance(output(exported_path, exported), output(path, again)) < 1e-5


# ---- a model lowered again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lowering", [OTHER, Lowering(form="convolution"), Lowering(tiles={16: (16, 16), 8: (8, 8)})], ids=str
)
def test_another_lowering_is_the_same_network(unet, lowering):
    path, model = unet
    before = model.SerializeToString()
    changed = relowered(model, lowering)
    assert model.SerializeToString() == before
    assert present_lowering(changed).form == lowering.form
    expected = output(path, model)
    assert distance(output(path, changed), expected) < TOLERANCE
    back = relowered(changed, present_lowering(model))
    assert attributes(back) == attributes(model)
    assert np.array_equal(output(path, back), expected)
    used = {name for node in changed.graph.node for name in node.input}
    assert {tensor.name for tensor in changed.graph.initializer} <= used


def test_near_misses_are_refused(unet, tiny_bundle):
    _, model = unet
    plain = onnx.load(str(tiny_bundle / "unet/model.onnx"), load_external_data=False)
    with pytest.raises(ExportError, match=r"no node LocalLambda.*--no-fuse"):
        present_lowering(plain)
    with pytest.raises(ExportError, match="tiles of 3x4 do not divide 16x16"):
        relowered(model, Lowering.model_construct(form="tiles", tiles={16: (3, 4)}))
    mixed = onnx.ModelProto.FromString(model.SerializeToString())
    tile = next(a for a in local_lambdas(mixed)[0].attribute if a.name == "tile")
    tile.ints[:] = [2, 8]
    with pytest.raises(ExportError, match="not lowered alike"):
        present_lowering(mixed)
    computed = onnx.ModelProto.FromString(model.SerializeToString())
    local_lambdas(computed)[0].input[3] = computed.graph.node[0].output[0]
    with pytest.raises(ExportError, match="no constant"):
        relowered(computed, OTHER)
