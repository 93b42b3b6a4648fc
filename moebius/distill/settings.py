"""Settings of a training run: reads and checks the file of `moebius-distill CONFIG.yaml`."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from moebius.data.masks import HOLES, MaskSettings
from moebius.data.opening import names_no_file
from moebius.data.pictures import CropSettings
from moebius.distill.few_step_settings import Objective, check_objective, with_objective_defaults
from moebius.distill.objectives.balance import BalanceOptions
from moebius.distill.objectives.consistency import ConsistencyOptions
from moebius.distill.objectives.losses import LossOptions, Tap
from moebius.distill.objectives.pixels import PixelOptions
from moebius.distill.optimizers import OptimizerOptions, ScheduleOptions
from moebius.errors import CheckpointError, TrainingError
from moebius.network.config import PredictionType, Preset, StudentConfig, TeacherConfig, VaeConfig, preset
from moebius.weights.sources import LocalSource, parse_source

_MAX_BYTES = 1 << 20
_FREE: Any = {
    **dict.fromkeys(("out", "steps", "schedule", "precision"), True),
    **dict.fromkeys(("log_every", "save_every", "keep", "samples", "tensorboard"), True),
    **dict.fromkeys(("weights_dtype", "average_statistics"), True),
    "optimizer": {"learning_rate"},
    "data": {"threads", "broken"},
}
"""Settings that a resumed run may change; see `Settings.identity`."""
_Config = TypeVar("_Config", StudentConfig, TeacherConfig, VaeConfig)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _taps(value: Any) -> Any:
    """Parses taps such as `2:5` or `2:5:0.5`: student feature, teacher feature, weight."""
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
    """Rejects unknown names for a dataclass, which pydantic would ignore."""
    names = [field.name for field in fields(kind)]

    def check(value: Any) -> Any:
        if kind is MaskSettings and isinstance(value, str):
            if value not in HOLES:
                raise ValueError(f"unknown masks {value}; expected {' or '.join(HOLES)}, or numbers")
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
_Consistency = Annotated[ConsistencyOptions, _known(ConsistencyOptions)]
_Pixels = Annotated[PixelOptions, _known(PixelOptions)]
_Masks = Annotated[MaskSettings, _known(MaskSettings)]
_Crops = Annotated[CropSettings, _known(CropSettings)]


class NetworkSettings(_Part):
    """A preset with changed sizes, layers or prediction type."""

    preset: str = "full"
    prediction_type: PredictionType | None = None
    student: dict[str, Any] = {}
    teacher: dict[str, Any] = {}
    vae: dict[str, Any] = {}

    def build(self) -> Preset:
        """Builds the configurations of the three networks.

        Raises:
            TrainingError: an unknown name, or an invalid value.
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
    """A picture source in the syntax of `moebius.data.opening.open_source`, repeated `times` per epoch."""

    source: str
    times: int = Field(default=1, ge=1)


class DataSettings(_Part):
    """Where samples come from: pictures, or latents that `moebius-distill encode` wrote.

    Attributes:
        pictures: sources; they need a VAE, except to train the VAE.
        latents: a folder of encoded samples.
        size: side of a sample in pixels; default: the student's size.
        scene_size: side in pixels at which scenes are drawn before cropping; default: `size`.
        masks, crops: for pictures only; encoded samples have their own. `masks` may be `small` or `training`.
        latent_crop: side of a square that is cropped from the latents at the masked region; None does not crop. The
            teacher takes any size. The student takes the square as one from a random place of its picture; train it on
            whole pictures at the end. Latents may be encoded at this size. Smaller is faster.
        threads: threads that draw and decode ahead.
        broken: whether an unusable picture is skipped or ends the run.
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


class StartSettings(_Part):
    """Samples that are noised as mode `best` of the runtime starts: from smooth values under the mask.

    There, the first step sees noise on the filled start, not on a true picture, and what it predicts decides the
    result (the start is SDEdit's: Meng et al. 2022, section 3). The prediction's target stays the true picture. Needs
    latents that were encoded with `--starts`.

    Attributes:
        share: of samples.
        least, most: bounds of their timesteps, both included, of which all are equally likely.
    """

    share: float = Field(ge=0, le=1)
    least: int = Field(default=300, ge=1)
    most: int = Field(default=999, le=999)

    @model_validator(mode="after")
    def _rising(self) -> StartSettings:
        if self.least > self.most:
            raise ValueError(f"`least` {self.least} is above `most` {self.most}")
        return self


class TimestepSettings(_Part):
    """Options of `moebius.distill.objectives.timesteps.sample_timesteps`, and `noise_offset` of `sample_noise`."""

    sampling: Literal["uniform", "lognorm"] = "lognorm"
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)
    noise_offset: float = Field(default=0.0357, ge=0)


class SnrSettings(_Part):
    """Loss weights by timestep: bounds of the signal-to-noise ratio, see `timesteps.snr_weights`."""

    least: float = Field(default=0.0, ge=0)
    most: float = Field(default=5.0, gt=0)


class PerceptualSettings(_Part):
    """E-LatentLPIPS: the file of its weights, see `moebius.distill.objectives.perceptual`."""

    weights: Path
    encoder: str = "sdxl"
    augment: str | None = "bg"
    normalize: bool = False


class VaeLosses(_Part):
    """Multipliers of the autoencoder's losses.

    Attributes:
        pixels: mean absolute difference.
        edges: mean absolute error of differences between adjacent pixels, at full, half and quarter size.
        colours: mean absolute error of means over 8x8 pixels. The other losses hardly notice a colour shift.
        kl: Kullback-Leibler divergence from N(0, 1), per latent number.
        masked: share of the batch whose masked region is 0, because the encoder is used on such pictures, too.
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
    """Sample pictures during training, for TensorBoard and as files: `count` samples every `every` steps."""

    every: int = Field(ge=1)
    count: int = Field(default=4, ge=1, le=64)
    steps: int = Field(default=10, ge=1, le=1000)
    guidance_scale: float = Field(default=1.0, ge=0)


class Settings(_Part):
    """A training run.

    Attributes:
        train: the network that is trained.
        out: the folder of checkpoints, logs and the finished weights.
        steps: optimizer steps.
        batch: samples per process and pass; a step has `accumulate` passes.
        init: a weights source to start from (fine-tuning); None draws fresh weights.
        teacher: a weights source; None trains the student on the true noise alone.
        vae: a weights source; needed to train on pictures, and for sample pictures.
        start: share of samples that are noised from the filled start; None for none.
        snr: weights of the loss by timestep; None is uniform, as in the paper.
        pixels: options of the loss on decoded pixels of the masked region, which needs `vae`; None for none.
        hole_weight: weight of squared errors in the masked region. With the paper's 1 a small masked region hardly
            counts. Weights are scaled to a mean of 1.
        batch_norm: `train`; `frozen` keeps the statistics (fine-tuning in small batches); `sync` shares them between
            processes (CUDA).
        lambda_form: how λ layers compute, see `moebius.network.lambda_layers.set_lambda_form`.
        clip: greatest norm of the gradient; None does not clip.
        weights_dtype: dtype of the final weights.
        average_statistics: number of batches on which the averaged network's batch norm statistics are measured at
            the end. With 0 they are copied from the network in training, as in the released code, and do not match
            the averaged weights if the learning rate is high.
        objective: `diffusion` is the training of the paper; `guidance` and `consistency` train a student for fewer
            network evaluations, see `moebius.distill.few_step_settings`.
        guidance_scale: for `guidance` and `consistency`: the teacher's, which the student learns.
        consistency: options of that objective.
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
    start: StartSettings | None = None
    snr: SnrSettings | None = None
    pixels: _Pixels | None = None
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
    objective: Objective = "diffusion"
    guidance_scale: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    consistency: _Consistency = ConsistencyOptions()

    @model_validator(mode="before")
    @classmethod
    def _objective_defaults(cls, content: Any) -> Any:
        return with_objective_defaults(content)

    @model_validator(mode="after")
    def _parts_fit(self) -> Settings:
        check_objective(self)
        if self.train == "student" and self.objective == "diffusion":
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
        elif self.train != "student" and self.teacher is not None:
            raise ValueError(f"`teacher` is for `train: student`; with `train: {self.train}` leave it out")
        if self.data.latent_crop and self.train == "vae":
            raise ValueError("`latent_crop` crops latents; with `train: vae` give `size`, the side of the pictures")
        if self.start and (self.data.latents is None or self.train == "vae"):
            raise ValueError("`start` needs latents that `moebius-distill encode --starts` wrote; give `data: latents`")
        if self.pixels and self.train == "vae":
            raise ValueError("`pixels` decodes predicted latents; with `train: vae` leave it out, see `vae_losses`")
        if self.pixels and self.vae is None:
            raise ValueError(
                "`pixels` decodes latents, so it needs the `vae` that encoded them; name its weights source"
            )
        if self.snr and self.snr.least > self.snr.most:
            raise ValueError(f"`snr`: least {self.snr.least:g} is above most {self.snr.most:g}")
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
        """The settings that a resumed run must keep: all except `_FREE`."""
        return json.loads(self.model_dump_json(exclude=_FREE))


def load_settings(path: Path) -> Settings:
    """Loads settings from a YAML file. Relative paths refer to the working directory.

    Raises:
        TrainingError: no such file, not YAML, or invalid settings; the message names every fault.
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
    """Checks the settings of a parsed file.

    Raises:
        TrainingError: invalid settings; the message names every fault.
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
    """Names of settings that differ from an earlier run's `Settings.identity`.

    Options that did not exist then have their defaults. Different spellings of one path (`a`, `./a`) are equal.
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
    """Settings with absolute paths, links resolved."""
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
