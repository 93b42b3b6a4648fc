"""The options of a build, parsed from text and validated as far as that needs no library."""

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
    """Options of the builder. `workspace` is in bytes and `opt_level` 0 to 5; None is the builder's default.

    `tf32` lets float32 matmuls and convolutions round their factors to 10 bits on Ampere and later, which is faster.
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
    """Smallest, best and largest batch; None where the user gave none."""

    smallest: int | None = None
    best: int | None = None
    largest: int | None = None

    @property
    def named(self) -> bool:
        """Whether the user gave any."""
        return (self.smallest, self.best, self.largest) != (None, None, None)

    def resolved(self) -> tuple[int, int, int]:
        """All three sizes. Missing ones follow from the others; the default is 1.

        Raises:
            InputError: they are not in ascending order, or out of range.
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
    """Options of one `moebius-export trt`. `sms` are compute capabilities such as 86; empty for this machine's GPU.

    `plugins` gives LocalLambda nodes to the project's plugin, see `moebius_export.trt.plugins`.
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
    """Parses a size such as "512", "512MiB" or "1.5GiB" into bytes. A plain number is in MiB; M, MB, G, GB are binary.

    Raises:
        InputError: it is not a size, or not between 1 MiB and 1 TiB.
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
    """Parses compute capabilities such as "86,89,120" or "8.6,8.9,12.0", sorted and without duplicates.

    Raises:
        InputError: one is not a compute capability.
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:sm_?)?(\d{1,2})\.?(\d)\s*", part.lower())
        if match is None:
            raise InputError(f"--sm {text}: expected compute capabilities such as 86,89,120")
        found.append(int(match[1] + match[2]))
    return tuple(sorted(dict.fromkeys(found)))


def parse_graphs(text: str) -> tuple[GraphName, ...]:
    """Parses names of graphs, separated by commas. Raises `InputError` for an unknown name."""
    wanted = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in wanted if name not in GRAPHS]:
        raise InputError(f"--graphs {', '.join(unknown)}: expected some of {', '.join(GRAPHS)}")
    return tuple(name for name in GRAPHS if name in wanted)


def precision_of(flags: Mapping[Precision, bool]) -> Precision:
    """Returns the one precision whose flag is set.

    Raises:
        InputError: no flag is set, or several.
    """
    named = [precision for precision, given in flags.items() if given]
    if len(named) != 1:
        given = " ".join(f"--{name}" for name in named) or "no precision"
        raise InputError(f"{given}: expected one of --fp16, --bf16, --fp32, --int8 or --fp8")
    return named[0]
