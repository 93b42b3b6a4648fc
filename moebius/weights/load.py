"""Loads student, teacher and VAE from a weights source string."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from moebius.errors import CheckpointError, MisfitError
from moebius.network.config import PredictionType, Preset, StudentConfig, TeacherConfig, VaeConfig
from moebius.network.student import Moebius
from moebius.network.teacher import Teacher
from moebius.network.tiny_vae import build_tiny_vae
from moebius.network.vae import build_vae
from moebius.network.variants import layers_named
from moebius.weights.checkpoint import Checkpoint, load_checkpoint, load_config
from moebius.weights.sources import released_guidance
from moebius.weights.stand_in import TensorSpec

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

_Config = TypeVar("_Config")
_Module = TypeVar("_Module", bound=nn.Module)

DEFAULT_WEIGHTS = "hub:hustvl/Moebius/ft_places2"
DEFAULT_TEACHER = "hub:hustvl/PixelHacker/ft_places2"
DEFAULT_VAE = "hub:hustvl/PixelHacker/vae"


def default_sources(preset: str) -> tuple[str, str]:
    """Default sources of student and VAE for a preset: the released ones, or the package's own for `small`."""
    return ("shipped:small", "shipped:small/vae") if preset == "small" else (DEFAULT_WEIGHTS, DEFAULT_VAE)


def default_guidance(source: str, sizes: Preset) -> float:
    """The default guidance scale for the weights of `source`.

    For released weights it is the paper's (table 6: 2.5 for scenes, 2.0 for portraits), otherwise the preset's.

    Raises:
        CheckpointError: `source` is not a valid source string.
    """
    released = released_guidance(source)
    return sizes.guidance_scale if released is None else released


def tensor_specs(module: nn.Module) -> dict[str, TensorSpec]:
    """Name -> (shape, dtype) of a module's state dict. Works on the meta device, which allocates nothing."""
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in module.state_dict().items()}


def load_student(
    source: str, config: StudentConfig, progress: Callable[[str], None] | None = None
) -> tuple[Moebius, Checkpoint]:
    """Loads the student with the weights of `source` (see `moebius.weights.checkpoint`), in eval mode.

    Raises:
        CheckpointError: the source cannot be read, or its tensors are not exactly this network's.
    """
    model = _empty(Moebius, config)
    try:
        return model, _fill(model, source, progress)
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
    """Layer fields of a config whose network has exactly the `unexpected` tensors in addition; empty if none has."""
    found = layers_named(unexpected)
    try:
        other = _empty(Moebius, replace(model.config, **found))  # type: ignore[arg-type]
    except ValueError:  # these sizes do not fit those layers
        return {}
    return found if set(tensor_specs(other)) - set(tensor_specs(model)) == set(unexpected) else {}


def _listed(layers: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in layers.items())


def load_teacher(
    source: str, config: TeacherConfig, progress: Callable[[str], None] | None = None
) -> tuple[Teacher, Checkpoint]:
    """Loads the teacher with the weights of `source`, in eval mode. Errors as `load_student`."""
    teacher = _empty(Teacher, config)
    return teacher, _fill(teacher, source, progress)


def load_vae(
    source: str, config: VaeConfig, progress: Callable[[str], None] | None = None
) -> tuple[AutoencoderKL, Checkpoint]:
    """Loads the autoencoder with the weights of `source`, in eval mode.

    A `config.json` beside the weights must agree with `config`, including the scaling factor.

    Raises:
        CheckpointError: as for `load_student`, or the sizes differ.
    """
    _check_vae_config(load_config(source, progress=progress), config, source)
    vae = _empty(build_vae, config)
    return vae, _fill(vae, source, progress)


def load_tiny_vae(source: str, progress: Callable[[str], None] | None = None) -> tuple[AutoencoderTiny, Checkpoint]:
    """Loads a tiny autoencoder of the published sizes with the weights of `source`, in eval mode.

    Raises:
        CheckpointError: as for `load_student`, or the `config.json` beside the weights has other sizes.
    """
    vae = _empty(lambda _: build_tiny_vae(), None)
    found = load_config(source, progress=progress) or {}
    for name, value in vae.config.items():
        expected = list(value) if isinstance(value, tuple) else value
        if name in found and found[name] != expected:
            raise CheckpointError(
                f"{source}: its config.json says {name} = {found[name]!r}, a tiny decoder for these latents has "
                f"{expected!r}; choose hub:madebyollin/taesdxl, or a file of its sizes"
            )
    return vae, _fill(vae, source, progress)


def check_prediction_type(source: str, expected: PredictionType, progress: Callable[[str], None] | None = None) -> None:
    """Checks that weights predict `expected` (noise or velocity). Others would run and produce noise.

    Weights without a `prediction_type` in `config.json`, such as the released ones, are accepted.

    Raises:
        CheckpointError: the `config.json` beside the weights names another prediction type.
    """
    found = (load_config(source, progress=progress) or {}).get("prediction_type", expected)
    if found != expected:
        raise CheckpointError(
            f"{source}: its config.json says prediction_type = {found!r}, expected {expected!r}; choose weights that "
            "were trained for it, or the --preset that they were trained at"
        )


def _empty(build: Callable[[_Config], _Module], config: _Config) -> _Module:
    """A network without memory for its weights (meta device), in eval mode."""
    with torch.device("meta"):
        return build(config).eval()


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
