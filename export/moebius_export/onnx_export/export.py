"""`moebius-export onnx`: weights in, a checked bundle out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import onnx
from torch import nn

from moebius import Preset, VaeDecoder, VaeEncoder, preset
from moebius.network.tiny_vae import TinyDecoder
from moebius.weights.checkpoint import Checkpoint
from moebius.weights.load import (
    DEFAULT_VAE,
    DEFAULT_WEIGHTS,
    check_prediction_type,
    default_guidance,
    load_student,
    load_tiny_vae,
    load_vae,
)
from moebius.weights.sampling_record import SamplingRecord, read_sampling_record
from moebius_export.errors import ExportError
from moebius_export.graph.weights_file import weights_file
from moebius_export.lowering.lowering import DEFAULT_TARGET, TARGETS, Lowering, Target, shipped
from moebius_export.network.masked_decoder import LowerDecoder, UpperDecoder
from moebius_export.network.module_cost import module_macs
from moebius_export.network.wrappers import ConditionalUNet, GuidedUNet, unet_graphs
from moebius_export.onnx_export.convert import GraphSpec, to_onnx
from moebius_export.onnx_export.earlier import keep_earlier
from moebius_export.onnx_export.examples import example_inputs
from moebius_export.onnx_export.inline import standard_form
from moebius_export.onnx_export.parallel import started
from moebius_export.onnx_export.parity import check_parity, reference_output, unet_references
from moebius_export.onnx_export.record import Written, graph_info, make_manifest, weights_info
from moebius_export.rules import (
    RULE_NAMES,
    check_names,
    rewrite_decoder,
    rewrite_decoder_part,
    rewrite_encoder,
    rewrite_tiny_decoder,
    rewrite_unet,
)
from moebius_export.rules.base import Outcome
from moebius_runtime.backends.ort import import_onnxruntime
from moebius_runtime.bundle.check_values import make_check
from moebius_runtime.bundle.manifest import (
    MANIFEST_NAME,
    GraphCheck,
    GraphFile,
    GraphName,
    Manifest,
    ModelInfo,
    Rewrite,
    WeightsInfo,
    write_manifest,
)
from moebius_runtime.decoding import MASKED
from moebius_runtime.files import atomic_write, placed_whole

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

Progress = Callable[[str, str], None]
"""Called with (graph, stage) when a stage begins."""

STAGES = ("reference", "rewrite", "trace", "simplify", "write", "check", "compare")


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    `batch` is B of every graph's input; `dynamic_batch` leaves it open instead. `rules` are the exact rewrites to
    apply (`moebius_export.rules`), all by default, none for the unfused network. `target` is the target of the λ
    operators' bodies and `lowering` their layout, by default the target's shipped one. `guidance_scale` is
    the bundle's default one, 0 to 100: None is the paper's for released weights, else the preset's. Weights whose
    `config.json` records distilled guidance have that one alone, and perhaps a sampler and a number of steps. `masked`
    also exports the decoder in two parts, for `--decode masked`. `inline` writes standard ONNX
    operators only, as does the target `webgpu`. `tiny_decoder` is the source of a tiny decoder, exported beside the
    full one.
    """

    weights: str = DEFAULT_WEIGHTS
    vae: str = DEFAULT_VAE
    preset: str = "full"
    batch: int = 1
    dynamic_batch: bool = False
    rules: tuple[str, ...] = RULE_NAMES
    target: Target = DEFAULT_TARGET
    lowering: Lowering | None = None
    guidance_scale: float | None = None
    masked: bool = True
    inline: bool = False
    tiny_decoder: str | None = None

    @property
    def lowered(self) -> Lowering:
        """`lowering`, or the target's."""
        return self.lowering or shipped()[self.target]


def export_onnx(
    out: str | Path,
    options: ExportOptions,
    progress: Progress = lambda graph, stage: None,
    note: Callable[[str], None] = lambda text: None,
    *,
    two_processes: bool = False,
) -> Manifest:
    """Exports a bundle and moves it to `out` once every file agrees with PyTorch.

    An older bundle at `out` is replaced. Its engines and files of other precisions stay where they still hold, see
    `earlier.keep_earlier`; `note` is called with a line for each that is removed.
    A folder that is no bundle is refused. `two_processes` exports the decoder beside the U-Net and the encoder where
    that is safe and two cores are there; `parallel.started` says which threads a program may have then.

    Raises:
        CheckpointError: weights are not available or do not fit.
        ParityError: a file does not give PyTorch's result.
        MoebiusError: `out` cannot be written, or an option is not valid.
    """
    if not 1 <= options.batch <= 64:
        raise ExportError(f"--batch {options.batch}: expected 1 to 64")
    sizes = preset(options.preset)
    scale = options.guidance_scale
    if scale is not None and not 0 <= scale <= 100:  # NaN neither
        raise ExportError(f"--guidance-scale {scale}: expected 0 to 100")
    check_names(options.rules)
    if options.target not in TARGETS:
        raise ExportError(f"--target {options.target}: expected one of {', '.join(TARGETS)}")
    import_onnxruntime()  # needed for the comparison: fail now, not after minutes of work
    _check_place(Path(out))
    known = read_sampling_record(options.weights, lambda note: progress("weights", note))
    guidance = _guidance_scale(options, sizes, known)
    with placed_whole(Path(out)) as folder:
        tiny = None if options.tiny_decoder is None else _tiny_vae(options.tiny_decoder, sizes, progress)
        with started(_write_decoders, folder, sizes, options, tiny, parallel=two_processes) as other_part:
            progress("weights", "U-Net")
            unet = _write_unet(folder, sizes, options, known, progress)
            encoder = _write_encoder(folder, sizes, options, progress)
            decoders = other_part(progress)
        progress("manifest", "hash")
        model = ModelInfo(
            preset=options.preset,
            parameters=unet.parameters,
            unet=unet.weights,
            vae=decoders.weights,
            tiny_decoder=decoders.tiny_decoder,
        )
        manifest = make_manifest(folder, model, sizes, guidance, unet.graphs | encoder | decoders.graphs, known)
        manifest = keep_earlier(Path(out), folder, manifest, note)
        write_manifest(manifest, folder)
    return manifest


class _UNetPart(NamedTuple):
    graphs: dict[GraphName, Written]
    weights: WeightsInfo
    parameters: int


class _Decoders(NamedTuple):
    graphs: dict[GraphName, Written]
    weights: WeightsInfo
    tiny_decoder: WeightsInfo | None


def _write_unet(
    folder: Path, sizes: Preset, options: ExportOptions, known: SamplingRecord, progress: Progress
) -> _UNetPart:
    """Exports the guided and the conditional U-Net."""
    check_prediction_type(options.weights, sizes.prediction_type, lambda note: progress("weights", note))
    student, weights = load_student(options.weights, sizes.student, lambda note: progress("weights", note))
    modules = dict[GraphName, nn.Module](unet_graphs(student, distilled=known.guidance_scale is not None))
    graphs = _write_graphs(folder, "unet", modules, sizes, options, progress)
    return _UNetPart(graphs, weights_info(weights), sum(parameter.numel() for parameter in student.parameters()))


def _write_encoder(folder: Path, sizes: Preset, options: ExportOptions, progress: Progress) -> dict[GraphName, Written]:
    """Exports the VAE's encoder."""
    vae, _ = load_vae(options.vae, sizes.vae, lambda note: progress("weights", note))
    return _write_graphs(folder, "vae_encoder", {"vae_encoder": VaeEncoder(vae)}, sizes, options, progress)


def _write_decoders(
    folder: Path,
    sizes: Preset,
    options: ExportOptions,
    tiny: tuple[AutoencoderTiny, Checkpoint] | None,
    progress: Progress,
) -> _Decoders:
    """Exports the VAE's decoders, and the tiny decoder where there is one."""
    progress("weights", "VAE")
    vae, weights = load_vae(options.vae, sizes.vae, lambda note: progress("weights", note))
    decoders: dict[GraphName, nn.Module] = {"vae_decoder": VaeDecoder(vae)}
    if options.masked:
        decoders |= {"vae_decoder_lower": LowerDecoder(vae), "vae_decoder_upper": UpperDecoder(vae)}
    graphs = _write_graphs(folder, "vae_decoder", decoders, sizes, options, progress)
    if tiny is None:
        return _Decoders(graphs, weights_info(weights), None)
    modules: dict[GraphName, nn.Module] = {"vae_decoder_tiny": TinyDecoder(tiny[0]).eval()}
    graphs |= _write_graphs(folder, "vae_decoder_tiny", modules, sizes, options, progress)
    return _Decoders(graphs, weights_info(weights), weights_info(tiny[1]))


def _guidance_scale(options: ExportOptions, sizes: Preset, known: SamplingRecord) -> float:
    """The bundle's guidance scale: the distilled one, else the given one, else the default of the weights."""
    scale, distilled = options.guidance_scale, known.guidance_scale
    if distilled is None:
        return default_guidance(options.weights, sizes) if scale is None else scale
    if scale is not None and scale != distilled:
        raise ExportError(
            f"--guidance-scale {scale:g}: {options.weights} was distilled at {distilled:g} and has no other scale; "
            "leave it out, or export the network before its distillation"
        )
    return distilled


def _write_graphs(
    folder: Path,
    group: Literal["unet", "vae_encoder", "vae_decoder", "vae_decoder_tiny"],
    modules: dict[GraphName, nn.Module],
    sizes: Preset,
    options: ExportOptions,
    progress: Progress,
) -> dict[GraphName, Written]:
    """Writes the graphs of one folder of the bundle over one weights file, and compares each with PyTorch."""
    batched = {"vae_encoder": "image", "unet": "sample"}.get(group, "latent")
    output = {"vae_encoder": "latent", "unet": "noise_pred"}.get(group, "image")
    # torch.export takes a first axis of 1 for a constant, so an open one is traced with 2
    batch = max(options.batch, 2) if options.dynamic_batch else options.batch
    specs = {
        name: GraphSpec(
            name,
            module,
            example_inputs(name, sizes, batch, guided=isinstance(module, GuidedUNet)),
            "features" if name == "vae_decoder_lower" else output,
            dynamic=(batched,) if options.dynamic_batch and name not in MASKED else (),
            local_lambda_form=options.lowered.form,
            sizes={"features": {2: "height", 3: "width"}} if name == "vae_decoder_upper" else None,
            output_sizes={2: "rows", 3: "columns"} if name == "vae_decoder_upper" else None,
        )
        for name, module in modules.items()
    }
    target = folder / group
    files, rewrites = {}, {}
    progress(next(iter(specs)), "reference")
    if "unet_conditional" in specs:
        references = dict(zip(specs, unet_references(specs["unet"], specs["unet_conditional"]), strict=True))
    else:
        references = {name: reference_output(spec) for name, spec in specs.items()}
    with weights_file(target, "model.onnx.data") as weights:
        for name, spec in specs.items():
            progress(name, "rewrite")
            module, rewrites[name] = _rewritten(name, spec, options)
            model = to_onnx(replace(spec, module=module), lambda stage, name=name: progress(name, stage))  # type: ignore[misc]
            progress(name, "write")
            weights.add(model)
            if options.inline or options.target == "webgpu":
                model, more = standard_form(name, model, for_gpu=options.target == "webgpu")
                rewrites[name] = [*rewrites[name], *more]
            files[name] = "model.onnx" if name == group else f"model{name.removeprefix(group)}.onnx"
            with atomic_write(target / files[name]) as stream:
                stream.write(model.SerializeToString(deterministic=True))
            del model, module
    written: dict[GraphName, Written] = {}
    for name, spec in specs.items():
        path = target / files[name]
        progress(name, "check")
        onnx.checker.check_model(str(path), full_check=True)
        progress(name, "compare")
        parity = check_parity(spec, path, references[name])
        paths = GraphFile(model=f"{group}/{files[name]}", weights=f"{group}/model.onnx.data")
        info = graph_info(spec, references[name], paths)
        written[name] = Written(info, parity, rewrites[name], _graph_check(spec, references[name]))
    return written


def _graph_check(spec: GraphSpec, reference: np.ndarray) -> GraphCheck:
    """The values by which a device is checked, of the first picture where the batch is open."""
    inputs = {name: t.numpy()[:1] if name in spec.dynamic else t.numpy() for name, t in spec.inputs.items()}
    drawn = next(iter(spec.inputs.values())).shape[0]
    return make_check(inputs, reference[:1] if spec.dynamic else reference, drawn)


def _rewritten(graph: GraphName, spec: GraphSpec, options: ExportOptions) -> tuple[nn.Module, list[Rewrite]]:
    """Returns the module after its graph's rewrites, and how often each fired with its MACs."""

    def count(module: nn.Module) -> int:
        return module_macs(module, spec.inputs.values(), spec.local_lambda_form)["all"]

    module, rules = spec.module, options.rules
    outcomes: list[Outcome] = []
    if isinstance(module, GuidedUNet | ConditionalUNet):
        module, outcomes = rewrite_unet(module, module.student, module.category_ids, rules, count, options.lowered)
    elif isinstance(module, VaeDecoder):
        module, outcomes = rewrite_decoder(module, rules, count)
    elif isinstance(module, VaeEncoder):
        module, outcomes = rewrite_encoder(module, rules, count)
    elif isinstance(module, TinyDecoder):
        module, outcomes = rewrite_tiny_decoder(module, rules, count)
    elif isinstance(module, LowerDecoder | UpperDecoder):
        module, outcomes = rewrite_decoder_part(module, rules, count)
    rewrites = []
    for outcome in (outcome for outcome in outcomes if outcome.fired):
        before, after = outcome.macs or (None, None)
        rewrite = Rewrite(graph=graph, name=outcome.name, count=outcome.fired, macs_before=before, macs_after=after)
        rewrites.append(rewrite)
    return module, rewrites


def _tiny_vae(source: str, sizes: Preset, progress: Progress) -> tuple[AutoencoderTiny, Checkpoint]:
    """The tiny autoencoder and its origin.

    Raises:
        ExportError: its latents cannot be those of the preset.
        CheckpointError: the source cannot be read, or does not fit.
    """
    progress("weights", "tiny decoder")
    vae, checkpoint = load_tiny_vae(source, lambda note: progress("weights", note))
    own = (vae.config.latent_channels, 2 ** (len(vae.config.decoder_block_out_channels) - 1))
    expected = (sizes.vae.latent_channels, sizes.vae.downscale)
    if own != expected:
        raise ExportError(
            f"--tiny-decoder {source}: it decodes {own[0]} channels at {own[1]} pixels a cell; the preset has "
            f"{expected[0]} at {expected[1]}"
        )
    return vae, checkpoint


def _check_place(out: Path) -> None:
    if out.exists() and not (out.is_dir() and ((out / MANIFEST_NAME).is_file() or not any(out.iterdir()))):
        raise ExportError(f"--out {out} exists and is not a bundle. Choose a new folder, or remove that one.")
