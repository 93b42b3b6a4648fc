"""Writes tests/golden/page_pictures.json: pictures that the runtime fills with a network of simple functions.

The tests of the page's engine in Node have the same network, pictures and masks (tests/page/pictures.js). Run it when
`moebius_runtime` changes what it fills: python scripts/page_pictures_golden.py
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from moebius_runtime.backends.base import Backend
from moebius_runtime.bundle.manifest import GraphName, Manifest
from moebius_runtime.images.blend import feather, outward_feather
from moebius_runtime.images.masks import BoolArray
from moebius_runtime.images.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline, make_options
from moebius_runtime.regions import find_squares, resize_rgb
from moebius_runtime.regions.mask_notes import edge_share
from moebius_runtime.regions.smooth_fill import fill_pixels

GOLDEN = Path(__file__).parents[1] / "tests/golden/page_pictures.json"
CHANNELS = 4
FEATURES = 2
ROWS = 5  # one of so many rows of a picture is kept

Array = npt.NDArray[Any]
Rects = list[list[int]]
"""Rectangles of a mask: top, left, bottom, right; the last two exclusive."""


# --- the network ------------------------------------------------------------------------------------------------


def encoder(image: Array) -> Array:
    """Latents [1, 4, s, s] of a picture [1, 3, 8s, 8s]: the mean of eight pixels of each block of 8x8."""
    side = image.shape[2] // 8
    planes = []
    for c in range(CHANNELS):
        total = np.zeros((side, side), np.float32)
        for k in range(8):
            total = total + image[0, c % 3, k::8, (3 * k + c) % 8 :: 8]
        planes.append(total * np.float32(0.125))
    return np.stack(planes)[None]


def unet(sample: Array, timestep: Array, scale: float) -> Array:
    """What is predicted from [1, 9, s, s]: of the latents, the mask, the masked latents, the timestep and the scale."""
    latents, mask, known = sample[0, :CHANNELS], sample[0, CHANNELS], sample[0, CHANNELS + 1 :]
    shift = np.float32(int(timestep[0]) / 1000 - 0.4) * np.float32(0.5) + np.float32(0.05 * scale)
    mixed = np.float32(0.3) * latents - np.float32(0.2) * known + np.float32(0.1) * mask
    return (mixed + shift)[None].astype(np.float32)


def decoder(latent: Array, detail: float) -> Array:
    """A picture [1, 3, 8s, 8s] of latents: each cell enlarged, with a pattern on it."""
    big = latent[0].repeat(8, axis=1).repeat(8, axis=2)
    y, x = np.indices(big.shape[1:])
    planes = []
    for c in range(3):
        pattern = (((y * 7 + x * 3 + c) % 11 - 5) / 10).astype(np.float32)
        planes.append(np.float32(0.6) * big[c] + np.float32(detail) * pattern * big[3])
    return np.stack(planes)[None]


def lower(latent: Array) -> Array:
    """Features [1, 2, 2s, 2s]."""
    big = latent[0].repeat(2, axis=1).repeat(2, axis=2)
    return (np.float32(0.5) * big[:FEATURES] + np.float32(0.25) * big[FEATURES:])[None]


def upper(features: Array, overview: Array, inside: Array) -> Array:
    """A picture [1, 3, 4h, 4w] of features [1, 2, h, w], the overview [1, 2, n, n] and the window [1, 1, n, n]."""
    small = overview.shape[2]
    y, x = np.indices((4 * features.shape[2], 4 * features.shape[3])) // 4
    planes = []
    for c in range(3):
        whole = overview[0, c % FEATURES, y % small, x % small]
        near = np.float32(0.5) * features[0, c % FEATURES, y, x] + np.float32(0.1) * whole
        planes.append(near + np.float32(0.05) * inside[0, 0, y % small, x % small])
    return np.stack(planes)[None]


class SimpleBackend(Backend):
    """Runs the functions above as the graphs of a manifest."""

    name = "simple"

    def __init__(self, manifest: Manifest) -> None:
        bundle = SimpleNamespace(manifest=manifest, path=Path("simple"), graph=lambda name: manifest.every_graph[name])
        super().__init__(cast(Any, bundle))

    def _load(self, graph: GraphName) -> GraphName:
        return graph

    def _run(self, handle: Any, inputs: Mapping[str, Array]) -> Array:
        if handle in ("unet", "unet_conditional"):
            alone = 1.0 if handle == "unet_conditional" else 1.5  # the conditional branch, or guidance that is inside
            scale = inputs.get("guidance_scale", [alone])
            return unet(inputs["sample"], inputs["timestep"], float(scale[0]))
        if handle in ("vae_decoder", "vae_decoder_tiny"):
            return decoder(inputs["latent"], 0.4 if handle == "vae_decoder" else 0.1)
        functions = {"vae_encoder": encoder, "vae_decoder_lower": lower, "vae_decoder_upper": upper}
        return cast(Any, functions[handle])(**inputs)

    def describe(self) -> dict[str, str]:
        """Nothing."""
        return {}


def manifest_of(size: int, **changes: Any) -> Manifest:
    """A bundle's manifest for pictures of `size`, with every graph."""
    side, half, block = size // 8, size // 4, size // 16
    files = {"fp32": {"model": "model.onnx", "weights": None}}

    def tensor(name: str, *shape: int | str, dtype: str = "float32") -> dict[str, Any]:
        return {"name": name, "dtype": dtype, "shape": list(shape)}

    def graph(inputs: list[Any], output: Any) -> dict[str, Any]:
        return {"files": files, "inputs": inputs, "outputs": [output]}

    latent, image = tensor("latent", 1, CHANNELS, side, side), tensor("image", 1, 3, size, size)
    predicted = tensor("noise_pred", 1, CHANNELS, side, side)
    noisy = [tensor("sample", 1, 2 * CHANNELS + 1, side, side), tensor("timestep", 1, dtype="int64")]
    features = tensor("features", 1, FEATURES, half, half)
    guided = changes.get("guidance") is None
    weights = {"origin": "functions", "sha256": "0" * 64, "stand_in": True}
    graphs = {
        "unet": graph([*noisy, tensor("guidance_scale", 1)] if guided else noisy, predicted),
        "vae_encoder": graph([image], latent),
        "vae_decoder": graph([latent], image),
    }
    decoders = {
        "vae_decoder_tiny": graph([latent], image),
        "vae_decoder_lower": graph([latent], features),
        "vae_decoder_upper": graph(
            [
                tensor("features", 1, FEATURES, "height", "width"),
                tensor("overview", 1, FEATURES, block, block),
                tensor("inside", 1, 1, block, block),
            ],
            tensor("image", 1, 3, "rows", "columns"),
        ),
    }
    content: dict[str, Any] = {
        "schema_version": 1,
        "created": "",
        "model": {"preset": "functions", "parameters": 0, "unet": weights, "vae": weights},
        "geometry": {"image_size": size, "latent_size": side, "latent_channels": CHANNELS, "scaling_factor": 0.2},
        "schedule": {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction",
        },
        "defaults": {"num_inference_steps": 3, "guidance_scale": 2.0, "strength": 0.99, "noise_offset": 0.0357},
        "graphs": graphs | ({"unet_conditional": graph(noisy, predicted)} if guided else {}),
        "decoders": decoders,
        "files": {"model.onnx": {"size": 0, "sha256": "0" * 64}},
        "rewrites": [],
        "parity": {},
        "tools": {},
    }
    return Manifest.model_validate({**content, **changes})


MANIFESTS = {
    "small": manifest_of(64),
    "large": manifest_of(256, modes={"balanced": {"steps": 2, "guidance_interval": [300, 800]}}),
    "a little noise": manifest_of(64, modes={"best": {"steps": 10, "strength": 0.2, "start": "pixels"}}),
    "distilled": manifest_of(
        64,
        guidance={"distilled": 2.5},
        defaults={
            "num_inference_steps": 3,
            "guidance_scale": 2.5,
            "strength": 0.99,
            "noise_offset": 0.0357,
            "sampler": "lcm",
        },
    ),
}


# --- pictures and masks -----------------------------------------------------------------------------------------


def picture_of(height: int, width: int, alpha: bool = False, grey: bool = False) -> Picture:
    """A picture of whole-number formulas: gradients, and a chequerboard of 16 pixels."""
    y, x = np.indices((height, width))
    base = x * 5 // 2 + y * 3 // 2 + (x * y >> 6) + 60 * ((x >> 4 ^ y >> 4) & 1)
    channels = 1 if grey else 3
    pixels = np.stack([(base + 40 * c) & 255 for c in range(channels)], axis=2).astype(np.uint8)
    place = (x + 2 * y) % 17
    shares = np.where(place < 3, 0, np.where(place == 4, 128, 255)).astype(np.uint8)
    return Picture(pixels=pixels, mode="L" if grey else "RGB", alpha=shares if alpha else None)


def mask_of(height: int, width: int, rects: Rects) -> BoolArray:
    """The mask of some rectangles, [H, W]."""
    mask = np.zeros((height, width), bool)
    for top, left, bottom, right in rects:
        mask[top:bottom, left:right] = True
    return mask


def specks(count: int, height: int, width: int, most: int, state: int) -> Rects:
    """Rectangles at pseudo-random places, of 1 to `most` pixels a side."""
    rects = []
    for _ in range(count):
        numbers = []
        for _ in range(4):
            state = (state * 1103515245 + 12345) % 2**31
            numbers.append(state >> 8)
        top, left = numbers[0] % height, numbers[1] % width
        rects.append([top, left, min(height, top + 1 + numbers[2] % most), min(width, left + 1 + numbers[3] % most)])
    return rects


def wire(points: list[tuple[int, int]], thick: int) -> Rects:
    """Rectangles along straight lines through points (row, column)."""
    rects = []
    for (y0, x0), (y1, x1) in pairwise(points):
        count = max(abs(y1 - y0), abs(x1 - x0), 1)
        for i in range(0, count + 1, max(1, thick // 2)):
            y, x = y0 + (y1 - y0) * i // count, x0 + (x1 - x0) * i // count
            rects.append([y, x, y + thick, x + thick])
    return rects


BLOB = [[30, 40, 52, 66], [40, 60, 61, 74]]

CASES: dict[str, dict[str, Any]] = {
    "best": {"shape": [100, 130], "rects": BLOB, "options": {"seed": 7}},
    "best, hard blend, a mask at the border": {
        "shape": [90, 80],
        "rects": [[0, 50, 20, 80]],
        "options": {"blend": "hard", "seed": 4294967295, "mask_dilate": 0},
    },
    "fast: masked decode is no quicker here": {"shape": [100, 130], "rects": BLOB, "options": {"mode": "fast"}},
    "balanced: masked decode, guidance interval of the bundle": {
        "manifest": "large",
        "shape": [300, 280],
        "rects": [[20, 30, 44, 60]],
        "options": {"mode": "balanced", "seed": 3},
    },
    "masked decode with compensated colour": {
        "manifest": "large",
        "shape": [256, 256],
        "rects": [[200, 210, 215, 230]],
        "options": {"decode": "masked", "compensate_colour": True, "steps": 1, "strength": 1.0},
    },
    "reference": {"shape": [90, 150], "rects": BLOB, "options": {"mode": "reference", "seed": 5}},
    "reference from pure noise, max": {
        "shape": [150, 90],
        "rects": [[61, 33, 64, 36], [20, 20, 50, 60]],
        "options": {"mode": "reference", "strength": 1.0, "guidance_scale": 1.0, "mask_reduce": "max"},
    },
    "reference, a region that nearest loses": {
        "shape": [64, 64],
        "rects": [[9, 9, 12, 12], [30, 30, 50, 51]],
        "options": {"mode": "reference"},
    },
    "specks in several squares": {
        "shape": [170, 230],
        "rects": specks(14, 170, 230, 6, 1),
        "options": {"steps": 2, "mask_dilate": 1},
    },
    "a wire from edge to edge": {
        "shape": [120, 260],
        "rects": wire([(100, 0), (20, 130), (70, 256)], 4),
        "options": {"steps": 2, "blend": "hard"},
    },
    "a thick region, shrunk for the network": {
        "shape": [200, 240],
        "rects": [[50, 60, 150, 170]],
        "options": {"steps": 2, "start": "pixels"},
    },
    "a thick bar, in squares that overlap": {
        "shape": [110, 330],
        "rects": [[40, 10, 70, 320]],
        "options": {"steps": 2, "sampler": "unipc"},
    },
    "alpha": {"shape": [100, 130], "rects": BLOB, "alpha": True, "options": {"steps": 2}},
    "alpha in reference": {
        "shape": [100, 130],
        "rects": BLOB,
        "alpha": True,
        "options": {"mode": "reference", "compensate_colour": True},
    },
    "grey": {"shape": [100, 130], "rects": BLOB, "grey": True, "options": {"steps": 2}},
    "pixels, guidance interval, compensated colour": {
        "shape": [101, 97],
        "rects": BLOB,
        "options": {"start": "pixels", "guidance_interval": [300, 400], "compensate_colour": True, "strength": 0.7},
    },
    "nearest, dilated by 3, dpmpp-2m": {
        "shape": [100, 130],
        "rects": BLOB,
        "options": {"mask_reduce": "nearest", "mask_dilate": 3, "sampler": "dpmpp-2m", "steps": 4},
    },
    "tiny decoder": {"shape": [100, 130], "rects": BLOB, "options": {"vae_decoder": "tiny", "mode": "fast"}},
    "a picture smaller than the network": {
        "manifest": "large",
        "shape": [70, 200],
        "rects": [[20, 60, 45, 90]],
        "options": {"steps": 1, "strength": 1.0, "guidance_scale": 1.0},
    },
    "a distilled bundle: lcm": {"manifest": "distilled", "shape": [100, 190], "rects": BLOB, "options": {"seed": 9}},
    "a mode's strength": {"manifest": "a little noise", "shape": [100, 130], "rects": BLOB, "options": {}},
    "a mode's strength and few steps": {
        "manifest": "a little noise",
        "shape": [100, 130],
        "rects": BLOB,
        "options": {"steps": 3, "sampler": "dpmpp-2m"},
    },
    "whole picture in best": {"shape": [100, 131], "rects": BLOB, "options": {"fit": "whole"}},
}

PLANS: dict[str, dict[str, Any]] = {
    "one speck": {"shape": [300, 400], "size": 64, "rects": [[7, 9, 8, 10]]},
    "many specks": {"shape": [600, 800], "size": 64, "rects": specks(120, 600, 800, 9, 3)},
    "specks over a limit": {"shape": [600, 800], "size": 64, "rects": specks(300, 600, 800, 5, 5), "limit": 64},
    "specks and blocks": {"shape": [900, 700], "size": 128, "rects": specks(60, 900, 700, 120, 8)},
    "large blocks": {"shape": [1000, 1300], "size": 256, "rects": specks(14, 1000, 1300, 400, 11)},
    "a long bar": {"shape": [220, 900], "size": 64, "rects": [[90, 20, 130, 880]]},
    "a bar of odd thickness": {"shape": [110, 330], "size": 64, "rects": [[38, 8, 73, 321]]},
    "a cross": {"shape": [700, 700], "size": 128, "rects": [[20, 300, 680, 380], [320, 10, 390, 690]]},
    "a wire": {"shape": [500, 900], "size": 128, "rects": wire([(10, 0), (450, 500), (40, 890)], 6)},
    "nearly one square": {"shape": [75, 70], "size": 64, "rects": specks(9, 75, 70, 8, 2)},
    "a narrow picture": {"shape": [64, 900], "size": 512, "rects": specks(9, 64, 900, 30, 6)},
    "half of the picture": {"shape": [512, 700], "size": 64, "rects": [[0, 0, 512, 350]]},
    "odd sides at the network's size": {"shape": [611, 777], "size": 512, "rects": specks(30, 611, 777, 90, 4)},
}

TILES = [[16, 32, 48, 64]]  # aligned to the chequerboard
STRIPES = [[row, 0, row + 1, 520] for row in range(1, 519, 2)]  # more pairs of pixels than are looked at

EDGES: dict[str, dict[str, Any]] = {
    "two tiles of the chequerboard": {"shape": [100, 130], "rects": TILES},
    "the same with alpha": {"shape": [100, 130], "rects": TILES, "alpha": True},
    "the same in grey": {"shape": [100, 130], "rects": TILES, "grey": True},
    "at the picture's border": {"shape": [64, 64], "rects": [[0, 0, 16, 64]]},
    "a few pixels from it": {"shape": [64, 64], "rects": [[2, 3, 16, 61]]},
    "a narrow gap": {"shape": [90, 80], "rects": [[16, 16, 32, 32], [16, 35, 32, 48]]},
    "a blob": {"shape": [100, 130], "rects": BLOB},
    "specks": {"shape": [170, 230], "rects": specks(40, 170, 230, 9, 1)},
    "specks with alpha": {"shape": [170, 230], "rects": specks(40, 170, 230, 9, 2), "alpha": True},
    "stripes with alpha": {"shape": [520, 520], "rects": STRIPES, "alpha": True},
    "all of it": {"shape": [20, 20], "rects": [[0, 0, 20, 20]]},
}

RESIZES = [
    ([64, 64], [64, 64], [0.0, 0.0, 64.0, 64.0]),
    ([90, 70], [64, 50], [0.0, 0.0, 70.0, 90.0]),
    ([50, 60], [131, 170], [0.0, 0.0, 60.0, 50.0]),
    ([100, 120], [33, 64], [0.4, 1.25, 119.3, 98.6]),
    ([64, 64], [77, 64], [0.0, 0.0, 64.0, 60.5]),
    ([64, 80], [64, 41], [3.0, 0.0, 70.0, 64.0]),
    ([40, 50], [20, 30], [10.0, 5.0, 40.0, 25.0]),
    ([80, 60], [54, 47], [0.0, 0.0, 60.0, 80.0]),
    ([64, 64], [18, 50], [0.0, 20.8, 64.0, 43.2]),
    ([80, 60], [53, 47], [0.0, 0.0, 60.0, 80.0]),
    ([80, 60], [70, 90], [0.0, 0.0, 60.0, 80.0]),
]
ROWS_FIRST = 3
"""The last so many resizes begin with the rows since Pillow 13, and with the columns before."""


def filled(case: Mapping[str, Any]) -> tuple[Array, tuple[str, ...]]:
    """The filled pixels of a case, uint8 [H, W, C], and its notes."""
    height, width = case["shape"]
    pipeline = InpaintPipeline(SimpleBackend(MANIFESTS[case.get("manifest", "small")]))
    picture = picture_of(height, width, case.get("alpha", False), case.get("grey", False))
    mask = mask_of(height, width, case["rects"])
    result = pipeline.inpaint(picture, mask, make_options(**case["options"]))
    return result.picture.pixels, result.notes


def content() -> dict[str, Any]:
    """The golden values. Pictures as the difference to what was given, every `ROWS`th row, compressed."""
    pictures = {}
    for name, case in CASES.items():
        pixels, _ = filled(case)
        given = picture_of(*case["shape"], grey=case.get("grey", False)).pixels
        pictures[name] = {**case, "changes": _packed((pixels - given)[::ROWS])}
    plans = {}
    for name, plan in PLANS.items():
        squares = find_squares(mask_of(*plan["shape"], plan["rects"]), plan["size"], plan.get("limit"))
        plans[name] = {
            **plan,
            "squares": [
                [s.crop.left, s.crop.top, s.crop.side, s.cell, *s.corner, _hash(s.cells), *s.cells.shape]
                for s in squares
            ],
        }
    edges = {}
    for name, case in EDGES.items():
        picture = picture_of(*case["shape"], case.get("alpha", False), case.get("grey", False))
        edges[name] = {**case, "share": edge_share(picture, mask_of(*case["shape"], case["rects"]))}
    resizes = []
    for shape, size, box in RESIZES:
        source = picture_of(*shape).pixels
        whole = (size[0], size[1])
        resizes.append(
            {"shape": shape, "size": size, "box": box, "sha256": _hash(resize_rgb(source, whole, tuple(box)))}
        )
    shape = [75, 91]
    marked = mask_of(*shape, [*BLOB, [0, 80, 9, 91]])
    return {
        "manifests": {name: _read(manifest) for name, manifest in MANIFESTS.items()},
        "rows": ROWS,
        "pictures": pictures,
        "plans": plans,
        "edges": edges,
        "resizes": resizes,
        "masked": {
            "shape": shape,
            "rects": [*BLOB, [0, 80, 9, 91]],
            "filled_sha256": _hash(fill_pixels(picture_of(*shape).pixels, marked)),
            "feathers": {str(radius): _hash(feather(marked, radius)) for radius in (0.8, 3.0, 7.03125, 40.0)},
            "outward": {str(width): _hash(outward_feather(marked, width)) for width in (8, 13, 24)},
        },
    }


def _read(manifest: Manifest) -> dict[str, Any]:
    """What the page's engine reads of a manifest."""
    whole = manifest.model_dump(mode="json")
    return {
        name: whole[name] for name in ("geometry", "schedule", "defaults", "graphs", "decoders", "guidance", "modes")
    }


def _packed(array: Array) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()


def _hash(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(content()) + "\n")
