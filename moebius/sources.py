"""Where weights come from: what the source strings mean, and which file of a folder holds the weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moebius.errors import CheckpointError

if TYPE_CHECKING:
    from moebius.locate import locate as locate

Progress = Callable[[str], None]

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # in order of preference
_USUAL_STEMS = ("diffusion_pytorch_model", "pytorch_model", "model", "checkpoint", "weights", "")
_EMA_MARK = re.compile(r"(^|[._-])ema(?=[._-]|$)", re.IGNORECASE)
_HALF_MARK = re.compile(r"[._-](fp16|bf16)$", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_HUB = re.compile(
    rf"hub:(?P<repo>{_PART}/{_PART})(?P<path>(?:/{_PART}){{0,8}})(?:@(?P<revision>{_PART}(?:/{_PART}){{0,4}}))?"
)
_STAND_IN = re.compile(r"stand-in(?::(?P<seed>0|[1-9][0-9]{0,17}))?")
RELEASED_REPO = "hustvl/Moebius"
SHIPPED = MappingProxyType({"small": "small/student", "small/vae": "small/vae"})
"""Names of the weights that come with this package, and their folders in it."""
_LISTED = 8


@dataclass(frozen=True)
class Released:
    """A folder of released student weights, and the guidance scale that the paper uses with it (table 6)."""

    folder: str
    guidance_scale: float


RELEASED = MappingProxyType(
    {
        "places2": Released("ft_places2", 2.5),
        "celebahq": Released("ft_celebahq", 2.0),
        "ffhq": Released("ft_ffhq", 2.0),
        "pretrained": Released("pretrained", 2.5),
    }
)
"""The released student weights of `hustvl/Moebius` by their short names: scenes 2.5, portraits 2.0."""
FORMS = (
    f"{', '.join(RELEASED)}, hub:OWNER/REPO[/FOLDER][@REVISION], a local file or folder, shipped:NAME, "
    "or stand-in[:SEED]"
)
"""The source strings that `parse_source` understands, for messages."""


@dataclass(frozen=True)
class HubSource:
    """A folder of a Hugging Face repository ("" is its root), or one file in it. No revision means `main`."""

    repo: str
    folder: str = ""
    file: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class LocalSource:
    """A file or folder of this machine."""

    path: Path


@dataclass(frozen=True)
class StandInSource:
    """Reference weights drawn from a seed, see `moebius.stand_in`."""

    seed: int = 0


@dataclass(frozen=True)
class ShippedSource:
    """Weights that come with this package."""

    name: str

    @property
    def path(self) -> Path:
        """Their folder."""
        return Path(__file__).parent / SHIPPED[self.name]


WeightsSource = HubSource | LocalSource | ShippedSource | StandInSource


@dataclass(frozen=True)
class LocatedFile:
    """A weights file on this machine. `sha256` is the published hash, where that is known."""

    path: Path
    origin: str
    sha256: str | None = None


def parse_source(text: str) -> WeightsSource:
    """What a weights string means. Nothing is opened.

    Raises:
        CheckpointError: the string is empty, a URL, holds control characters, is a garbled `hub:` or `stand-in`,
            or is both the name of released weights and of a file or folder here.
    """
    if not text.strip() or any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise CheckpointError(f"weights {text!r}: expected {FORMS}")
    if text in RELEASED:
        released = f"hub:{RELEASED_REPO}/{RELEASED[text].folder}"
        if os.path.lexists(text):
            raise CheckpointError(
                f"weights {text!r} is the name of released weights and of a file or folder here; write ./{text} for "
                f"the one here, or {released} for the released ones"
            )
        return HubSource(RELEASED_REPO, RELEASED[text].folder)
    if text == "stand-in" or text.startswith("stand-in:"):
        if not (match := _STAND_IN.fullmatch(text)):
            raise CheckpointError(f"weights {text!r}: expected stand-in or stand-in:SEED, SEED a whole number from 0")
        return StandInSource(int(match["seed"] or 0))
    if text.startswith("shipped:"):
        name = text.removeprefix("shipped:")
        if name not in SHIPPED:
            raise CheckpointError(f"weights {text!r}: expected {' or '.join(f'shipped:{known}' for known in SHIPPED)}")
        return ShippedSource(name)
    if text.startswith("hub:"):
        match = _HUB.fullmatch(text)
        if not match or ".." in text:
            raise CheckpointError(
                f"weights {text!r}: expected hub:OWNER/REPO[/FOLDER][@REVISION], such as hub:hustvl/Moebius/ft_places2"
            )
        path = PurePosixPath(match["path"].lstrip("/"))
        is_file = path.suffix in SUFFIXES
        folder = path.parent if is_file else path
        return HubSource(
            repo=match["repo"],
            folder="" if folder == PurePosixPath() else str(folder),
            file=path.name if is_file else None,
            revision=match["revision"],
        )
    if "://" in text:
        raise CheckpointError(f"weights {text!r}: a URL is not fetched; expected {FORMS}")
    return LocalSource(Path(text))


def released_guidance(text: str) -> float | None:
    """The guidance scale that the paper uses with the weights of a source string; None where it names none.

    Raises:
        CheckpointError: as `parse_source`.
    """
    source = parse_source(text)
    if not isinstance(source, HubSource) or source.repo.lower() != RELEASED_REPO.lower():  # the hub ignores case
        return None
    return next((one.guidance_scale for one in RELEASED.values() if one.folder == source.folder), None)


@dataclass(frozen=True)
class _Candidate:
    """A file name taken apart: `ema_diffusion_pytorch_model.fp16.bin` is the EMA, half form of its stem."""

    name: str
    stem: str
    ema: bool
    half: bool
    suffix: str


def is_ema_name(name: str) -> bool:
    """Whether a file's name says that it holds averaged (EMA) weights."""
    return bool(_EMA_MARK.search(PurePosixPath(name).stem))


def _candidate(name: str) -> _Candidate:
    path = PurePosixPath(name)
    stem, halves = _HALF_MARK.subn("", path.stem)
    stem, emas = _EMA_MARK.subn("", stem)
    return _Candidate(name, stem.strip("._-"), bool(emas), bool(halves), path.suffix)


def choose_weights(names: Sequence[str], where: str) -> str:
    """The name of the weights file among the file names of one folder.

    Usual names go before others, averaged (EMA) weights before plain ones, full precision before half, and
    then the suffixes in the order of `SUFFIXES`.

    Raises:
        CheckpointError: there is none, only parts of one, or two that are not forms of the same weights.
    """
    whole = [name for name in names if PurePosixPath(name).suffix in SUFFIXES]
    found = [_candidate(name) for name in sorted(whole) if not _SHARD.search(PurePosixPath(name).stem)]
    if not found and whole:
        raise CheckpointError(
            f"{where} holds a checkpoint cut in {len(whole)} parts ({listed(sorted(whole))}); "
            "join them to one safetensors file and name that"
        )
    if not found:
        raise CheckpointError(
            f"{where} holds no weights ({len(names)} files, none ending in {', '.join(SUFFIXES)}); "
            "expected such a file as diffusion_pytorch_model.safetensors"
        )
    found = [one for one in found if one.stem in _USUAL_STEMS] or found
    found = [one for one in found if one.ema] or found
    found = [one for one in found if not one.half] or found
    if len({one.stem for one in found}) > 1:
        raise CheckpointError(
            f"{where} holds several checkpoints ({listed([one.name for one in found])}); name the one that is meant"
        )
    return min(found, key=lambda one: (SUFFIXES.index(one.suffix), one.name)).name


def listed(names: Sequence[str], limit: int = _LISTED) -> str:
    """Names for a message: the first `limit`, each cut to 120 characters, and how many more there are."""
    shown = ", ".join(name if len(name) <= 120 else f"{name[:117]}..." for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """`locate`, which has its own module since it needs the hub, is still found here."""
        if name == "locate":
            from moebius.locate import locate

            return locate
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
