"""Measures the error of a precision plan: a graph's emulated output on recorded inputs against float32's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moebius_export.errors import ExportError
from moebius_export.graph.kinds import FloatType
from moebius_export.graph.opened import Opened
from moebius_export.graph.sessions import session_of
from moebius_export.precision.emulate import emulated_model
from moebius_export.precision.typed import typed

Inputs = Mapping[str, np.ndarray]
Types = Mapping[str, FloatType]


class Trials:
    """Runs one graph under any plan.

    Args:
        graph: the float32 graph.
        folder: of its weights file.
        samples: recorded inputs, at least one.
        expected: the float32 outputs of the samples; None computes them.

    Raises:
        ExportError: there are no samples.
    """

    def __init__(
        self,
        graph: Opened,
        folder: Path,
        samples: Sequence[Inputs],
        expected: Sequence[np.ndarray] | None = None,
    ) -> None:
        if not samples:
            raise ExportError("there are no recorded inputs to try a plan on")
        self.graph, self._folder, self._samples = graph, folder, samples
        self._known: dict[str, float] = {}
        self._expected = self._run({}, {}) if expected is None else list(expected)

    def error(self, computes: Types, stores: Types) -> float:
        """Relative L2 error of the output over all samples; infinite where a value of it is not finite."""
        low = [sorted(name for name, kind in types.items() if kind != "fp32") for types in (computes, stores)]
        kinds = sorted({*computes.values(), *stores.values()})
        key = json.dumps([kinds, *low])
        if key not in self._known:
            found = self._run(computes, stores)
            if all(np.isfinite(values).all() for values in found):
                pairs = list(zip(found, self._expected, strict=True))
                squares = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in pairs)
                whole = sum(float(np.square(b.astype(np.float64)).sum()) for _, b in pairs)
                self._known[key] = float(np.sqrt(squares / whole))
            else:
                self._known[key] = float("inf")
        return self._known[key]

    def _run(self, computes: Types, stores: Types) -> list[np.ndarray]:
        session = session_of(emulated_model(typed(self.graph, None, computes, stores)), self._folder)
        return [session.run(None, dict(sample))[0] for sample in self._samples]
