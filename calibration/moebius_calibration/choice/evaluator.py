"""The error of a quantized graph against float32."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from moebius_calibration.choice.simulate import Switched
from moebius_export.errors import ExportError

Array = np.ndarray
Inputs = Mapping[str, Array]


class Evaluator:
    """Measures the error that a set of quantized operators causes in a graph's output.

    Args:
        samples: recorded inputs.
        reference: the session of the float32 graph, whose outputs are compared with.

    Raises:
        ExportError: there are no samples.
    """

    def __init__(self, samples: Sequence[Inputs], reference: Any) -> None:
        if not samples:
            raise ExportError("there are no recorded inputs to try INT8 on; calibrate on more pictures")
        self._samples = samples
        self._expected = [reference.run(None, dict(sample))[0].astype(np.float64) for sample in samples]

    def error(self, session: Switched, nodes: Collection[str]) -> float:
        """Relative L2 error over all samples, rounded to 6 digits.

        Raises:
            ExportError: the output is not finite.
        """
        session.set(nodes)
        difference = whole = 0.0
        for sample, expected in zip(self._samples, self._expected, strict=True):
            found = session.run(None, sample)[0]
            if not np.isfinite(found).all():
                raise ExportError("a layer in INT8 makes the output infinite or NaN; check the weights with `verify`")
            difference += float(np.square(found - expected).sum())
            whole += float(np.square(expected).sum())
        return float(f"{np.sqrt(difference / whole):.6g}") if whole else float(difference > 0)
