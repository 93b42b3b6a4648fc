"""What a training run is: the file that `moebius-distill CONFIG.yaml` reads, checked before anything is built."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from moebius.config import PredictionType, Preset, StudentConfig, TeacherConfig, VaeConfig, preset
from moebius.data.masks import HOLES, MaskSettings
from moebius.data.opening import names_no_file
from moebius.data.pictures import CropSettings
from moebius.distill.balance import BalanceOptions
from moebius.distill.losses import LossOptions, Tap
from moebius.distill.optimizers import OptimizerOptions, ScheduleOptions
from moebius.errors import CheckpointError, TrainingError
from moebius.sources import LocalSource, parse_source

_MAX_BYTES = 1 << 20
_FREE: Any = {
    **dict.fromkeys(("out", "steps", "schedule", "precision"), True),
    **dict.fromkeys(("log_every", "save_every", "keep", "samples", "tensorboard"), True),
    **dict.fromkeys(("weights_dtype", "average_statistics"), True),
    "optimizer": {"learning_rate"},
    "data": {"threads", "broken"},
}
"""What a resumed run may change; see `Settings.identity`."""
_Config = TypeVar("_Config", StudentConfig, TeacherConfig, VaeConfig)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _taps(value: Any) -> Any:
    """A tap may be written `2:5` or `2:5:0.5`: student's feature, teacher's, weight."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(_tap(item) for item in value)


def _tap(item: Any) -> Any:
    if isinstance(item, dict):
        return Tap(**item)
    if not isinstance(item, str):
        return item
    try:
        student, teacher, *weight = item.split(":")
        return Tap(int(student), int(teacher), *(float(text) for text in weight))
    except (TypeError, ValueError):
        raise ValueError(f"tap {item!r}: expected STUDENT:TEACHER or STUDENT:TEACHER:WEIGHT, such as 2:5") from None


def _known(kind: type[Any]) -> BeforeValidator:
    """Refuses names that a dataclass of the library does not have: pydantic would pass over them."""
    names = [field.name for field in fields(kind)]

    def check(value: Any) -> Any:
        if kind is MaskSettings and isinstance(value, str):
            if value not in HOLES:
                raise ValueError(f"no holes are called {value}; expected {' or '.join(HOLES)}, or numbers")
            return HOLES[value]
        if isinstance(value, dict) and (unknown := [str(name) for name in value if name not in names]):
            raise ValueError(f"no {', '.join(unknown)} here; expected some of {', '.join(names)}")
        if isinstance(value, dict) and "taps" in value:
            return value | {"taps": _taps(value["taps"])}
        return value

    return BeforeValidator(check)


_Losses = Annotated[LossOptions, _known(LossOptions)]
_Balance = Annotated[BalanceOptions, _known(BalanceOptions)]
_Optimizer = Annotated[OptimizerOptions, _known(OptimizerOptions)]
_Schedule = Annotated[ScheduleOptions, _known(ScheduleOptions)]
_Masks = Annotated[MaskSettings, _known(MaskSettings)]
_Crops = Annotated[CropSettings, _known(CropSettings)]


class NetworkSettings(_Part):
    """A preset, and what of its networks differs from it: sizes, and what they predict."""

    preset: str = "full"
    prediction_type: PredictionType | None = None
    student: dict[str, Any] = {}
    teacher: dict[str, Any] = {}
    vae: dict[str, Any] = {}

    def build(self) -> Preset:
        """The sizes of the three networks.

        Raises:
            TrainingError: a name that they do not have, or a value that they refuse.
        """
        base = preset(self.preset)
        return replace(
            base,
            student=_changed(base.student, self.student),
            vae=_changed(base.vae, self.vae),
            teacher=_changed(base.teacher, self.teacher),
            prediction_type=self.prediction_type or base.prediction_type,
        )


def _changed(config: _Config, values: dict[str, Any]) -> _Config:
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        changed: _Config = replace(config, **given)  # type: ignore[arg-type]  # its `__post_init__` and the sizes say
        return changed
    except (TypeError, ValueError) as error:
        raise TrainingError(f"the sizes {values} do not fit {type(config).__name__}: {error}") from error


class Pictures(_Part):
    """Pictures from a text as `moebius.data.opening.open_source` reads it, so many times within an epoch."""

    source: str
    times: int = Field(default=1, ge=1)


class DataSettings(_Part):
    """Where samples come from: pictures, or latents that `moebius-distill encode` wrote.

    Attributes:
        pictures: sources; they need a VAE unless it is the VAE that is trained.
        latents: a folder of encoded samples.
        size: pixels of the side of a sample; default: what the student's latents ask for.
        scene_size: pixels at which scenes are drawn, before the crop; default: `size`.
        masks, crops: of pictures; encoded samples have theirs. Masks may be the name `small` or `training`.
        latent_crop: side of a square that is cut from the latents around some place of the hole; None takes them
            whole. For the teacher, which takes any size: smaller is faster.
        threads: that draw and decode ahead.
        broken: whether a picture that cannot be used is left out or ends the run.
    """

    pictures: tuple[Pictures, ...] = ()
    latents: Path | None = None
    size: int | None = Field(default=None, ge=16)
    scene_size: int | None = Field(default=None, ge=16)
    masks: _Masks = MaskSettings()
    crops: _Crops = CropSettings()
    latent_crop: int | None = Field(default=None, ge=8)
    threads: int = Field(default=2, ge=0)
    broken: Literal["skip", "refuse"] = "skip"

    @model_validator(mode="after")
    def _one_kind(self) -> DataSettings:
        if bool(self.pictures) == (self.latents is not None):
            raise ValueError("data: expected either `pictures` or `latents`")
        return self


class TimestepSettings(_Part):
    """How timesteps are drawn, see `moebius.distill.timesteps.sample_timesteps`; `noise_offset` of the noise."""

    sampling: Literal["uniform", "lognorm"] = "lognorm"
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)
    noise_offset: float = Field(default=0.0357, ge=0)


class PerceptualSettings(_Part):
    """E-LatentLPIPS: the file of its weights, see `moebius.distill.perceptual`."""

    weights: Path
    encoder: str = "sdxl"
    augment: str | None = "bg"
    normalize: bool = False


class VaeLosses(_Part):
    """Multipliers of the autoencoder's losses.

    Attributes:
        pixels: mean absolute difference.
        edges: the same of differences between neighbouring pixels, at full, half and quarter size.
        colours: mean absolute difference of means over 8x8 pixels. The others hardly miss a colour that is off.
        kl: Kullback-Leibler divergence from N(0, 1), per latent number.
        masked: share of the batch that is seen with its hole emptied: the encoder meets such pictures, too.
    """

    pixels: float = Field(default=1.0, ge=0)
    edges: float = Field(default=1.0, ge=0)
    colours: float = Field(default=1.0, ge=0)
    kl: float = Field(default=1e-6, ge=0)
    masked: float = Field(default=0.25, ge=0, le=1)


class EmaSettings(_Part):
    """Averaged weights, see `moebius.distill.optimizers.averaged`."""

    decay: float = Field(default=0.9999, ge=0, le=1)


class SampleSettings(_Part):
    """Pictures of the network in training, for TensorBoard and as files: every so many steps, so many samples."""

    every: int = Field(ge=1)
    count: int = Field(default=4, ge=1, le=64)
    steps: int = Field(default=10, ge=1, le=1000)
    guidance_scale: float = Field(default=1.0, ge=0)


class Settings(_Part):
    """A training run.

    Attributes:
        train: the network that is trained.
        out: the folder of checkpoints, logs and the finished weights.
        steps: of the optimizer.
        batch: samples of a process in one pass; `accumulate` passes are one step.
        init: a weights source to start from (fine-tuning); None draws fresh weights.
        teacher: a weights source; None trains the student on the true noise alone.
        vae: a weights source, where samples are pictures and for sample pictures.
        hole_weight: how often squared errors of the noise count inside of the hole; the paper's 1 leaves small holes
            little say. Weights are scaled to a mean of 1.
        batch_norm: `train`; `frozen` keeps the statistics (fine-tuning in small batches); `sync` shares them between
            processes (CUDA).
        lambda_form: how λ layers compute, see `moebius.lambda_layers.set_lambda_form`.
        clip: greatest norm of the gradient; None leaves it.
        weights_dtype: of the finished weights; half as large as float16.
        average_statistics: batches by which the batch norms of the averaged network are measured when the run ends.
            With 0 they have those of the network in training, as in the released code: of other weights, which shows
            where the learning rate is high.
    """

    train: Literal["student", "teacher", "vae"]
    out: Path
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    accumulate: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    network: NetworkSettings = NetworkSettings()
    init: str | None = None
    teacher: str | None = None
    vae: str | None = None
    data: DataSettings
    losses: _Losses = LossOptions()
    balance: _Balance = BalanceOptions()
    hole_weight: float = Field(default=1.0, gt=0)
    vae_losses: VaeLosses = VaeLosses()
    perceptual: PerceptualSettings | None = None
    timesteps: TimestepSettings = TimestepSettings()
    optimizer: _Optimizer = OptimizerOptions()
    schedule: _Schedule = ScheduleOptions()
    ema: EmaSettings | None = EmaSettings()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    batch_norm: Literal["train", "frozen", "sync"] = "train"
    lambda_form: Literal["reference", "fast", "triton"] = "fast"
    clip: float | None = Field(default=1.0, gt=0)
    log_every: int = Field(default=10, ge=1)
    save_every: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)
    samples: SampleSettings | None = None
    tensorboard: bool = True
    weights_dtype: Literal["float32", "float16"] = "float32"
    average_statistics: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _parts_fit(self) -> Settings:
        if self.train == "student":
            if self.teacher is None and self.losses.needs_teacher:
                raise ValueError(
                    "losses coarse and fine compare with a teacher and `teacher` is null; name a weights source, or "
                    "set both multipliers to 0"
                )
            if self.losses.perceptual and self.perceptual is None:
                raise ValueError(
                    "the perceptual loss is on (multiplier "
                    f"{self.losses.perceptual:g}) and there is no `perceptual: {{weights: FILE}}` with "
                    "E-LatentLPIPS' weights; give the file, or write `perceptual: 0` under `losses`"
                )
        elif self.teacher is not None:
            raise ValueError(f"`teacher` is for `train: student`; with `train: {self.train}` leave it out")
        if self.data.latent_crop and self.train != "teacher":
            raise ValueError("`latent_crop` is for `train: teacher`; the student is tied to one size")
        if self.average_statistics and self.batch_norm == "frozen":
            raise ValueError(
                f"`average_statistics: {self.average_statistics}` measures the batch norms anew and "
                "`batch_norm: frozen` keeps their statistics; leave out one of the two"
            )
        if self.train == "vae":
            if self.data.latents is not None:
                raise ValueError("the VAE is trained on pictures; give `data: {pictures: ...}`")
        elif self.data.latents is None and self.vae is None:
            raise ValueError("samples are pictures, so a `vae` must encode them; name its weights source")
        if self.train != "vae" and self.samples and self.vae is None:
            raise ValueError("`samples` are pictures, so they need a `vae`; name its weights source")
        return self

    def identity(self) -> dict[str, Any]:
        """What a resumed run may not change: all but where, how long and how fast it learns, its precision, how data is
        read ahead, and what is kept and shown."""
        return json.loads(self.model_dump_json(exclude=_FREE))


def load_settings(path: Path) -> Settings:
    """The settings in a YAML file. Paths in it are as written: relative to the working directory.

    Raises:
        TrainingError: no such file, not YAML, or settings that make no run; every fault is named.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TrainingError(f"{path} is larger than 1 MiB; expected a YAML file of settings")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise TrainingError(f"{path} is not YAML: {error}") from error
    return parse_settings(content, str(path))


def parse_settings(content: Any, name: str) -> Settings:
    """The settings of a parsed file.

    Raises:
        TrainingError: they make no run; every fault is named.
    """
    if not isinstance(content, dict):
        raise TrainingError(f"{name} holds a {type(content).__name__}; expected names and values, see docs/distill.md")
    try:
        settings = Settings.model_validate(content)
    except ValidationError as error:
        raise TrainingError(f"{name}: {'; '.join(_fault(fault) for fault in error.errors())}") from error
    settings.network.build()
    return settings


def changed(found: dict[str, Any], now: Settings) -> list[str]:
    """Names of an earlier run's `Settings.identity` that have another value now.

    Options that did not exist then are taken as their defaults, which do nothing. Two ways to write one path (`a`,
    `./a`, `/here/a`) are the same.
    """
    try:
        then = Settings.model_validate(found | {"out": now.out, "steps": now.steps})
    except ValidationError as error:
        return [_fault(fault) for fault in error.errors()]
    before, ours = _resolved(then).identity(), _resolved(now).identity()
    return [name for name in ours if before[name] != ours[name]]


def _is_local(source: str) -> bool:
    try:
        return isinstance(parse_source(source), LocalSource)
    except CheckpointError:  # reported where the source is opened
        return False


def _resolved(settings: Settings) -> Settings:
    """Settings in which every path is absolute and without links; names that are no paths stay."""
    data = settings.data
    pictures = tuple(
        part if names_no_file(part.source) else part.model_copy(update={"source": os.path.realpath(part.source)})
        for part in data.pictures
    )
    latents = None if data.latents is None else Path(os.path.realpath(data.latents))
    update: dict[str, Any] = {"data": data.model_copy(update={"pictures": pictures, "latents": latents})}
    for name in ("init", "teacher", "vae"):
        source = getattr(settings, name)
        update[name] = os.path.realpath(source) if source is not None and _is_local(source) else source
    if settings.perceptual is not None:
        weights = Path(os.path.realpath(settings.perceptual.weights))
        update["perceptual"] = settings.perceptual.model_copy(update={"weights": weights})
    return settings.model_copy(update=update)


def _fault(fault: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    received = fault.get("input")
    shown = f" (received {received!r})" if isinstance(received, str | int | float | bool) else ""
    return f"{place}: {message}{shown}" if place else message
