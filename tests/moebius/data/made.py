"""Small pictures, masks and tars for the tests of the data; read with `runpy.run_path`."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def png(value: int, size: tuple[int, int] = (48, 40), mode: str = "RGB") -> bytes:
    """A picture whose pixels tell its number: red is `value`, green and blue are a ramp."""
    stream = io.BytesIO()
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0]).astype(np.uint8)
    pixels = np.stack([np.full_like(ramp, value), ramp, ramp[::-1]], axis=2)
    Image.fromarray(pixels).convert(mode).save(stream, "PNG")
    return stream.getvalue()


def mask_png(size: tuple[int, int] = (48, 40), box: tuple[int, int, int, int] = (10, 10, 30, 25)) -> bytes:
    stream = io.BytesIO()
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
