"""What a user asks of a build, read from text and checked as far as that needs no library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moebius_runtime.bundle.manifest import GraphName, Precision
from moebius_runtime.bundle.passport import EngineBackend
from moebius_runtime.errors import InputError

Compatibility = Literal["none", "ampere+", "same-cc"]
COMPATIBILITIES: tuple[Compatibility, ...] = ("none", "ampere+", "same-cc")
DEFAULT_GRAPHS: tuple[GraphName, ...] = ("unet", "vae_encoder", "vae_decoder")
GRAPHS: tuple[GraphName, ...] = ("unet", "unet_conditional", "vae_encoder", "vae_decoder")
MAX_BATCH = 64
_UNITS = {"": 1 << 20, "mib": 1 << 20, "m": 1 << 20, "mb": 1 << 20, "gib": 1 << 30, "g": 1 << 30, "gb": 1 << 30}


@dataclass(frozen=True)
class Tuning:
    """How the builder works. `workspace` in bytes, None for the builder's own; `opt_level` 0 to 5, likewise.

    `tf32` lets float32 products round their factors to 10 bits on Ampere and up: faster, and no longer float32.
    """

    workspace: int | None = None
    opt_level: int | None = None
    timing_cache: Path | None = None
    hardware_compatibility: Compatibility = "none"
    version_compatible: bool = False
    strip_weights: bool = False
    tf32: bool = False


@dataclass(frozen=True)
class Batches:
    """Smallest, best and largest number of pictures of a run; None where the user said nothing."""

    smallest: int | None = None
    best: int | None = None
    largest: int | None = None

    @property
    def named(self) -> bool:
        """Whether any was given."""
        return (self.smallest, self.best, self.largest) != (None, None, None)

    def resolved(self) -> tuple[int, int, int]:
        """All three, the missing ones from the others; one picture where none was given.

        Raises:
            InputError: they are not in order, or out of range.
        """
        known = [size for size in (self.smallest, self.best, self.largest) if size is not None]
        smallest = self.smallest if self.smallest is not None else min([1, *known])
        largest = self.largest if self.largest is not None else max([1, *known])
        best = self.best if self.best is not None else smallest
        if not 1 <= smallest <= best <= largest <= MAX_BATCH:
            raise InputError(
                f"--min-batch {smallest} --opt-batch {best} --max-batch {largest}: expected them in that order, from 1 "
                f"to {MAX_BATCH}"
            )
        return smallest, best, largest


@dataclass(frozen=True)
class BuildOptions:
    """One call of `moebius-export trt`. `sms` are compute capabilities such as 86; empty for the GPU that is here.

    `plugins`: nodes that our plugins exist for are theirs, see `moebius_export.trt.plugins`.
    """

    precision: Precision
    backend: EngineBackend | None = None
    sms: tuple[int, ...] = ()
    graphs: tuple[GraphName, ...] = DEFAULT_GRAPHS
    batches: Batches = field(default_factory=Batches)
    tuning: Tuning = field(default_factory=Tuning)
    force: bool = False
    plugins: bool = False


def parse_size(text: str) -> int:
    """Bytes of "512", "512MiB" or "1.5GiB"; a plain number counts MiB, and M, MB, G, GB mean MiB and GiB.

    Raises:
        InputError: it is no such size, or not from 1 MiB to 1 TiB.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise InputError(f"--workspace {text}: expected a size such as 512MiB or 2GiB")
    size = int(float(match[1]) * unit)
    if not 1 << 20 <= size <= 1 << 40:
        raise InputError(f"--workspace {text}: expected 1 MiB to 1 TiB")
    return size


def parse_sms(text: str) -> tuple[int, ...]:
    """Compute capabilities of "86,89,120" or "8.6,8.9,12.0", in order and each once.

    Raises:
        InputError: one is not such a number.
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:sm_?)?(\d{1,2})\.?(\d)\s*", part.lower())
        if match is None:
            raise InputError(f"--sm {text}: expected compute capabilities such as 86,89,120")
        found.append(int(match[1] + match[2]))
    return tuple(sorted(dict.fromkeys(found)))


def parse_graphs(text: str) -> tuple[GraphName, ...]:
    """Names of graphs, separated by commas; `InputError` where one is none."""
    wanted = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in wanted if name not in GRAPHS]:
        raise InputError(f"--graphs {', '.join(unknown)}: expected some of {', '.join(GRAPHS)}")
    return tuple(name for name in GRAPHS if name in wanted)


def precision_of(flags: Mapping[Precision, bool]) -> Precision:
    """The one precision whose flag is set.

    Raises:
        InputError: none or several are named.
    """
    named = [precision for precision, given in flags.items() if given]
    if len(named) != 1:
        given = " ".join(f"--{name}" for name in named) or "no precision"
        raise InputError(f"{given}: expected one of --fp16, --bf16, --fp32, --int8 or --fp8")
    return named[0]
