"""The error of a quantized graph against float32."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from moebius_calibration.choice.simulate import Switched
from moebius_export.errors import ExportError

Array = np.ndarray
Inputs = Mapping[str, Array]


class Evaluator:
    """Measures the error that a set of quantized operators causes in a graph's output, on recorded inputs."""

    def __init__(self, samples: Sequence[Inputs], run: Callable[[Inputs], Array]) -> None:
        if not samples:
            raise ExportError("there are no recorded inputs to try INT8 on; calibrate on more pictures")
        self._samples = samples
        self._expected = [run(sample).astype(np.float64) for sample in samples]

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
