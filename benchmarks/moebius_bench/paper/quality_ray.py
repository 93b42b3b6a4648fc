"""`moebius-bench quality --engine ray`: pairs are compared on a Ray cluster, and reduced here in their order."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moebius_batch import ray_engine
from moebius_runtime.errors import MoebiusError

if TYPE_CHECKING:
    from moebius_bench.paper.quality import Cluster, Features, PairQuality

_CHUNK = 32  # pairs a row: with FID's features some 0.7 MB of text
_CPUS = 1  # of a worker


class ComparisonWorker:
    """The actor: compares the pairs of a row, and returns errors as rows."""

    def __init__(self, fid_weights: str | None, lpips_weights: str | None) -> None:
        self._paths = tuple(None if path is None else Path(path) for path in (fid_weights, lpips_weights))
        self._compare: Any = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """{"pairs": [JSON of an index and of pairs]} -> {"result": [JSON]}."""
        results = []
        for text in batch["pairs"]:
            content = json.loads(str(text))
            try:
                found = self._run(content["pairs"])
                result: dict[str, Any] = {"found": found}
            except MoebiusError as error:
                result = {"error": str(error), "exit_code": error.exit_code}
            results.append(json.dumps({"index": content["index"], **result}))
        return {"result": results}

    def _run(self, pairs: list[tuple[str, list[str]]]) -> list[dict[str, Any]]:
        from moebius_bench.paper.quality import PairComparison

        if self._compare is None:
            self._compare = PairComparison(*self._paths)
        found = []
        for stem, files in pairs:
            scores, features = self._compare(stem, [Path(file) for file in files])
            texts = None if features is None else [base64.b64encode(one.tobytes()).decode() for one in features]
            found.append({"scores": scores.model_dump(), "features": texts})
        return found


def compare_on_ray(
    cluster: Cluster,
    pairs: Sequence[tuple[str, tuple[Path, ...]]],
    fid_weights: Path | None,
    lpips_weights: Path | None,
    announce: Callable[[str], None],
) -> Iterator[tuple[PairQuality, tuple[Features, Features] | None]]:
    """Yields the scores and features of all pairs in their order, as `PairComparison` does; its nodes read the files.

    Raises:
        MoebiusError: as `PairComparison`, `moebius_batch.ray_engine.connect` and `pool_size`.
    """
    from moebius_bench.paper.quality import PairQuality

    ray = ray_engine.connect(cluster.address)
    rows = [
        {"index": start, "pairs": [(stem, [str(file.absolute()) for file in files]) for stem, files in chunk]}
        for start in range(0, len(pairs), _CHUNK)
        for chunk in (pairs[start : start + _CHUNK],)
    ]
    workers = min(ray_engine.pool_size(ray, cluster.workers, _CPUS, 0), len(rows))
    announce(f"{workers} workers on the Ray cluster")
    waiting: dict[int, list[dict[str, Any]]] = {}  # results that came before those of an earlier row
    start = 0
    for row in ray_engine.map_rows(
        ray,
        ComparisonWorker,
        tuple(None if path is None else str(path.absolute()) for path in (fid_weights, lpips_weights)),
        [{"pairs": json.dumps(row)} for row in rows],
        workers=workers,
        cpus=_CPUS,
        gpus=0,
    ):
        waiting[row["index"]] = row["found"]
        while start in waiting:
            for one in waiting.pop(start):
                features = one["features"]
                both = None if features is None else (_decoded(features[0]), _decoded(features[1]))
                yield PairQuality(**one["scores"]), both
            start += _CHUNK


def _decoded(text: str) -> Features:
    """float32 [1, F] from base64."""
    return np.frombuffer(base64.b64decode(text), np.float32).reshape(1, -1).copy()  # bytes -> [1, F]
