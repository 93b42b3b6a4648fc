"""`moebius-export onnx`: weights in, a checked bundle out."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from moebius import Preset, VaeDecoder, VaeEncoder, preset
from moebius.weights.checkpoint import Checkpoint
from moebius.weights.distilled import Distilled, read_distilled
from moebius.weights.load import (
    DEFAULT_VAE,
    DEFAULT_WEIGHTS,
    check_prediction_type,
    default_guidance,
    load_student,
    load_vae,
)
from moebius_export.errors import ExportError
from moebius_export.graph.weights_file import weights_file
from moebius_export.lowering.lowering import DEFAULT_TARGET, TARGETS, Lowering, Target, shipped
from moebius_export.network.module_cost import module_macs
from moebius_export.network.wrappers import ConditionalUNet, GuidedUNet, unet_graphs
from moebius_export.onnx_export.convert import GraphSpec, to_onnx
from moebius_export.onnx_export.earlier import keep_earlier
from moebius_export.onnx_export.parity import check_parity, reference_output, unet_references
from moebius_export.rules import RULE_NAMES, check_names, rewrite_decoder, rewrite_encoder, rewrite_unet
from moebius_export.rules.base import Outcome
from moebius_runtime.backends.ort import import_onnxruntime
from moebius_runtime.bundle.manifest import (
    MANIFEST_NAME,
    Defaults,
    FileInfo,
    Geometry,
    GraphFile,
    GraphInfo,
    GraphName,
    GuidanceInfo,
    Manifest,
    ModelInfo,
    Parity,
    Rewrite,
    ScheduleInfo,
    TensorInfo,
    WeightsInfo,
    write_manifest,
)
from moebius_runtime.files import atomic_write, placed_whole, sha256_file

Progress = Callable[[str, str], None]
"""Called with (graph, stage) when a stage begins."""

STAGES = ("reference", "rewrite", "trace", "simplify", "write", "check", "compare")
_TOOLS = ("torch", "diffusers", "onnx", "onnxscript", "onnxsim", "numpy")


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    `batch` is B of every graph's input; `dynamic_batch` leaves it open instead. `rules` are the exact rewrites to
    apply (`moebius_export.rules`), all by default, none for the unfused network. `target` is the target of the λ
    operators' bodies and `lowering` their layout, by default the target's shipped one. `guidance_scale` is
    the bundle's default one, 0 to 100: None is the paper's for released weights, else the preset's. Weights whose
    `config.json` records distilled guidance have that one alone, and perhaps a sampler and a number of steps.
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

    @property
    def lowered(self) -> Lowering:
        """`lowering`, or the target's."""
        return self.lowering or shipped()[self.target]


@dataclass(frozen=True)
class _Written:
    """A graph of the bundle under construction."""

    info: GraphInfo
    parity: Parity
    rewrites: list[Rewrite]


def export_onnx(
    out: str | Path,
    options: ExportOptions,
    progress: Progress = lambda graph, stage: None,
    note: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Exports a bundle and moves it to `out` once every file agrees with PyTorch.

    An older bundle at `out` is replaced. Its engines and files of other precisions stay where they still hold, see
    `earlier.keep_earlier`; `note` is called with a line for each that is removed.
    A folder that is no bundle is refused.

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
    known = read_distilled(options.weights, lambda note: progress("weights", note))
    guidance = _guidance_scale(options, sizes, known)
    with placed_whole(Path(out)) as folder:
        progress("weights", "U-Net")
        check_prediction_type(options.weights, sizes.prediction_type, lambda note: progress("weights", note))
        student, student_weights = load_student(options.weights, sizes.student, lambda note: progress("weights", note))
        parameters = sum(parameter.numel() for parameter in student.parameters())
        graphs: dict[GraphName, _Written] = {}
        unets = dict[GraphName, nn.Module](unet_graphs(student, distilled=known.guidance_scale is not None))
        graphs |= _write_graphs(folder, "unet", unets, sizes, options, progress)
        del student, unets
        progress("weights", "VAE")
        vae, vae_weights = load_vae(options.vae, sizes.vae, lambda note: progress("weights", note))
        graphs |= _write_graphs(folder, "vae_encoder", {"vae_encoder": VaeEncoder(vae)}, sizes, options, progress)
        graphs |= _write_graphs(folder, "vae_decoder", {"vae_decoder": VaeDecoder(vae)}, sizes, options, progress)
        progress("manifest", "hash")
        model = ModelInfo(
            preset=options.preset,
            parameters=parameters,
            unet=_weights_info(student_weights),
            vae=_weights_info(vae_weights),
        )
        manifest = _manifest(folder, model, sizes, guidance, graphs, known)
        manifest = keep_earlier(Path(out), folder, manifest, note)
        write_manifest(manifest, folder)
    return manifest


def _guidance_scale(options: ExportOptions, sizes: Preset, known: Distilled) -> float:
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


def example_inputs(graph: GraphName, sizes: Preset, batch: int, *, guided: bool = True) -> dict[str, Tensor]:
    """Seeded inputs of a graph, with the statistics that the sampler gives it: the manifest's names and shapes.

    `guided` is False for the graph `unet` of a network whose guidance is distilled: it takes no scale.
    """
    rng = np.random.RandomState(7)
    side, channels = sizes.student.sample_size, sizes.vae.latent_channels
    pixels = side * sizes.vae.downscale
    if graph == "vae_encoder":
        return {"image": _tensor(rng.uniform(-1, 1, (batch, 3, pixels, pixels)))}
    if graph == "vae_decoder":
        return {"latent": _tensor(rng.standard_normal((batch, channels, side, side)))}
    latents = rng.standard_normal((batch, channels, side, side))
    mask = (rng.uniform(size=(batch, 1, side, side)) < 0.3).astype(np.float64)
    masked = rng.standard_normal((batch, channels, side, side))
    inputs = {
        "sample": _tensor(np.concatenate([latents, mask, masked], axis=1)),
        "timestep": torch.tensor([500], dtype=torch.int64),
    }
    return inputs | ({"guidance_scale": torch.tensor([2.5])} if graph == "unet" and guided else {})


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _write_graphs(
    folder: Path,
    group: Literal["unet", "vae_encoder", "vae_decoder"],
    modules: dict[GraphName, nn.Module],
    sizes: Preset,
    options: ExportOptions,
    progress: Progress,
) -> dict[GraphName, _Written]:
    """Writes the graphs of one folder of the bundle over one weights file, and compares each with PyTorch."""
    batched = {"vae_encoder": "image", "vae_decoder": "latent"}.get(group, "sample")
    output = {"vae_encoder": "latent", "vae_decoder": "image"}.get(group, "noise_pred")
    # torch.export takes a first axis of 1 for a constant, so an open one is traced with 2
    batch = max(options.batch, 2) if options.dynamic_batch else options.batch
    specs = {
        name: GraphSpec(
            name,
            module,
            example_inputs(name, sizes, batch, guided=isinstance(module, GuidedUNet)),
            output,
            dynamic=(batched,) if options.dynamic_batch else (),
            local_lambda_form=options.lowered.form,
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
            files[name] = "model.onnx" if name == group else "model_conditional.onnx"
            with atomic_write(target / files[name]) as stream:
                stream.write(model.SerializeToString(deterministic=True))
            del model, module
    written: dict[GraphName, _Written] = {}
    for name, spec in specs.items():
        path = target / files[name]
        progress(name, "check")
        onnx.checker.check_model(str(path), full_check=True)
        progress(name, "compare")
        parity = check_parity(spec, path, references[name])
        paths = GraphFile(model=f"{group}/{files[name]}", weights=f"{group}/model.onnx.data")
        written[name] = _Written(_graph_info(spec, references[name], paths), parity, rewrites[name])
    return written


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
    rewrites = []
    for outcome in (outcome for outcome in outcomes if outcome.fired):
        before, after = outcome.macs or (None, None)
        rewrite = Rewrite(graph=graph, name=outcome.name, count=outcome.fired, macs_before=before, macs_after=after)
        rewrites.append(rewrite)
    return module, rewrites


def _graph_info(spec: GraphSpec, output: np.ndarray, file: GraphFile) -> GraphInfo:
    def info(name: str, array: np.ndarray, open_batch: bool) -> TensorInfo:
        shape: list[int | str] = list(array.shape)
        if open_batch:
            shape[0] = "batch"
        return TensorInfo(name=name, dtype=str(array.dtype), shape=shape)  # type: ignore[arg-type]

    return GraphInfo(
        files={"fp32": file},
        inputs=[info(name, tensor.numpy(), name in spec.dynamic) for name, tensor in spec.inputs.items()],
        outputs=[info(spec.output, output, bool(spec.dynamic))],
    )


def _manifest(
    folder: Path,
    model: ModelInfo,
    sizes: Preset,
    guidance_scale: float,
    graphs: dict[GraphName, _Written],
    known: Distilled,
) -> Manifest:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = FileInfo(size=path.stat().st_size, sha256=sha256_file(path))
    return Manifest(
        schema_version=1,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=model,
        geometry=Geometry(
            image_size=sizes.student.sample_size * sizes.vae.downscale,
            latent_size=sizes.student.sample_size,
            latent_channels=sizes.vae.latent_channels,
            scaling_factor=sizes.vae.scaling_factor,
        ),
        schedule=ScheduleInfo(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=sizes.prediction_type,
        ),
        defaults=Defaults(
            num_inference_steps=known.steps or 20,
            guidance_scale=guidance_scale,
            strength=0.99,
            noise_offset=0.0357,
            sampler="lcm" if known.sampler == "lcm" else "ddim",
        ),
        guidance=None if known.guidance_scale is None else GuidanceInfo(distilled=known.guidance_scale),
        graphs={name: graph.info for name, graph in graphs.items()},
        files=files,
        rewrites=[rewrite for graph in graphs.values() for rewrite in graph.rewrites],
        parity={name: graph.parity for name, graph in graphs.items()},
        tools={name: metadata.version(name) for name in _TOOLS}
        | {"python": platform.python_version(), "onnxruntime": import_onnxruntime().__version__},
    )


def _weights_info(checkpoint: Checkpoint) -> WeightsInfo:
    return WeightsInfo(origin=checkpoint.origin, sha256=checkpoint.sha256, stand_in=checkpoint.stand_in)


def _check_place(out: Path) -> None:
    if out.exists() and not (out.is_dir() and ((out / MANIFEST_NAME).is_file() or not any(out.iterdir()))):
        raise ExportError(f"--out {out} exists and is not a bundle. Choose a new folder, or remove that one.")
