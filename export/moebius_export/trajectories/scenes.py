"""What to run a bundle on: pictures with holes, drawn from a seed or read from folders, and a graph's inputs. Needs no
torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moebius_export.errors import ExportError
from moebius_runtime import regions
from moebius_runtime.bundle.check_values import window_inputs
from moebius_runtime.bundle.manifest import GraphName, Manifest
from moebius_runtime.commands.pairing import plan_jobs
from moebius_runtime.errors import InputError
from moebius_runtime.images.masks import BoolArray, mask_from_picture
from moebius_runtime.images.pictures import load_picture
from moebius_runtime.pipeline import InpaintOptions
from moebius_runtime.sampling.schedule import initial_noise

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Scene:
    """What is filled, and how. `picture` uint8 [S, S, 3] and `mask` bool [S, S] have the network's size."""

    picture: npt.NDArray[np.uint8]
    mask: BoolArray
    options: InpaintOptions


_GUIDED = 2.5  # the paper's, table 6


def guided_scale(manifest: Manifest) -> float:
    """A guidance scale at which the graph `unet` runs: the bundle's, or 2.5 where that is 1 and another graph would."""
    scale = manifest.defaults.guidance_scale
    return _GUIDED if scale == 1 and "unet_conditional" in manifest.graphs else scale


def default_steps(manifest: Manifest, usual: int) -> int:
    """Inference steps where the user names none: `usual`, or the recommended number of a bundle for sampler `lcm`."""
    return manifest.defaults.num_inference_steps if manifest.defaults.sampler == "lcm" else usual


def seeded_scene(manifest: Manifest, steps: int, seed: int) -> Scene:
    """A drawn scene of the network's size with an irregular masked region, and noise of the same seed."""
    size, geometry = manifest.geometry.image_size, manifest.geometry
    shape = (1, geometry.latent_channels, geometry.latent_size, geometry.latent_size)
    noise = initial_noise(seed, shape, manifest.defaults.noise_offset)
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    picture = np.zeros((size, size, 3))
    for band in range(3):
        for _ in range(6):  # soft colours
            a, b, phase = rng.uniform(-6, 6, 3)
            picture[..., band] += rng.uniform(10, 25) * np.cos(a * x + b * y + phase)
    picture += 128
    for _ in range(8):  # things with edges
        centre, radius = rng.uniform(0, 1, 2), rng.uniform(0.05, 0.2)
        inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
        picture[inside] = rng.uniform(0, 255, 3) + 20 * np.cos(rng.uniform(20, 80) * x[inside])[:, None]
    picture += rng.normal(0, 4, picture.shape)  # texture
    angle = np.arctan2(y - 0.55, x - 0.45)
    edge = 0.24 + 0.05 * np.cos(3 * angle + rng.uniform(0, 6)) + 0.03 * np.cos(7 * angle)
    mask = np.hypot(x - 0.45, y - 0.55) < edge
    options = InpaintOptions(mode="reference", steps=steps, noise=noise)  # every backend must do what the original does
    return Scene(np.clip(picture, 0, 255).astype(np.uint8), mask, options)


def scenes_of(manifest: Manifest, steps: int, count: int, seed: int, data: Path | None = None) -> list[Scene]:
    """Scenes from the seeds `seed`, `seed` + 1, ..., or with `data` the first pictures there and noise of these seeds.

    Args:
        manifest: of the bundle that will run them.
        steps: inference steps of each.
        count: how many; fewer where `data` holds fewer.
        seed: the first.
        data: a folder with the folders `images` and `masks`, whose files are paired by stem.

    Raises:
        InputError: a picture without a mask, one that cannot be read, a mask of another size than its picture, or one
            that marks nothing or everything.
        ExportError: `data` has not these folders.
    """
    scenes = [seeded_scene(manifest, steps, seed + index) for index in range(count)]
    if data is None:
        return scenes
    if not ((data / "images").is_dir() and (data / "masks").is_dir()):
        raise ExportError(f"--data {data}: expected a folder with two folders, images and masks, paired by stem")
    pairs = plan_jobs(data / "images", data / "masks", data / ".none")[:count]
    size = manifest.geometry.image_size
    found = []
    for pair, scene in zip(pairs, scenes, strict=False):
        picture = load_picture(pair.image)
        mask = mask_from_picture(load_picture(pair.mask), picture.shape, name=str(pair.mask), hints="none")
        crop = regions.whole_crop(picture.shape, size, f"{pair.image}: use a picture that is less long")
        part = picture.part(regions.window(crop, picture.shape))
        rgb = regions.to_network(part.to_rgb(), crop, picture.shape, size)
        region = regions.mask_to_network(mask, crop, picture.shape, size)
        if region.all():
            raise InputError(
                f"{pair.mask} marks every pixel once it has the network's {size}x{size}; mark less of the picture."
            )
        found.append(replace(scene, picture=rgb, mask=region))
    return found


def seeded_inputs(graph: GraphName, manifest: Manifest, seed: int) -> Inputs:
    """Inputs of a graph in the manifest's order, with the statistics that the pipeline gives it, drawn from a seed.

    Open dimensions are 1, or a window of a quarter of the square (`window_inputs`). The export compared its files on
    other values.
    """
    rng = np.random.RandomState(seed)
    inputs: Inputs = {}
    tensors = manifest.every_graph[graph].inputs
    if graph == "vae_decoder_upper":
        overview = next(tensor.shape for tensor in tensors if tensor.name == "overview")
        return window_inputs(rng, [int(size) for size in overview])
    for tensor in tensors:
        shape = [1 if isinstance(size, str) else size for size in tensor.shape]
        array: np.ndarray
        if tensor.name == "timestep":
            array = rng.randint(0, manifest.schedule.num_train_timesteps, shape)
        elif tensor.name == "guidance_scale":
            # Another one than the default, so that a graph with the default built in is found out.
            array = np.full(shape, manifest.defaults.guidance_scale + 1.25)
        elif tensor.name == "image":
            array = rng.uniform(-1, 1, shape)
        else:
            array = rng.standard_normal(shape)
            if tensor.name == "sample":  # the channel between the two latents is the mask
                channel = manifest.geometry.latent_channels
                array[:, channel] = array[:, channel] < -0.5
        inputs[tensor.name] = array.astype(tensor.dtype)
    return inputs
