"""The photographs in scikit-image's wheel that are CC0 or in the public domain, found without importing it.

Each statement below is the one in the function's docstring in `skimage/data/_fetchers.py` (release 0.26), where the
origin is linked. Left out: `coins` and `ihc` ("no known copyright restrictions" is no dedication), `moon`, `page` and
`motorcycle_*` (nothing, or only a citation, is said), `cell` and `microaneurysms` (microscopy), and drawings.
Held out are the pictures that the demo and the golden files show, and one more.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from moebius.data.pictures import BrokenPicture, decode, read_file
from moebius.data.sources import Entry, IndexedSource, Item, digest
from moebius.errors import DataError


@dataclass(frozen=True)
class Photograph:
    """A file of `skimage/data`: its SHA-256, what its documentation says of its rights, and whether it is held out."""

    file: str
    sha256: str
    rights: str
    held_out: bool = False


PHOTOGRAPHS = (
    Photograph(
        "astronaut.png",
        "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        "NASA, Great Images; released into the public domain",
    ),
    Photograph(
        "brick.png",
        "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
        "CC0, CC0Textures (Bricks25)",
    ),
    Photograph(
        "camera.png",
        "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
        "CC0 by the photographer, Lav Varshney",
    ),
    Photograph(
        "chelsea.png",
        "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        "CC0 by the photographer, Stefan van der Walt",
        held_out=True,
    ),
    Photograph(
        "clock_motion.png",
        "f029226b28b642e80113d86622e9b215ee067a0966feaf5e60604a1e05733955",
        "released into the public domain by the photographer, Stefan van der Walt",
    ),
    Photograph(
        "coffee.png",
        "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        "CC0 by the photographer, Rachel Michetti",
        held_out=True,
    ),
    Photograph(
        "grass.png",
        "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
        "CC0, DeviantArt (linolafett, Grass 01)",
    ),
    Photograph(
        "gravel.png",
        "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
        "CC0, CC0Textures (Gravel04)",
    ),
    Photograph(
        "hubble_deep_field.jpg",
        "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        "NASA, HubbleSite; may be freely used in the public domain",
    ),
    Photograph(
        "retina.jpg",
        "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
        "CC0 1.0, Wikimedia Commons (Mikael Häggström)",
    ),
    Photograph(
        "rocket.jpg",
        "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
        "SpaceX; released in the public domain",
        held_out=True,
    ),
)


class PhotographSource(IndexedSource):
    """The photographs of one split, all `background`."""

    def __init__(self, held_out: bool = False) -> None:
        """Finds scikit-image and compares every file of the split with its known hash.

        Raises:
            DataError: scikit-image is not installed, or one of its files is missing or another one.
        """
        spec = find_spec("skimage")
        places = list(spec.submodule_search_locations or ()) if spec else []
        if not places:
            raise DataError("the photographs come with scikit-image, which is not installed; pip install scikit-image")
        self.folder = Path(places[0]) / "data"
        self.photographs = [photograph for photograph in PHOTOGRAPHS if photograph.held_out == held_out]
        for photograph in self.photographs:
            try:
                data = self._read(photograph.file)
            except BrokenPicture as error:
                raise DataError(f"scikit-image's {photograph.file}: {error}; install release 0.26 of it") from error
            if hashlib.sha256(data).hexdigest() != photograph.sha256:
                raise DataError(f"scikit-image's {photograph.file} is another file than in release 0.26; install that")

    def __len__(self) -> int:
        return len(self.photographs)

    def entry(self, index: int, epoch: int) -> Entry:
        """See `IndexedSource.entry`."""
        name = self.photographs[index].file
        return Entry(name, lambda: Item(decode(self._read(name))))

    def _read(self, name: str) -> bytes:
        path = (self.folder / name).resolve()  # some installers link files to a cache; the hash tells what they are
        return read_file(path, path.parent)

    def fingerprint(self) -> str:
        """Of the files' hashes."""
        return digest(["photographs", *(photograph.sha256 for photograph in self.photographs)])
