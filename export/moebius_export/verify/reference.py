"""Loads the PyTorch reference with the weights that the bundle was exported from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from moebius import Preset, preset
from moebius.weights.checkpoint import Checkpoint
from moebius.weights.load import load_student, load_vae
from moebius.weights.sampling_record import SamplingRecord, read_sampling_record
from moebius_export.errors import ExportError
from moebius_export.network.torch_runtime import origin, unet_modules, vae_modules
from moebius_runtime.bundle.manifest import GraphName, Manifest, WeightsInfo

Progress = Callable[[str], None]
Say = Progress  # its name in version 0.1


@dataclass(frozen=True)
class Reference:
    """The PyTorch module of every graph, in eval mode, the sizes of the network, and what its weights record."""

    sizes: Preset
    modules: Mapping[GraphName, nn.Module]
    parameters: int
    record: SamplingRecord


def load_reference(manifest: Manifest, weights: str | None, vae: str | None, progress: Progress) -> Reference:
    """Loads the network with the weights that the manifest names, or with `weights` and `vae` if they are the same.

    Raises:
        CheckpointError: the weights cannot be loaded or do not fit the preset.
        ExportError: the bundle was exported from other weights.
    """
    sizes = preset(manifest.model.preset)
    unet_source, vae_source = weights or origin(manifest.model.unet), vae or origin(manifest.model.vae)
    student, checkpoint = load_student(unet_source, sizes.student, progress)
    _check_same(checkpoint, manifest.model.unet, "U-Net", "--weights", unet_source)
    autoencoder, checkpoint = load_vae(vae_source, sizes.vae, progress)
    _check_same(checkpoint, manifest.model.vae, "VAE", "--vae", vae_source)
    graphs = unet_modules(student, distilled=manifest.guidance is not None)
    modules: dict[GraphName, nn.Module] = graphs | vae_modules(autoencoder)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    return Reference(sizes, modules, parameters, read_sampling_record(unet_source, progress))


def _check_same(checkpoint: Checkpoint, stated: WeightsInfo, what: str, option: str, source: str) -> None:
    if checkpoint.sha256 != stated.sha256:
        raise ExportError(
            f"the {what} weights of {source} have the SHA-256 {checkpoint.sha256[:16]}..., the bundle was exported "
            f"from {stated.origin} with {stated.sha256[:16]}...; nothing was compared. Name those with {option}."
        )
