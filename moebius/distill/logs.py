"""Where a run's numbers go: lines of JSON, and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from moebius.distill.samples import Picture
from moebius.distill.trainer import Report
from moebius.errors import TrainingError


class Log:
    """Writes means over `every` steps to `OUT/metrics.jsonl` and to `OUT/tensorboard`.

    A run that goes on takes away the lines after the step that it goes on from, so that no step is there twice.

    Raises:
        TrainingError: TensorBoard is asked for and not installed, or the folder is not writable.
    """

    def __init__(self, out: Path, every: int, start: int, tensorboard: bool) -> None:
        self._every, self._path, self._samples = every, out / "metrics.jsonl", out / "samples"
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._writer: Any = None
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._drop_after(start)
        except OSError as error:
            raise TrainingError(f"cannot write in {out}: {error.strerror or error}; choose another `out`") from error
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise TrainingError(
                    f"TensorBoard is not installed ({error}); install the extra `train`, or write `tensorboard: false`"
                ) from error
            self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1 if start else None)

    def step(self, report: Report) -> dict[str, float] | None:
        """Takes a step's values; returns the means when it writes them. Leaves out values that are not finite."""
        for name, value in report.values.items():
            if math.isfinite(value):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1
        if report.step % self._every:
            return None
        means = {name: value / self._counts[name] for name, value in self._sums.items()}
        self._sums, self._counts = {}, {}
        line = {"step": report.step} | means
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if self._writer:
            for name, value in means.items():
                self._writer.add_scalar(name, value, report.step)
        return means

    def picture(self, step: int, picture: Picture) -> Path:
        """Keeps a sheet of samples; returns its file."""
        self._samples.mkdir(parents=True, exist_ok=True)
        path = self._samples / f"step-{step:08d}.png"
        Image.fromarray(picture).save(path)
        if self._writer:
            self._writer.add_image("samples", picture, step, dataformats="HWC")
        return path

    def close(self) -> None:
        """Writes what is held."""
        if self._writer:
            self._writer.close()

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        lines = self._path.read_text("utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        part = self._path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        part.replace(self._path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that was cut off when the run was killed
