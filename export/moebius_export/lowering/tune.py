"""`moebius-export tune`: finds the fastest body of `LocalLambda` on this machine, measured in the U-Net's graph.

Each candidate is rewritten into the graph and alternates with the present choice. Times are those of the
nodes of the bodies, from ONNX Runtime's profile, so that a step's noise does not hide them. A candidate differs from
the present choice at every resolution at once, and each resolution is timed by its own nodes. The convolution is
another body, for the whole file, and is timed by the whole step.

Compiled kernels are disabled: they run the node as one operator and have no such choice.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import onnx
from rich.table import Table

from moebius_export.errors import ExportError
from moebius_export.graph.sessions import Profiled, profiled_session
from moebius_export.lowering.lowering import MAX_PLACES, Lowering
from moebius_export.lowering.relower import local_lambdas, present_lowering, present_side, relowered
from moebius_runtime.bundle.bundle import Bundle

TILES = ((1, 8), (2, 8), (4, 4), (4, 8), (8, 8))
"""Candidate tiles that are tried besides a whole row, where they divide the side."""

AGREEMENT = 1e-5
"""Relative L2 distance from the present choice's output that a candidate may have: float32 sums in another order."""

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the steps in all, and what runs."""

Times = dict[int, list[float]]
"""Side -> milliseconds that its bodies took in each run; `BODIES`: those of all sides; `WHOLE`: all nodes."""
BODIES, WHOLE = -1, 0

_TIME = "_kernel_time"
_BODY = re.compile(rf"_inlfunc_LocalLambda(?:_token_(\d+))?_.+{_TIME}")


@dataclass(frozen=True)
class Row:
    """Medians of a candidate at one side, or at all (`BODIES`, `WHOLE`), and of the present choice."""

    side: int
    name: str
    milliseconds: float = math.nan
    present: float = math.nan
    kept: bool = False
    refused: str = ""

    @property
    def ratio(self) -> float:
        """Time over the present choice's; below 1 is faster."""
        return self.milliseconds / self.present


@dataclass
class Tuning:
    """Measurements and choice. `spread` of the present choice's own repeats is in milliseconds per side."""

    present: Lowering
    chosen: Lowering
    rows: list[Row] = field(default_factory=list)
    spread: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def refused(self) -> list[Row]:
        """Candidates that did not agree with the present choice."""
        return [row for row in self.rows if row.refused]


@dataclass(frozen=True)
class _Beside:
    """Times of a candidate and of the present choice, alternating; or why the candidate was not timed."""

    candidate: Lowering
    own: Times = field(default_factory=dict)
    present: Times = field(default_factory=dict)
    refused: str = ""

    def gain(self, side: int) -> float:
        """Milliseconds by which the candidate is faster, by medians; minus infinity where it was refused."""
        return -math.inf if self.refused else median(self.present[side]) - median(self.own[side])


def candidate_tiles(side: int) -> list[tuple[int, int]]:
    """`TILES` and a whole row, those that divide a picture of `side` x `side`."""
    tiles = [tile for tile in (*TILES, (1, side)) if side % tile[0] == 0 and side % tile[1] == 0]
    return [tile for tile in dict.fromkeys(tiles) if tile[0] * tile[1] <= MAX_PLACES]


def candidates(present: Lowering) -> list[Lowering]:
    """The candidates: every tile once at each side, and the other body last."""
    others = [[(side, t) for t in candidate_tiles(side) if t != tile] for side, tile in present.tiles.items()]
    mixed = [
        Lowering(form="tiles", tiles=present.tiles | dict(one for one in column if one is not None))
        for column in zip_longest(*others)
    ]
    return [*mixed, Lowering(form="convolution", tiles=present.tiles)]


def tune(
    bundle: str | Path,
    rounds: int,
    progress: Progress = lambda done, total, what: None,
    rewrite: Callable[[onnx.ModelProto, Lowering], onnx.ModelProto] = relowered,
) -> Tuning:
    """Measures the candidates in a bundle's guided U-Net.

    Args:
        bundle: with fused operators.
        rounds: runs of each candidate, at least 2, each beside one of the present choice.
        progress: see `Progress`.
        rewrite: what lowers a model; another one is for tests.

    Raises:
        BundleError: the bundle is damaged, or ONNX Runtime cannot load a graph.
        ExportError: it has no Local-λ to lower, or `rounds` makes no sense.
    """
    if not 2 <= rounds <= 100:
        raise ExportError(f"--rounds {rounds}: expected 2 to 100; one run has no spread")
    opened = Bundle.open(bundle)
    path = opened.model_file("unet")
    model = onnx.load(str(path), load_external_data=False)
    found = present_lowering(model)
    present = found.model_copy(update={"form": "tiles"})
    tried = candidates(present)
    total = (len(tried) + 1) * (1 + 2 * rounds) + 2  # the choice together is one more, beside a present of its own
    counted = itertools.count()
    compare = _Comparison(
        path, model, rewrite, _inputs(opened), rounds, lambda what: progress(next(counted), total, what)
    )
    beside = compare(present, tried)
    *tiled, convolution = beside
    spread = {
        key: _spread([run for one in beside for run in one.present.get(key, [])])
        for key in (*present.tiles, BODIES, WHOLE)
    }
    kept = {}
    for side, tile in present.tiles.items():
        others = [one for one in tiled if one.candidate.tiles[side] != tile and one.gain(side) > spread[side]]
        if others:
            kept[side] = max(others, key=lambda one: one.gain(side))
    chosen = present.model_copy(
        update={"tiles": present.tiles | {side: one.candidate.tiles[side] for side, one in kept.items()}}
    )
    faster = convolution.gain(WHOLE) > max(spread[WHOLE], sum(one.gain(side) for side, one in kept.items()))
    if faster:
        chosen, kept = convolution.candidate, {}
    rows = []
    for side, tile in present.tiles.items():
        rows += [
            _row(one, side, "x".join(map(str, one.candidate.tiles[side])), kept.get(side) is one)
            for one in tiled
            if one.candidate.tiles[side] != tile
        ]
    rows.append(_row(convolution, WHOLE, "convolution", faster))
    if chosen != present:  # measured once more: the best of several may be so by luck, and no one ran them together
        (together,) = compare(present, [chosen])
        judged = WHOLE if faster else BODIES
        holds = together.gain(judged) > spread[judged]
        rows = rows if holds else [replace(row, kept=False) for row in rows]
        rows.append(_row(together, judged, "chosen, once more", holds))
        chosen = chosen if holds else present
    notes = ["the file has the body 'convolution'; its tiles are compared with the shipped ones"]
    return Tuning(present, chosen, rows, spread, notes if found.form == "convolution" else [])


class _Comparison:
    """Runs candidates and the present choice alternately, with the same inputs."""

    def __init__(
        self,
        path: Path,
        model: onnx.ModelProto,
        rewrite: Callable[[onnx.ModelProto, Lowering], onnx.ModelProto],
        inputs: Mapping[str, np.ndarray],
        rounds: int,
        step: Callable[[str], None],
    ) -> None:
        self._path, self._model, self._rewrite = path, model, rewrite
        self._inputs, self._rounds, self._step = inputs, rounds, step
        self._sides = [present_side(node) for node in local_lambdas(model)]

    def __call__(self, present: Lowering, tried: Sequence[Lowering]) -> list[_Beside]:
        """Each candidate in a session of its own, whose runs alternate with the present choice's."""
        found: list[tuple[Lowering, Times | str]] = []
        with self._session(present) as reference:
            expected = self._run(reference, "present choice")
            for candidate in tried:
                found.append((candidate, self._alternate(candidate, reference, expected)))
        timed = sum(not isinstance(times, str) for _, times in found)
        own = self._times(reference, 1 + timed * self._rounds) if timed else {}
        result = []
        start = 0
        for candidate, times in found:
            if isinstance(times, str):
                result.append(_Beside(candidate, refused=times))
                continue
            stop = start + self._rounds
            result.append(_Beside(candidate, times, {side: runs[start:stop] for side, runs in own.items()}))
            start = stop
        return result

    def _session(self, lowering: Lowering) -> AbstractContextManager[Profiled]:
        changed = self._rewrite(self._model, lowering).SerializeToString()
        return profiled_session(self._path, changed, kernels=False)

    def _alternate(self, candidate: Lowering, reference: Profiled, expected: np.ndarray) -> Times | str:
        what = (
            candidate.form
            if candidate.form != "tiles"
            else "tiles " + ", ".join(f"{tall}x{wide}" for tall, wide in candidate.tiles.values())
        )
        with self._session(candidate) as session:
            output = self._run(session, what)
            error = float(np.linalg.norm(output - expected) / np.linalg.norm(expected))
            if not error <= AGREEMENT:  # so that NaN is refused as well
                return f"refused: differs by {error:.1e} from the present choice; rounding is below {AGREEMENT:.0e}"
            for _ in range(self._rounds):
                self._run(reference, what)
                self._run(session, what)
        return self._times(session, 1 + self._rounds)

    def _run(self, profiled: Profiled, what: str) -> np.ndarray:
        self._step(what)
        output: np.ndarray = profiled.session.run(None, dict(self._inputs))[0]
        return output

    def _times(self, profiled: Profiled, runs: int) -> Times:
        """Times of all runs except the first, which warms up."""
        events = [event for event in profiled.events if event["name"].endswith(_TIME)]
        size, rest = divmod(len(events), runs)
        if rest or not size:
            raise ExportError(
                f"ONNX Runtime's profile has {len(events)} nodes for {runs} equal runs; update ONNX Runtime"
            )
        each = [body_times(events[start : start + size], self._sides) for start in range(size, len(events), size)]
        return {side: [times[side] for times in each] for side in each[0]}


def body_times(events: Sequence[Mapping[str, Any]], sides: Sequence[int]) -> dict[int, float]:
    """Milliseconds of one run per side, and of all its nodes under `WHOLE`.

    ONNX Runtime names the nodes of a body `_inlfunc_LocalLambda[_token_NUMBER]_NODE`, with numbers that rise in the
    order of the calls. Its own changes of a tensor's layout have no such name, and count to the body around them.

    Args:
        events: the nodes of one run, in order.
        sides: of the calls, in the graph's order.

    Raises:
        ExportError: the profile has not as many bodies as there are calls.
    """
    names = [str(event["name"]) for event in events]
    numbers = [int(match[1] or -1) if (match := _BODY.fullmatch(name)) else None for name in names]
    found = sorted({number for number in numbers if number is not None})
    if len(found) != len(sides):
        raise ExportError(
            f"ONNX Runtime's profile shows {len(found)} bodies of LocalLambda where the graph has {len(sides)}; "
            "this version of ONNX Runtime names them in another way, so they cannot be timed"
        )
    for place in range(1, len(names) - 1):
        if names[place].startswith("Reorder") and numbers[place - 1] == numbers[place + 1]:
            numbers[place] = numbers[place - 1]
    side_of = dict(zip(found, sides, strict=True))
    times = dict.fromkeys([*sides, BODIES, WHOLE], 0.0)
    for event, number in zip(events, numbers, strict=True):
        for key in (WHOLE,) if number is None else (side_of[number], BODIES, WHOLE):
            times[key] += event["dur"] / 1000
    return times


def tuning_table(tuning: Tuning) -> Table:
    """Per resolution: each candidate's milliseconds beside the present choice's, their ratio, and what was kept."""
    table = Table("nodes", "lowering", box=None, header_style="bold")
    for heading in ("ms", "present", "ratio", "spread"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in tuning.rows:
        nodes = {BODIES: "Local-λ", WHOLE: "whole step"}.get(row.side, f"{row.side}x{row.side}")
        times = (row.milliseconds, row.present, row.ratio, tuning.spread[row.side])
        words = (
            ["-"] * 4 if row.refused else [f"{times[0]:.1f}", f"{times[1]:.1f}", f"{times[2]:.3f}", f"{times[3]:.1f}"]
        )
        table.add_row(nodes, row.name, *words, "refused" if row.refused else "kept" if row.kept else "")
    return table


def _row(one: _Beside, side: int, name: str, kept: bool) -> Row:
    if one.refused:
        return Row(side, name, refused=one.refused)
    return Row(side, name, median(one.own[side]), median(one.present[side]), kept)


def _spread(runs: Sequence[float]) -> float:
    """The interquartile range; infinite for no runs, so that no candidate is kept."""
    if len(runs) < 2:
        return math.inf
    first, _, third = quantiles(runs, n=4)
    return third - first


def _inputs(bundle: Bundle) -> dict[str, np.ndarray]:
    """Seeded inputs of the guided U-Net by name; an open batch is 1."""
    rng = np.random.default_rng(7)
    shapes = {tensor.name: tensor.shape for tensor in bundle.graph("unet").inputs}
    sample = [size if isinstance(size, int) else 1 for size in shapes["sample"]]
    inputs = {
        "sample": rng.standard_normal(sample, dtype=np.float32),
        "timestep": np.array([500]),
        "guidance_scale": np.array([2.5], dtype=np.float32),
    }
    return {name: inputs[name] for name in shapes}  # no scale where guidance is distilled
