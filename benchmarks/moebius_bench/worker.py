"""One measurement in a process of its own: a job as JSON on standard input, its result as JSON on standard output.

Nothing heavy is imported before the clock of `import_seconds` runs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def main() -> int:
    """Reads a job, does it, writes `{"ok": ..., ...}`. A user's error is an answer, a bug a traceback and exit 1."""
    started = time.perf_counter()
    answer = own_stdout()
    from moebius_bench.jobs import Job
    from moebius_runtime.errors import MoebiusError

    job = Job.model_validate_json(sys.stdin.read())
    try:
        content = {"ok": True, "result": _work(job.kind, started)(job)}
    except MoebiusError as error:
        content = {"ok": False, "error": " ".join(str(error).split())}
    with os.fdopen(answer, "w") as stream:
        json.dump(content, stream)
    return 0


def _work(kind: str, started: float) -> Callable[[Any], dict[str, Any]]:
    if kind == "rate":
        from moebius_bench.rate import measure_rate

        return lambda job: measure_rate(job).model_dump()
    if kind == "profile":
        from moebius_bench.profiling import profile_bundle

        return lambda job: {"graphs": [profile.model_dump() for profile in profile_bundle(job)]}
    if kind == "cost":
        from moebius_bench.costs import count_bundle

        return lambda job: dict(count_bundle(job))
    if kind == "export":
        from moebius_bench.plain import export_plain

        return export_plain
    from moebius_bench.measuring import import_runtime, measure

    def measured(job: Any) -> dict[str, Any]:
        import_runtime(job.runtime, job.baseline)
        return measure(job, time.perf_counter() - started).model_dump()

    return measured


def own_stdout() -> int:
    """Standard output under a number of its own; whatever a library prints goes to standard error."""
    sys.stdout.flush()
    answer = os.dup(1)
    os.dup2(2, 1)
    return answer


if __name__ == "__main__":
    sys.exit(main())
