"""E-LatentLPIPS as the perceptual distance: the package `elatentlpips`, with its weights from a file.

Kang et al. 2024, "Distilling Diffusion Models into Conditional GANs", section 3.2. The package (licence CC BY-NC 4.0,
not part of this project) normally downloads its weights into the working directory. Here it is built empty and
filled from a file that is checked like any checkpoint; nothing is downloaded.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from moebius.errors import TrainingError
from moebius.weights.checkpoint import load_checkpoint
from moebius.weights.load import tensor_specs

_LATENT_CHANNELS = 4
_SLICES = 5


class ELatentLpips(nn.Module):
    """Distance of latents in the features of a VGG-16 trained on latents, plus their mean |difference|.

    With `augment`, the same random transformation is applied to both first (ensembling), drawn from torch's global
    generator. The network is frozen.

    Args:
        weights: the package's calibrated weights for `encoder`, for SDXL's VAE `sdxl_latest_vgg16_tuned.pth`, or the
            same tensors as safetensors.
        encoder: whose latents, "sdxl" (the released recipe), "sd15" or "sd21": those with 4 channels.
        augment: the package's name of the transformations, "bg" (the released recipe: flips, turns, shifts, scales),
            or None for none.
        normalize: let the package multiply latents by the VAE's scale first. False: ours are scaled already, and its
            documentation asks for True only where they are not. The released training script passes True.

    Raises:
        TrainingError: the package or the weights are missing, or an option is none of the package's.
        CheckpointError: the file is not the weights of this network.
    """

    def __init__(
        self, weights: str | Path, *, encoder: str = "sdxl", augment: str | None = "bg", normalize: bool = False
    ) -> None:
        super().__init__()
        if encoder not in ("sdxl", "sd15", "sd21"):
            raise TrainingError(f"encoder is {encoder!r}; expected one of latents with 4 channels: sdxl, sd15, sd21")
        if not Path(weights).is_file():
            raise TrainingError(
                f"there is no file {weights} with E-LatentLPIPS' weights; download {encoder}_latest_vgg16_tuned.pth "
                "where the package elatentlpips says, or set the perceptual loss' multiplier to 0"
            )
        package = _package("elatentlpips.elatentlpips")
        if augment is not None and augment not in package.ada_augpipe:
            raise TrainingError(f"augment is {augment!r}; expected one of {', '.join(package.ada_augpipe)}, or none")
        self._normalize = normalize
        self.network = _empty(package, _package("elatentlpips.vgg16"), encoder)
        checkpoint = load_checkpoint(str(weights), tensor_specs(self.network))
        self.network.load_state_dict(checkpoint.state_dict, strict=True, assign=True)
        if augment is not None:
            self.network.augment = package.AdaAugment(**package.ada_augpipe[augment])
        self.requires_grad_(False)
        self.network.eval()

    def train(self, mode: bool = True) -> ELatentLpips:
        """Does nothing: the network always stays in eval mode."""
        return self

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances [B], float32, of scaled latents x and y [B, 4, h, w]. Differentiable in both."""
        ensembling = self.network.augment is not None
        distance = self.network(x.float(), y.float(), normalize=self._normalize, ensembling=ensembling)
        return distance.flatten()


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise TrainingError(
            f"the perceptual loss needs the package elatentlpips, which cannot be imported here ({error}); install it "
            "with torchvision, or set the loss' multiplier to 0"
        ) from error


def _empty(package: ModuleType, vgg: ModuleType, encoder: str) -> Any:
    """The package's network without weights, on the meta device, and without transformations.

    Asked for a network without pretrained weights, the package builds the VGG-16 for pictures (3 channels, all
    poolings). The one for latents is a class of its own; its layers go into the same slices under the same names.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about the old names of arguments that the package uses
        network = package.ELatentLPIPS(pretrained=False, pnet_rand=True, encoder=encoder, augment=None, verbose=False)
        layers = vgg.LatentVGG16BN(_LATENT_CHANNELS).model.features
    for number in range(1, _SLICES + 1):
        part = network.net.get_submodule(f"slice{number}")
        for name, _ in list(part.named_children()):
            part.add_module(name, layers[int(name)])
    return network
