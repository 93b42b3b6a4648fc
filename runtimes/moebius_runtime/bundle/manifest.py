"""`manifest.json`: the content of a bundle, its origin, and the hashes of its files.

A manifest is hostile until it is checked: its size, its version, every type and range (see
`moebius_runtime.bundle.checked`), its own hash, and that each path stays inside the bundle.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

from moebius_runtime.bundle.checked import (
    UNKNOWN,
    Field,
    SchemaError,
    StrictModel,
    first_problem,
    in_one_line,
    shortened,
)
from moebius_runtime.errors import BundleError, InputError
from moebius_runtime.files import atomic_write, read_plain, sha256_file
from moebius_runtime.files.hashes import Hasher
from moebius_runtime.sampling.schedule import NoiseSchedule, PredictionType

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20

Precision = Literal["fp32", "fp16", "bf16", "int8", "int8_cpu", "fp8"]
DecoderName = Literal["vae_decoder_lower", "vae_decoder_upper", "vae_decoder_tiny"]
GraphName = Literal[
    "unet",
    "unet_conditional",
    "vae_encoder",
    "vae_decoder",
    "vae_decoder_lower",
    "vae_decoder_upper",
    "vae_decoder_tiny",
]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShortText = Annotated[str, Field(max_length=1000)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Timestep = Annotated[int, Field(ge=0, lt=10_000)]
Macs = Annotated[int, Field(ge=0, le=1 << 60)]
Dimension = Annotated[int, Field(ge=1, le=1 << 16)] | Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def _inside(path: str) -> str:
    """Returns a relative POSIX path of plain names; refuses anything that could leave the folder."""
    if len(path) > 300 or not all(_PART.fullmatch(part) for part in path.split("/")):
        raise ValueError(f"{path[:80]!r} is not a plain relative path inside the bundle")
    return path


@dataclass(frozen=True, kw_only=True)
class TensorInfo(StrictModel):
    """Name, type and shape of a graph's input or output; a string names a dynamic dimension."""

    name: Annotated[str, Field(pattern=r"^[a-z_0-9]{1,64}$")]
    dtype: Literal["float32", "int64"]
    shape: Annotated[list[Dimension], Field(max_length=8)]


@dataclass(frozen=True, kw_only=True)
class GraphFile(StrictModel):
    """An ONNX file and the file of its weights, in one folder; graphs of one folder may share the latter.

    `plan` is the file of the precision plan that a mixed-precision graph was made from.
    """

    model: Annotated[str, Field(pattern=r"^.*\.onnx$")]  # a runtime may take another suffix for another format
    weights: str | None
    plan: str | None = None

    def _check(self) -> None:
        if self.weights is not None and PurePosixPath(self.weights).parent != PurePosixPath(self.model).parent:
            raise ValueError(f"{self.model!r} and its weights {self.weights!r} are not in one folder")

    @property
    def paths(self) -> list[str]:
        """Every file that belongs to the graph, the ONNX file first."""
        return [path for path in (self.model, self.weights, self.plan) if path is not None]


@dataclass(frozen=True, kw_only=True)
class GraphInfo(StrictModel):
    """One graph: its files by precision, its inputs and outputs."""

    files: Annotated[dict[Precision, GraphFile], Field(min_length=1)]
    inputs: Annotated[list[TensorInfo], Field(min_length=1, max_length=8)]
    outputs: Annotated[list[TensorInfo], Field(min_length=1, max_length=8)]


@dataclass(frozen=True, kw_only=True)
class FileInfo(StrictModel):
    """Size in bytes and hash of one file."""

    size: Count
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class WeightsInfo(StrictModel):
    """The origin of weights. `stand_in` weights are random test weights: their pictures mean nothing."""

    origin: ShortText
    sha256: Sha256
    stand_in: bool


@dataclass(frozen=True, kw_only=True)
class ModelInfo(StrictModel):
    """The network of the bundle."""

    preset: ShortText
    parameters: Count
    unet: WeightsInfo
    vae: WeightsInfo
    tiny_decoder: WeightsInfo | None = None


@dataclass(frozen=True, kw_only=True)
class Geometry(StrictModel):
    """Sides in pixels of the square picture and its latent, and the latent's channels and scale."""

    image_size: Annotated[int, Field(ge=8, le=4096)]
    latent_size: Annotated[int, Field(ge=1, le=1024)]
    latent_channels: Annotated[int, Field(ge=1, le=64)]
    scaling_factor: Annotated[float, Field(gt=0, le=100)]

    def _check(self) -> None:
        if self.image_size % self.latent_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of latent_size {self.latent_size}")


@dataclass(frozen=True, kw_only=True)
class ScheduleInfo(StrictModel):
    """The noise schedule that the network was trained with."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=10_000)]
    beta_start: Annotated[float, Field(gt=0, lt=1)]
    beta_end: Annotated[float, Field(gt=0, lt=1)]
    beta_schedule: Literal["scaled_linear"]
    prediction_type: PredictionType

    def build(self) -> NoiseSchedule:
        """Builds the schedule with its tables; raises `InputError` if the numbers leave no usable noise level."""
        return NoiseSchedule(**self.model_dump())

    def _check(self) -> None:
        try:
            self.build()
        except InputError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class GuidanceInfo(StrictModel):
    """Guidance inside the network: its output is the guided one at scale `distilled`, from one branch."""

    distilled: Annotated[float, Field(ge=0, le=100)]


@dataclass(frozen=True, kw_only=True)
class Defaults(StrictModel):
    """The bundle's defaults of `moebius-inpaint`.

    Sampler `lcm` means that the network was distilled for it and has no other; `num_inference_steps` is then the
    recommended number. Bundles of earlier versions lack the sampler, which is then `ddim`.
    """

    num_inference_steps: Annotated[int, Field(ge=1, le=1000)]
    guidance_scale: Annotated[float, Field(ge=0, le=100)]
    strength: Annotated[float, Field(gt=0, le=1)]
    noise_offset: Annotated[float, Field(ge=0, le=1)]
    sampler: Literal["ddim", "lcm"] = "ddim"


@dataclass(frozen=True, kw_only=True)
class ModeDefaults(StrictModel):
    """The bundle's own defaults of a mode; None takes the built-in one (`moebius_runtime.settings.modes`)."""

    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    sampler: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,32}$")] | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    start: Literal["pixels", "cells"] | None = None
    guidance_interval: Annotated[list[Timestep], Field(min_length=2, max_length=2)] | None = None  # both included
    decode: Literal["full", "masked"] | None = None
    vae_decoder: Literal["full", "tiny"] | None = None


@dataclass(frozen=True, kw_only=True)
class Rewrite(StrictModel):
    """A graph rewrite, how often it fired, and the MACs of a call before and after it.

    Bundles of earlier versions lack the MACs.
    """

    graph: GraphName
    name: ShortText
    count: Count
    macs_before: Macs | None = None
    macs_after: Macs | None = None


@dataclass(frozen=True, kw_only=True)
class Parity(StrictModel):
    """A file's distance from PyTorch when it was exported: relative L2 error and worst absolute error."""

    relative_error: Annotated[float, Field(ge=0)]
    max_error: Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class GraphCheck(StrictModel):
    """What a graph gives on seeded inputs, by PyTorch at export: see `moebius_runtime.bundle.check_values`.

    `drawn` is the number of pictures whose inputs are drawn; a graph with an open batch runs the first of them.
    """

    drawn: Annotated[int, Field(ge=1, le=64)]
    inputs_sha256: Sha256
    norm: Annotated[float, Field(gt=0)]
    projections: Annotated[list[float], Field(min_length=8, max_length=64)]
    values: Annotated[list[float], Field(min_length=1, max_length=64)]


def _tensor(name: str, shape: list[int | str], dtype: Literal["float32", "int64"] = "float32") -> TensorInfo:
    return TensorInfo(name=name, dtype=dtype, shape=shape)


def _check_signature(name: GraphName, graph: GraphInfo, geometry: Geometry, guided: bool) -> None:
    """Checks the names, types and shapes that the pipeline uses (B, the number of pictures, is free)."""
    batch = graph.inputs[0].shape[0] if graph.inputs[0].shape else 1
    channels, side, pixels = geometry.latent_channels, geometry.latent_size, geometry.image_size
    latent: list[int | str] = [batch, channels, side, side]
    image: list[int | str] = [batch, 3, pixels, pixels]
    unet = [_tensor("sample", [batch, 2 * channels + 1, side, side]), _tensor("timestep", [1], "int64")]
    predicted, decoded = _tensor("noise_pred", latent), _tensor("image", image)
    features = _features(name, graph)
    inputs, output = {
        "unet": ([*unet, _tensor("guidance_scale", [1])] if guided else unet, predicted),
        "unet_conditional": (unet, predicted),
        "vae_encoder": ([decoded], _tensor("latent", latent)),
        "vae_decoder": ([_tensor("latent", latent)], decoded),
        "vae_decoder_tiny": ([_tensor("latent", latent)], decoded),
        "vae_decoder_lower": ([_tensor("latent", latent)], _tensor("features", features)),
        "vae_decoder_upper": (
            [
                _tensor("features", [*features[:2], "height", "width"]),
                _tensor("overview", features),
                _tensor("inside", [features[0], 1, *features[2:]]),
            ],
            _tensor("image", [features[0], 3, "rows", "columns"]),
        ),
    }[name]
    for got, expected in ((graph.inputs, inputs), (graph.outputs, [output])):
        if got != expected:
            raise ValueError(f"graph {name} has {_tensors(got)}; expected {_tensors(expected)}")


def _features(name: GraphName, graph: GraphInfo) -> list[int | str]:
    """Shape of the features between the lower and the upper decoder, or of their overview: the network's own.

    Only the rank, and that they are square, is expected.
    """
    own = {"vae_decoder_lower": graph.outputs[0], "vae_decoder_upper": graph.inputs[min(1, len(graph.inputs) - 1)]}
    shape = own[name].shape if name in own else []
    return [*shape[:3], shape[2]] if len(shape) == 4 else [1, 1, 1, 1]


def _tensors(tensors: list[TensorInfo]) -> str:
    return ", ".join(f"{t.name} {t.dtype} [{', '.join(map(str, t.shape))}]" for t in tensors)


@dataclass(frozen=True, kw_only=True)
class Manifest(StrictModel):
    """The whole manifest; see docs/bundle.md for the meaning of each field."""

    schema_version: Literal[1]
    created: ShortText
    model: ModelInfo
    geometry: Geometry
    schedule: ScheduleInfo
    defaults: Defaults
    graphs: dict[GraphName, GraphInfo]
    files: Annotated[dict[str, FileInfo], Field(max_length=1000)]
    rewrites: list[Rewrite]
    parity: dict[str, Parity]
    tools: dict[ShortText, ShortText]
    guidance: GuidanceInfo | None = None
    modes: dict[Literal["best", "balanced", "fast"], ModeDefaults] = field(default_factory=dict)
    decoders: dict[DecoderName, GraphInfo] = field(default_factory=dict)  # other ways to decode, all optional
    checks: dict[GraphName, GraphCheck] = field(default_factory=dict)

    def _check(self) -> None:
        for path in self.files:
            _inside(path)
        missing = [name for name in ("unet", "vae_encoder", "vae_decoder") if name not in self.graphs]
        if missing:
            raise ValueError(f"no graph {', '.join(missing)}")
        if decoders := [name for name in self.graphs if name in get_args(DecoderName)]:
            raise ValueError(f"graph {', '.join(decoders)} is among the graphs; expected it among the decoders")
        for name, graph in self.every_graph.items():
            for path in (path for file in graph.files.values() for path in file.paths):
                if path not in self.files:
                    raise ValueError(f"graph {name} names {path!r}, which is not among the files")
            _check_signature(name, graph, self.geometry, guided=self.guidance is None)
        self._check_distilled()

    def _check_distilled(self) -> None:
        if self.guidance is not None:
            if "unet_conditional" in self.graphs:
                raise ValueError("guidance is distilled, and there is a graph unet_conditional beside unet")
            if self.defaults.guidance_scale != self.guidance.distilled:
                raise ValueError(
                    f"the default guidance scale {self.defaults.guidance_scale:g} is not the distilled "
                    f"{self.guidance.distilled:g}"
                )
        elif self.defaults.sampler == "lcm":
            raise ValueError("sampler lcm is the default, and no guidance is distilled")

    @property
    def every_graph(self) -> dict[GraphName, GraphInfo]:
        """The graphs and the optional decoders."""
        every: dict[GraphName, GraphInfo] = dict(self.graphs)
        for name, graph in self.decoders.items():
            every[name] = graph
        return every

    @property
    def stand_in(self) -> bool:
        """True if any weights are random test weights, so that the picture inside the mask is noise."""
        tiny = self.model.tiny_decoder
        return self.model.unet.stand_in or self.model.vae.stand_in or (tiny is not None and tiny.stand_in)


def content_digest(content: dict[str, Any]) -> str:
    """SHA-256 of the content as sorted, compact JSON."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_manifest(manifest: Manifest, folder: str | Path) -> None:
    """Writes `manifest.json` with its own hash into a bundle's folder, whole or not at all."""
    content = manifest.model_dump(mode="json")
    with atomic_write(Path(folder) / MANIFEST_NAME) as stream:
        text = json.dumps({**content, "manifest_sha256": content_digest(content)}, indent=1) + "\n"
        stream.write(text.encode())


def read_manifest(folder: str | Path) -> Manifest:
    """The checked manifest of a bundle.

    Raises:
        BundleError: there is none, or it is damaged, changed by hand, of an unknown version, or names paths outside
            the bundle.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        data = read_plain(path, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise BundleError(
            f"{path}: {error.strerror}; expected a bundle folder with a {MANIFEST_NAME}. "
            "Make one with `moebius-export onnx --out BUNDLE`."
        ) from error
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not JSON ({in_one_line(error)}). {_AGAIN}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path}: expected a JSON object, found {type(content).__name__}. {_AGAIN}")
    version = content.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema version {shortened(version)}; this moebius-edge reads version {SCHEMA_VERSION}. Export "
            "the bundle again with this version, or install the one that made it."
        )
    declared = content.pop("manifest_sha256", None)
    try:
        manifest = Manifest.model_validate(content)
    except ValueError as error:
        if declared == content_digest(content) and (newer := _newer(error, content)):
            raise BundleError(f"{path}: {newer}") from error
        raise BundleError(f"{path}: {first_problem(error)}. {_AGAIN}") from error
    if declared != content_digest(content):
        raise BundleError(f"{path}: its content does not match its own hash, so it was changed or damaged. {_AGAIN}")
    return manifest


def _newer(error: ValueError, content: dict[str, Any]) -> str | None:
    """The refusal of a manifest whose only fault is fields that a later version added; None where there is another."""
    if not isinstance(error, SchemaError) or not all(problem.msg == UNKNOWN for problem in error.problems):
        return None
    from moebius_runtime.version import own_version

    tools = content.get("tools")
    theirs = shortened(tools.get("moebius-edge", "not recorded") if isinstance(tools, dict) else "not recorded")
    unknown = ", ".join(shortened(".".join(map(str, problem.loc))) for problem in error.problems[:3])
    return (
        f"moebius-edge {own_version() or 'of this checkout'} does not know {unknown}, which a newer version wrote "
        f"({theirs}). Update moebius-edge here, or export the bundle with this version."
    )


def check_file(folder: str | Path, manifest: Manifest, name: str, sha256: Hasher = sha256_file) -> Path:
    """Returns the path of a file of the bundle, after checking its size and SHA-256 against the manifest.

    Args:
        folder: the bundle's folder.
        manifest: its manifest.
        name: a name among the manifest's files.
        sha256: what hashes the file.

    Raises:
        BundleError: the file is missing, leads out of the bundle, or differs.
    """
    root = Path(folder).resolve()
    expected = manifest.files[name]
    path = root / _inside(name)
    try:
        if not path.resolve(strict=True).is_relative_to(root):
            raise BundleError(
                f"{path} is a link that leaves the bundle. Copy the bundle with the files "
                "themselves in place of links: `cp -rL BUNDLE COPY`."
            )
        size = path.stat().st_size
        if size != expected.size:
            raise BundleError(
                f"{path}: {size} bytes, expected {expected.size} by the manifest: it is damaged. {_AGAIN}"
            )
        digest = sha256(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = getattr(error, "strerror", None) or in_one_line(error)
        raise BundleError(f"{path}: {reason}; the manifest lists this file. {_AGAIN}") from error
    if digest != expected.sha256:
        raise BundleError(f"{path}: its SHA-256 is not the manifest's: it is damaged or was exchanged. {_AGAIN}")
    return path


_AGAIN = "Export or copy the bundle again."
