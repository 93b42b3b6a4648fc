"""Reports which runtimes and engines work on this machine, and how to fix the rest: `moebius-export doctor`.

It needs only the base package, changes nothing, and imports no inference library into its own process.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from moebius_export.doctor.bundles import Checked, check_whole_bundle
from moebius_export.doctor.gpu import Gpu, find_gpu, gpu_rows
from moebius_export.doctor.host import jetson_rows, memory_rows, processor_rows
from moebius_export.doctor.libraries import LIBRARIES, Found, check_libraries, library_rows
from moebius_export.doctor.rows import Part, Report, Row, Verdict
from moebius_export.doctor.runtimes import RuntimeStatus, check_runtimes, runtime_rows
from moebius_export.doctor.sources import Answer, Sources
from moebius_runtime.version import own_version

__all__ = ["Report", "Sources", "examine"]

T = TypeVar("T")


def examine(bundle: Path | None, sources: Sources, progress: Callable[[str], None]) -> Report:
    """Checks the machine and, if given, a bundle.

    A check that raises becomes a row with the verdict `failed`; the other checks still run.

    Args:
        bundle: folder of the bundle, or None.
        sources: the machine.
        progress: called with the name of each check.
    """
    failed: list[Row] = []

    def check(name: str, probe: Callable[[], T], otherwise: T) -> T:
        progress(name)
        try:
            return probe()
        except Exception as error:  # no machine may end the doctor
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            failed.append(Row(name, f"this check itself failed: {text}", Verdict.failed, "report it with this line"))
            return otherwise

    folder = Path.cwd() if bundle is None else bundle
    nothing: list[Row] = []
    machine = [
        *check("processor", lambda: processor_rows(sources), nothing),
        *check("memory and disk", lambda: memory_rows(sources, folder), nothing),
        *check("Jetson", lambda: jetson_rows(sources), nothing),
    ]
    gpu = check("gpu", lambda: find_gpu(sources), Gpu(None, None, None, None, "the check for one failed"))
    unknown = {name: Found(Answer(problem="the check for it failed")) for name in LIBRARIES}
    libraries = check("libraries", lambda: check_libraries(sources, gpu), unknown)
    graphics = check("driver", lambda: gpu_rows(sources, gpu), nothing)
    installed = check("versions", lambda: library_rows(sources, libraries), nothing)
    no_runtimes: list[RuntimeStatus] = []
    statuses = check("runtimes", lambda: check_runtimes(libraries, gpu), no_runtimes)
    parts = {"machine": machine, "gpu": graphics, "libraries": installed, "runtimes": runtime_rows(statuses)}
    sound = None
    if bundle is not None:
        broken = Checked((), sound=False)
        checked = check("bundle", lambda: check_whole_bundle(bundle, libraries, gpu, progress), broken)
        parts["bundle"], sound = list(checked.rows), checked.sound
    if failed:
        parts["failed checks"] = failed
    return Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        version=own_version() or "from a source tree",
        parts=tuple(Part(name, tuple(rows)) for name, rows in parts.items()),
        usable=tuple(runtime.name for runtime in statuses if runtime.usable),
        sound=sound,
    )
