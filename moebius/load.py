"""Networks with weights in them, from a weights source string."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moebius.checkpoint import Checkpoint, load_checkpoint, load_config
from moebius.config import PredictionType, Preset, StudentConfig, TeacherConfig, VaeConfig
from moebius.errors import CheckpointError, MisfitError
from moebius.sources import released_guidance
from moebius.stand_in import TensorSpec
from moebius.student import Moebius
from moebius.teacher import Teacher
from moebius.vae import build_vae
from moebius.variants import layers_named

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

DEFAULT_WEIGHTS = "hub:hustvl/Moebius/ft_places2"
DEFAULT_TEACHER = "hub:hustvl/PixelHacker/ft_places2"
DEFAULT_VAE = "hub:hustvl/PixelHacker/vae"


def default_sources(preset: str) -> tuple[str, str]:
    """Weights of student and VAE that belong to a preset: the released ones, or those that come with this package."""
    return ("shipped:small", "shipped:small/vae") if preset == "small" else (DEFAULT_WEIGHTS, DEFAULT_VAE)


def default_guidance(source: str, sizes: Preset) -> float:
    """The guidance scale to use with the weights of `source` unless asked otherwise.

    That of the paper's table 6 for the released weights (2.5 for scenes, 2.0 for portraits), else the preset's.

    Raises:
        CheckpointError: `source` is no source string.
    """
    released = released_guidance(source)
    return sizes.guidance_scale if released is None else released


def tensor_specs(module: nn.Module) -> dict[str, TensorSpec]:
    """Name -> (shape, dtype) of a module's state dict; works on the meta device, where it costs nothing."""
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in module.state_dict().items()}


def load_student(
    source: str, config: StudentConfig, progress: Callable[[str], None] | None = None
) -> tuple[Moebius, Checkpoint]:
    """The student with the weights of `source` (see `moebius.checkpoint`), in eval mode.

    Raises:
        CheckpointError: the source cannot be had, or does not hold exactly this network.
    """
    with torch.device("meta"):
        model = Moebius(config)
    try:
        return model.eval(), _fill(model, source, progress)
    except MisfitError as error:
        found = _other_layers(model, error.unexpected)
        if not found:
            raise
        wanted = {name: getattr(config, name) for name in found}
        raise CheckpointError(
            f"{source} has other layers than this network: {_listed(found)}, expected {_listed(wanted)}; choose them "
            "in the student's sizes to train it further. Only the released network's layers can be exported"
        ) from error


def _other_layers(model: Moebius, unexpected: list[str]) -> dict[str, str]:
    """The fields of the config that would make `unexpected` the tensors that only the file has; empty if none do."""
    found = layers_named(unexpected)
    try:
        with torch.device("meta"):
            other = Moebius(replace(model.config, **found))  # type: ignore[arg-type]
    except ValueError:  # these sizes do not go with those layers
        return {}
    return found if set(tensor_specs(other)) - set(tensor_specs(model)) == set(unexpected) else {}


def _listed(layers: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in layers.items())


def load_teacher(
    source: str, config: TeacherConfig, progress: Callable[[str], None] | None = None
) -> tuple[Teacher, Checkpoint]:
    """The teacher with the weights of `source` (see `moebius.checkpoint`), in eval mode.

    Raises:
        CheckpointError: the source cannot be had, or does not hold exactly this network.
    """
    with torch.device("meta"):
        teacher = Teacher(config)
    return teacher.eval(), _fill(teacher, source, progress)


def load_vae(
    source: str, config: VaeConfig, progress: Callable[[str], None] | None = None
) -> tuple[AutoencoderKL, Checkpoint]:
    """The autoencoder with the weights of `source`, in eval mode.

    A `config.json` beside the weights must describe the sizes of `config`; its scaling factor too.

    Raises:
        CheckpointError: as for `load_student`, or the sizes differ.
    """
    _check_vae_config(load_config(source, progress=progress), config, source)
    with torch.device("meta"):
        vae = build_vae(config)
    return vae.eval(), _fill(vae, source, progress)


def check_prediction_type(source: str, expected: PredictionType, progress: Callable[[str], None] | None = None) -> None:
    """Refuses weights that predict something else: they would run, and make noise of every picture.

    Weights whose `config.json` does not say, such as the released ones, are taken as they are.

    Raises:
        CheckpointError: the `config.json` beside the weights names another prediction type.
    """
    found = (load_config(source, progress=progress) or {}).get("prediction_type", expected)
    if found != expected:
        raise CheckpointError(
            f"{source}: its config.json says prediction_type = {found!r}, expected {expected!r}; choose weights that "
            "were trained for it, or the --preset that they were trained at"
        )


def _fill(module: nn.Module, source: str, progress: Callable[[str], None] | None) -> Checkpoint:
    checkpoint = load_checkpoint(source, tensor_specs(module), progress=progress)
    module.load_state_dict(checkpoint.state_dict, strict=True, assign=True)
    return checkpoint


def _check_vae_config(found: dict[str, Any] | None, config: VaeConfig, source: str) -> None:
    if found is None:
        return
    for name, expected in config.to_diffusers().items():
        want = list(expected) if isinstance(expected, tuple) else expected
        if name in found and found[name] != want and name != "sample_size":
            raise CheckpointError(
                f"{source}: its config.json says {name} = {found[name]!r}, this preset expects {want!r}; "
                "choose the VAE that belongs to the network, or another --preset"
            )
    if found.get("shift_factor"):
        raise CheckpointError(
            f"{source}: its config.json has a shift_factor of {found['shift_factor']!r}; this network's VAE has none"
        )
