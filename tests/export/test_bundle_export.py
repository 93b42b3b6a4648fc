"""`moebius-export onnx`: what a bundle holds, that it equals PyTorch, and that it appears whole or not at all."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from moebius import VaeDecoder, VaeEncoder, preset
from moebius.errors import CheckpointError
from moebius.weights.load import load_student, load_vae
from moebius.weights.sampling_record import SamplingRecord
from moebius_export.errors import ExportError, ParityError
from moebius_export.network.wrappers import ConditionalUNet, GuidedUNet
from moebius_export.onnx_export import export as exporting
from moebius_export.onnx_export.convert import IR_VERSION, OPSET, GraphSpec
from moebius_export.onnx_export.examples import example_inputs
from moebius_export.onnx_export.export import ExportOptions, export_onnx
from moebius_export.onnx_export.parity import check_parity, reference_output, run_file, unet_references
from moebius_export.onnx_export.record import Written
from moebius_runtime import Bundle, InpaintOptions
from moebius_runtime.bundle.check_values import check_inputs, inputs_digest, relative_error
from moebius_runtime.bundle.manifest import read_manifest

TINY = {"weights": "stand-in", "vae": "stand-in", "preset": "tiny"}


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_layout_and_manifest(tiny_bundle):
    assert files_of(tiny_bundle) == [
        "manifest.json",
        "unet/model.onnx",
        "unet/model.onnx.data",
        "unet/model_conditional.onnx",
        "vae_decoder/model.onnx",
        "vae_decoder/model.onnx.data",
        "vae_encoder/model.onnx",
        "vae_encoder/model.onnx.data",
    ]
    manifest = read_manifest(tiny_bundle)
    assert set(manifest.files) == set(files_of(tiny_bundle)) - {"manifest.json"}
    assert manifest.stand_in
    student, _ = load_student("stand-in", preset("tiny").student)
    assert manifest.model.parameters == sum(parameter.numel() for parameter in student.parameters())
    assert [tensor.model_dump() for tensor in manifest.graphs["unet"].inputs] == [
        {"name": "sample", "dtype": "float32", "shape": [1, 9, 16, 16]},
        {"name": "timestep", "dtype": "int64", "shape": [1]},
        {"name": "guidance_scale", "dtype": "float32", "shape": [1]},
    ]
    for graph in manifest.graphs:
        Bundle.open(tiny_bundle).model_file(graph)


@pytest.mark.parametrize("graph", ["unet", "unet_conditional", "vae_encoder", "vae_decoder"])
def test_the_manifest_holds_pytorchs_values_to_check_devices_by(fused_bundle, graph):
    """The runtime draws the inputs again; a float32 run is 3e-6 from PyTorch (3e-5 is the export's own budget)."""
    bundle = Bundle.open(fused_bundle)
    check, info = bundle.manifest.checks[graph], bundle.graph(graph)
    inputs = check_inputs(info, check.drawn)
    assert inputs_digest(inputs) == check.inputs_sha256
    output = run_file(bundle.model_file(graph), inputs)
    assert relative_error(check, output) < 3e-5
    assert relative_error(check, output[..., ::-1]) > 0.5


def test_graphs_are_of_the_pinned_versions_with_the_manifests_inputs(tiny_bundle):
    manifest = read_manifest(tiny_bundle)
    for graph in manifest.graphs.values():
        model = onnx.load(tiny_bundle / graph.files["fp32"].model, load_external_data=False)
        assert model.ir_version == IR_VERSION == 10
        assert {entry.domain: entry.version for entry in model.opset_import} == {"": OPSET} == {"": 20}
        assert [value.name for value in model.graph.input] == [tensor.name for tensor in graph.inputs]
        for value, tensor in zip(model.graph.input, graph.inputs, strict=True):
            assert [d.dim_value for d in value.type.tensor_type.shape.dim] == tensor.shape


def test_both_unets_share_their_weights(tiny_bundle):
    """The conditional graph adds little to the shared file: constants of its own branch."""

    def referenced(name):
        model = onnx.load(tiny_bundle / "unet" / name, load_external_data=False)
        entries = [{e.key: e.value for e in tensor.external_data} for tensor in model.graph.initializer]
        return {(int(entry["offset"]), int(entry["length"])) for entry in entries if entry}

    guided, conditional = referenced("model.onnx"), referenced("model_conditional.onnx")
    assert sum(length for _, length in conditional - guided) < 0.25 * sum(length for _, length in guided)
    assert all(offset % 4096 == 0 for offset, _ in guided | conditional)


def test_every_file_equals_pytorch_on_other_inputs_than_the_exports(tiny_bundle):
    """2e-5 relative: float32 on both sides; measured 1e-6 to 4e-6 on these graphs."""
    student, _ = load_student("stand-in", preset("tiny").student)
    vae, _ = load_vae("stand-in", preset("tiny").vae)
    modules = {
        "unet": GuidedUNet(student),
        "unet_conditional": ConditionalUNet(student),
        "vae_encoder": VaeEncoder(vae),
        "vae_decoder": VaeDecoder(vae),
    }
    rng = np.random.RandomState(99)
    for name, graph in read_manifest(tiny_bundle).graphs.items():
        inputs = {
            tensor.name: np.array([77])
            if tensor.dtype == "int64"
            else rng.standard_normal(tensor.shape).astype(np.float32)
            for tensor in graph.inputs
        }
        with torch.inference_mode():
            expected = modules[name](*(torch.from_numpy(array) for array in inputs.values())).numpy()
        got = run_file(tiny_bundle / graph.files["fp32"].model, inputs)
        assert np.linalg.norm(got - expected) < 2e-5 * np.linalg.norm(expected), name


def test_a_picture_through_the_exported_bundle(tiny_bundle):
    from moebius_runtime import InpaintPipeline
    from moebius_runtime.images.pictures import Picture

    rng = np.random.RandomState(3)
    picture = Picture(rng.randint(0, 256, (150, 170, 3)).astype(np.uint8), "RGB")
    mask = np.zeros((150, 170), bool)
    mask[40:80, 60:90] = True
    pipeline = InpaintPipeline.from_bundle(tiny_bundle)
    options = InpaintOptions(steps=2, blend="hard", mask_dilate=0)
    first, second = (pipeline.inpaint(picture, mask, options).picture for _ in range(2))
    assert np.array_equal(first.pixels, second.pixels)
    assert np.array_equal(first.pixels[~mask], picture.pixels[~mask])
    assert (first.pixels[mask] != picture.pixels[mask]).any(axis=1).mean() > 0.9


def test_parity_refuses_a_wrong_result(tiny_bundle):

    vae, _ = load_vae("stand-in", preset("tiny").vae)
    spec = GraphSpec("vae_encoder", VaeEncoder(vae), example_inputs("vae_encoder", preset("tiny"), 1), "latent")
    expected, path = reference_output(spec), tiny_bundle / "vae_encoder" / "model.onnx"
    assert check_parity(spec, path, expected).relative_error < 2e-5
    with pytest.raises(ParityError, match="relative error"):
        check_parity(spec, path, expected * 1.0001)
    with pytest.raises(ParityError, match="constant or not finite"):
        check_parity(spec, path, np.zeros_like(expected))
    with pytest.raises(ParityError, match="the file gives"):
        check_parity(spec, path, expected[..., :8])


@pytest.fixture
def failing_export(monkeypatch):
    """The export, cut short by an error after the first graph is on disk."""

    def fail(*_args, **_kwargs):
        raise ParityError("planted")

    monkeypatch.setattr(exporting, "to_onnx", lambda spec, on_stage: small_model())
    monkeypatch.setattr(exporting, "check_parity", fail)


def small_model():
    x = onnx.helper.make_tensor_value_info("sample", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("noise_pred", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["sample"], ["noise_pred"])], "g", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def test_a_failed_export_leaves_nothing(failing_export, tmp_path):
    with pytest.raises(ParityError, match="planted"):
        export_onnx(tmp_path / "new", ExportOptions(**TINY))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_old_bundle(failing_export, tiny_copy):
    before = {name: (tiny_copy / name).read_bytes() for name in files_of(tiny_copy)}
    with pytest.raises(ParityError, match="planted"):
        export_onnx(tiny_copy, ExportOptions(**TINY))
    assert {name: (tiny_copy / name).read_bytes() for name in files_of(tiny_copy)} == before
    assert [path.name for path in tiny_copy.parent.iterdir()] == ["bundle"]


def test_a_folder_that_is_no_bundle_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    with pytest.raises(ExportError, match="is not a bundle"):
        export_onnx(tmp_path / "photos", ExportOptions(**TINY))
    assert (tmp_path / "photos" / "a.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weights": "/nowhere/model.bin"}, CheckpointError, "nowhere"),
        ({"weights": "stand-in:x"}, CheckpointError, "SEED"),
        ({"preset": "huge"}, CheckpointError, "full, small, tiny"),
        ({"batch": 0}, ExportError, "1 to 64"),
        ({"target": "gpu"}, ExportError, "--target gpu: expected one of ort-cpu, tensorrt, webgpu, generic"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        export_onnx(tmp_path / "b", ExportOptions(**(TINY | change)))
    assert list(tmp_path.iterdir()) == []


def test_a_vae_of_other_sizes_is_refused(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(
        json.dumps({"block_out_channels": [8, 16], "scaling_factor": 0.18215})
    )
    with pytest.raises(CheckpointError, match="block_out_channels"):
        load_vae(str(tmp_path / "vae"), preset("tiny").vae)
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 0.18215}))
    with pytest.raises(CheckpointError, match=r"scaling_factor = 0\.18215"):
        load_vae(str(tmp_path / "vae"), preset("tiny").vae)


@pytest.mark.parametrize(
    ("weights", "given", "scale"),
    [
        ("stand-in", None, 2.5),
        ("stand-in", 1.75, 1.75),
        ("hub:hustvl/Moebius/ft_celebahq", None, 2.0),
        ("ffhq", None, 2.0),
        ("places2", None, 2.5),
        ("ffhq", 3.0, 3.0),
    ],
)
def test_the_default_guidance_of_a_bundle(tiny_bundle, tmp_path, monkeypatch, weights, given, scale):
    """Only the loading and the graphs are replaced, which have their own tests."""
    loaded, made = load_student("stand-in", preset("tiny").student), read_manifest(tiny_bundle)

    def written(folder, group, *_):
        shutil.copytree(tiny_bundle / group, folder / group)
        names = [name for name in made.graphs if name.startswith(group)]
        return {name: Written(made.graphs[name], made.parity[name], [], made.checks[name]) for name in names}

    monkeypatch.setattr(exporting, "load_student", lambda *_: loaded)
    monkeypatch.setattr(exporting, "check_prediction_type", lambda *_: None)
    monkeypatch.setattr(exporting, "read_sampling_record", lambda *_: SamplingRecord())
    monkeypatch.setattr(exporting, "_write_graphs", written)
    options = ExportOptions(**{**TINY, "weights": weights}, guidance_scale=given)
    manifest = export_onnx(tmp_path / "bundle", options)
    assert manifest.defaults.guidance_scale == read_manifest(tmp_path / "bundle").defaults.guidance_scale == scale


@pytest.mark.parametrize("scale", [-0.1, 100.5, float("nan"), float("inf")])
def test_a_guidance_that_makes_no_sense_is_refused(tmp_path, scale):
    with pytest.raises(ExportError, match=r"--guidance-scale .*expected 0 to 100"):
        export_onnx(tmp_path / "bundle", ExportOptions(**TINY, guidance_scale=scale))


@pytest.mark.parametrize("batch", [1, 2])
def test_one_pass_gives_both_references_of_the_unet(batch):
    student, _ = load_student("stand-in", preset("tiny").student)
    modules = {"unet": GuidedUNet(student), "unet_conditional": ConditionalUNet(student)}
    guided, conditional = (
        GraphSpec(name, module, example_inputs(name, preset("tiny"), batch), "noise_pred")
        for name, module in modules.items()
    )
    outputs = unet_references(guided, conditional)
    assert np.array_equal(outputs[0], reference_output(guided))
    np.testing.assert_allclose(outputs[1], reference_output(conditional), atol=2e-6 * np.abs(outputs[1]).max())
    other = replace(conditional, inputs=example_inputs("unet_conditional", preset("tiny"), batch + 1))
    with pytest.raises(ValueError, match="the same sample and timestep"):
        unet_references(guided, other)
