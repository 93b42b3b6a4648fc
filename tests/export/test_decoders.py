"""The optional decoders: the full one in two parts, exact for a whole window, and the tiny one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from moebius import VaeDecoder, preset  # noqa: E402
from moebius.errors import CheckpointError  # noqa: E402
from moebius.network.tiny_vae import TinyDecoder, build_tiny_vae  # noqa: E402
from moebius.network.vae import build_vae  # noqa: E402
from moebius.weights.load import load_tiny_vae  # noqa: E402
from moebius_export.network.masked_decoder import BLOCK, LowerDecoder, UpperDecoder, window_affine  # noqa: E402
from moebius_export.onnx_export import export as exporting  # noqa: E402
from moebius_export.onnx_export.record import mode_defaults, weights_info  # noqa: E402
from moebius_export.rules import rewrite_decoder_part, rewrite_tiny_decoder  # noqa: E402
from moebius_runtime import Bundle, decoding  # noqa: E402
from moebius_runtime.bundle.manifest import read_manifest  # noqa: E402
from moebius_runtime.errors import InputError  # noqa: E402
from moebius_runtime.pipeline import InpaintPipeline, make_options  # noqa: E402


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    made = build_vae(preset("tiny").vae).eval()
    with torch.no_grad():  # norms with gains and shifts of their own, which fresh ones have not
        for module in made.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
    return made


def overview(features):
    return features[:, :, BLOCK // 2 :: BLOCK, BLOCK // 2 :: BLOCK]


@pytest.fixture(scope="module")
def parts(vae):
    """Latents, their full decode, the features and their overview."""
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        features = LowerDecoder(vae)(latents)
        return latents, VaeDecoder(vae)(latents), features, overview(features)


def test_a_window_of_the_whole_square_is_the_full_decode(vae, parts):
    """Then the overview's statistics over the window are those over the square, and nothing is moved."""
    _, full, features, small = parts
    with torch.inference_mode():
        whole = UpperDecoder(vae)(features, small, torch.ones(1, 1, 8, 8))
    assert (whole - full).abs().max() < 1e-6
    assert full.std() > 0.1


@pytest.mark.parametrize("names", [(), ("sub_pixel_upsampling", "fuse_conv3x3", "fuse_group_norm")])
def test_rewrites_keep_the_parts_results(vae, parts, names):
    latents, _, features, small = parts
    inside = torch.zeros(1, 1, 8, 8)
    inside[:, :, 2:6, 1:5] = 1
    window = features[:, :, 8:24, 4:20]
    with torch.inference_mode():
        for module, inputs in (
            (LowerDecoder(vae).eval(), (latents,)),
            (UpperDecoder(vae).eval(), (window, small, inside)),
        ):
            rewritten, outcomes = rewrite_decoder_part(module, names)
            assert len(outcomes) == len(names)
            assert all(outcome.fired for outcome in outcomes)
            assert (rewritten(*inputs) - module(*inputs)).abs().max() < 2e-5


def test_the_affine_by_hand():
    """Group norm of the window with the square's statistics, where the overview is the window's own relation."""
    rng = np.random.RandomState(0)
    groups, channels, eps = 2, 6, 1e-3
    square = rng.standard_normal((channels, 8, 8)) * rng.uniform(0.5, 3, (channels, 1, 1)) + rng.uniform(-2, 2)
    square[:, :, 4:] = square[:, :, 4:] * 3 + 1
    inside = np.zeros((8, 8), bool)
    inside[1:6, 2:5] = True
    gain, shift = rng.standard_normal(channels), rng.standard_normal(channels)
    window = square[:, 1:6, 2:5]

    def tensor(array):
        return torch.from_numpy(np.asarray(array, np.float64))

    own_gain, own_shift = window_affine(
        tensor(gain), tensor(shift), tensor(square)[None], tensor(inside)[None, None], groups, eps
    )
    normed = F.group_norm(tensor(window)[None], groups, own_gain, own_shift, eps)[0].numpy()
    # The overview is the square itself here, so the result must be the square's own group norm, cut to the window.
    expected = F.group_norm(tensor(square)[None], groups, tensor(gain), tensor(shift), eps)[0].numpy()[:, 1:6, 2:5]
    np.testing.assert_allclose(normed, expected, rtol=1e-12, atol=1e-12)


def test_windows_are_aligned_and_hold_what_is_needed(fused_bundle):
    manifest = read_manifest(fused_bundle)
    side = manifest.decoders["vae_decoder_lower"].outputs[0].shape[2]
    block = side // manifest.decoders["vae_decoder_upper"].inputs[1].shape[2]
    size = manifest.geometry.image_size
    cell = size // side
    rng = np.random.RandomState(0)
    margin, smallest, largest = decoding.MARGIN, decoding.SMALLEST, decoding.LARGEST
    seen = 0
    try:
        decoding.MARGIN, decoding.SMALLEST = 2, 12  # windows smaller than the tiny square of 32 cells
        for _ in range(300):
            top, left = rng.randint(0, size - 1, 2)
            bottom, right = min(size, top + rng.randint(1, 40)), min(size, left + rng.randint(1, 40))
            window = decoding.window_of((slice(top, bottom), slice(left, right)), manifest)
            if window is None:
                continue
            seen += 1
            for part, first, last in ((window.rows, top, bottom), (window.columns, left, right)):
                assert 0 <= part.start < part.stop <= side
                assert part.start % block == part.stop % block == 0
                assert part.stop - part.start >= 12
                assert part.start * cell <= max(0, first - 2 * cell)
                assert part.stop * cell >= min(size, last + 2 * cell)
        decoding.SMALLEST = 4 * side  # more than there is
        assert decoding.window_of((slice(3, 9), slice(size - 4, size)), manifest) is None
    finally:
        decoding.MARGIN, decoding.SMALLEST, decoding.LARGEST = margin, smallest, largest
    assert seen > 200


@pytest.mark.parametrize("runtime", ["ort-cpu", "torch"])
def test_masked_against_full_in_a_picture(fused_bundle, runtime, monkeypatch):
    """The same picture within a few grey levels, outside of the mask bit-exact; the parts run, the full one does not.

    Random test weights of the tiny preset have no picture's statistics: the bound is of this case, measured 5.0 (wrong
    statistics are the matter of `test_the_affine_by_hand`).
    """
    monkeypatch.setattr(decoding, "MARGIN", 4)
    monkeypatch.setattr(decoding, "SMALLEST", 12)
    pipeline = InpaintPipeline.from_bundle(fused_bundle, runtime, threads=1)
    pixels = np.random.RandomState(0).randint(0, 256, (128, 128, 3)).astype(np.uint8)
    mask = np.zeros((128, 128), np.uint8)
    mask[50:70, 60:85] = 255
    ran, real = [], pipeline.backend.run
    pipeline.backend.run = lambda graph, inputs: (ran.append(graph), real(graph, inputs))[1]
    results = {}
    for decode in ("full", "masked"):
        image = pipeline(
            Image.fromarray(pixels), Image.fromarray(mask), mode="balanced", steps=2, decode=decode, mask_dilate=0,
            blend="hard",
        )  # fmt: skip
        results[decode] = np.asarray(image).astype(int)
    assert ran.count("vae_decoder") == ran.count("vae_decoder_lower") == ran.count("vae_decoder_upper") == 1
    difference = np.abs(results["masked"] - results["full"])
    assert difference[mask == 0].max() == 0
    assert difference[mask > 0].mean() < 8
    assert np.abs(results["full"] - pixels)[mask > 0].mean() > 20


# --- the tiny decoder ---------------------------------------------------------------------------------------


def test_tiny_decoder_is_diffusers_own():
    """With the weights of a file, the wrapper gives `AutoencoderTiny.decode`."""
    vae, checkpoint = load_tiny_vae("stand-in:3")
    assert checkpoint.stand_in
    latents = torch.randn(2, 4, 8, 8)
    with torch.inference_mode():
        expected = vae.decode(latents).sample
        rewritten, outcomes = rewrite_tiny_decoder(TinyDecoder(vae).eval())
        assert torch.equal(TinyDecoder(vae)(latents), expected)
        assert (rewritten(latents) - expected).abs().max() < 1e-5
    assert [(one.name, one.fired) for one in outcomes] == [("fuse_conv3x3", 32)]


def test_tiny_weights_of_other_sizes_are_refused(tmp_path):
    from safetensors.torch import save_file

    tensors = build_tiny_vae().state_dict()
    (tmp_path / "config.json").write_text('{"latent_channels": 16}')
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="latent_channels = 16, a tiny decoder for these latents has 4"):
        load_tiny_vae(str(tmp_path))
    del tensors["decoder.layers.0.bias"]
    (tmp_path / "config.json").unlink()
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder.layers.0.bias"):
        load_tiny_vae(str(tmp_path))


@pytest.fixture(scope="module")
def bundle_with_tiny(fused_bundle, tmp_path_factory):
    """The fused bundle with a tiny decoder, written by the exporter's own function."""
    import shutil

    from moebius_runtime.bundle.manifest import FileInfo, Manifest, write_manifest
    from moebius_runtime.files import sha256_file

    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    shutil.copytree(fused_bundle, folder)
    options = exporting.ExportOptions("stand-in", "stand-in", "tiny", tiny_decoder="stand-in:3")
    vae, checkpoint = exporting._tiny_vae("stand-in:3", preset("tiny"), lambda *stage: None)
    modules = {"vae_decoder_tiny": TinyDecoder(vae).eval()}
    written = exporting._write_graphs(
        folder, "vae_decoder_tiny", modules, preset("tiny"), options, lambda *stage: None
    )["vae_decoder_tiny"]
    assert 0 < written.parity.relative_error < 3e-5  # `check_parity` compared it with PyTorch
    manifest = read_manifest(folder)
    files = dict(manifest.files)
    for path in (folder / "vae_decoder_tiny").iterdir():
        name = f"vae_decoder_tiny/{path.name}"
        files[name] = FileInfo(size=path.stat().st_size, sha256=sha256_file(path))
    update = {
        "files": files,
        "decoders": {**manifest.decoders, "vae_decoder_tiny": written.info},
        "modes": mode_defaults({}, tiny=True),
        "model": manifest.model.model_copy(update={"tiny_decoder": weights_info(checkpoint)}),
    }
    write_manifest(Manifest.model_validate(manifest.model_copy(update=update).model_dump()), folder)
    return folder


@pytest.mark.parametrize("for_gpu", [False, True])
def test_an_inlined_bundle_has_no_functions_in_its_optional_decoders(bundle_with_tiny, tmp_path, for_gpu):
    """Also for WebGPU, whose rules apply to them too. A window of another size than the export's gives the same."""
    from moebius_export.onnx_export.inline import inline_bundle
    from moebius_export.onnx_export.parity import run_file
    from moebius_export.trajectories.scenes import seeded_inputs

    inline_bundle(bundle_with_tiny, tmp_path / "out", for_gpu=for_gpu)
    before, after = Bundle.open(bundle_with_tiny), Bundle.open(tmp_path / "out")
    for graph in before.manifest.decoders:
        old, new = before.model_file(graph), after.model_file(graph)
        assert onnx.load(old, load_external_data=False).functions
        model = onnx.load(new, load_external_data=False)
        assert not model.functions
        assert {entry.domain for entry in model.opset_import} == {node.domain for node in model.graph.node} == {""}
        inputs = seeded_inputs(graph, before.manifest, 5)
        if graph == "vae_decoder_upper":
            inputs["features"] = np.ascontiguousarray(inputs["features"][:, :, :-4])
            inputs["inside"][:, :, len(inputs["inside"][0, 0]) // 2 - 1 :] = 0
        expected, got = run_file(old, inputs), run_file(new, inputs)
        assert np.linalg.norm(got - expected) < 3e-5 * np.linalg.norm(expected)  # the export's own budget


@pytest.mark.parametrize("runtime", ["ort-cpu", "torch"])
def test_the_tiny_decoder_decodes(bundle_with_tiny, runtime):
    pipeline = InpaintPipeline.from_bundle(bundle_with_tiny, runtime, threads=1)
    ran, real = [], pipeline.backend.run
    pipeline.backend.run = lambda graph, inputs: (ran.append((graph, inputs)), real(graph, inputs))[1]
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (128, 128, 3)).astype(np.uint8))
    mask = np.zeros((128, 128), np.uint8)
    mask[50:70, 60:85] = 255
    options = {"steps": 1, "blend": "hard", "mask_dilate": 0}
    filled = np.asarray(pipeline(image, Image.fromarray(mask), mode="fast", **options))
    graph, inputs = ran[-1]
    assert graph == "vae_decoder_tiny"  # the bundle's mode `fast` names it
    vae, _ = load_tiny_vae("stand-in:3")
    with torch.inference_mode():
        decoded = vae.decode(torch.from_numpy(inputs["latent"])).sample[0].numpy()
    expected = (np.clip((decoded + 1) / 2, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    assert np.abs(filled[mask > 0].astype(int) - expected[mask > 0]).max() <= 1
    del ran[:]
    pipeline(image, Image.fromarray(mask), mode="fast", vae_decoder="full", **options)
    assert "vae_decoder_tiny" not in [graph for graph, _ in ran]


def test_a_bundle_without_one_refuses(fused_bundle):
    pipeline = InpaintPipeline.from_bundle(fused_bundle, threads=1)
    with pytest.raises(InputError, match="no graph vae_decoder_tiny"):
        pipeline.check(make_options(vae_decoder="tiny"))
    assert read_manifest(fused_bundle).modes["fast"].vae_decoder == "full"


# --- what other commands do with them -----------------------------------------------------------------------


@pytest.mark.parametrize("only", [False, True])
def test_parts_go_with_the_fp32_weights_that_they_share(bundle_with_tiny, tmp_path, only):
    """`--precision fp16` alone removes the decoder's fp32 files, and with them the parts; the tiny decoder stays."""
    from moebius_export.precision.write import linked
    from moebius_runtime.bundle.bundle import Bundle

    bundle = Bundle.open(bundle_with_tiny)
    files = linked(bundle, tmp_path, "fp16", only, bundle.manifest.graphs.keys())
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert set(files) == there
    parts = {"vae_decoder/model_lower.onnx", "vae_decoder/model_upper.onnx"}
    assert (parts & there) == (set() if only else parts)
    assert "vae_decoder_tiny/model.onnx" in there


def test_open_sizes_run_without_compiled_kernels(fused_bundle, vae):
    """The bodies of the functions, as runtimes without our kernels run them, at two sizes that were not traced."""
    from moebius_export.onnx_export.parity import run_file

    manifest = read_manifest(fused_bundle)
    file = fused_bundle / manifest.decoders["vae_decoder_upper"].files["fp32"].model
    rng = np.random.RandomState(0)
    for height, width in ((8, 12), (20, 4)):
        inside = np.zeros((1, 1, 8, 8), np.float32)
        inside[:, :, :3, 2:5] = 1
        inputs = {
            "features": rng.standard_normal((1, 24, height, width)).astype(np.float32),
            "overview": rng.standard_normal((1, 24, 8, 8)).astype(np.float32),
            "inside": inside,
        }
        bodies, compiled = (run_file(file, inputs, kernels=kernels) for kernels in (False, True))
        assert bodies.shape == (1, 3, 4 * height, 4 * width)
        if compiled is not None:
            np.testing.assert_allclose(compiled, bodies, rtol=0, atol=2e-4)
