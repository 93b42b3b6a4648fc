"""What is measured: every combination of the options that were given as lists, and the baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

from moebius_runtime.errors import InputError

TORCH = "torch"
T = TypeVar("T")


@dataclass(frozen=True)
class Variant:
    """One row of the report. `threads` None leaves the number to the runtime."""

    bundle: str
    runtime: str
    precision: str
    threads: int | None
    steps: int | None
    name: str = ""
    baseline: bool = False
    mode: str = "reference"


def combine(
    bundles: Sequence[str],
    runtimes: Sequence[str],
    precisions: Sequence[str],
    threads: Sequence[int | None],
    steps: Sequence[int | None],
    modes: Sequence[str] = ("reference",),
) -> list[Variant]:
    """All combinations, the last option changing fastest, each named by the options that differ between them.

    Raises:
        InputError: an option is listed twice with one value, so that two variants would be the same.
    """
    lists: dict[str, Sequence[object]] = {
        "bundle": bundles,
        "--runtime": runtimes,
        "--precision": precisions,
        "--threads": threads,
        "--steps": steps,
        "--mode": modes,
    }
    for option, values in lists.items():
        if len(set(values)) != len(values):
            raise InputError(f"{option}: {', '.join(map(str, values))} names one value twice; name each once")
    variants = []
    for bundle, runtime, precision, thread, step, mode in product(bundles, runtimes, precisions, threads, steps, modes):
        parts = [
            bundle.rstrip("/").rpartition("/")[2] if len(bundles) > 1 else "",
            runtime if len(runtimes) > 1 or len(bundles) == 1 else "",
            precision if len(precisions) > 1 else "",
            f"{thread or 'all'} thread{'s' * (thread != 1)}" if len(threads) > 1 else "",
            f"{step or 'default'} steps" if len(steps) > 1 else "",
            mode if len(modes) > 1 else "",
        ]
        name = " ".join(part for part in parts if part)
        variants.append(Variant(bundle, runtime, precision, thread, step, name, mode=mode))
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):  # bundles with equal folder names: use their whole paths
        variants = [replace(v, name=f"{v.bundle} {v.name.partition(' ')[2]}".strip()) for v in variants]
    return variants


def parse_list(text: str | None, convert: type[T], option: str) -> list[T | None]:
    """The entries of a comma list; `[None]` where the option was not given.

    Raises:
        InputError: an entry is not of the type, or a number below 1.
    """
    if text is None:
        return [None]
    values: list[T | None] = []
    for entry in text.split(","):
        try:
            value = convert(entry.strip())  # type: ignore[call-arg]
            if not entry.strip() or (isinstance(value, int) and value < 1):
                raise ValueError
        except ValueError as error:
            expected = "numbers from 1 on" if convert is int else "names"
            raise InputError(f"{option} {text}: expected {expected}, separated by commas") from error
        values.append(value)
    return values
