"""`moebius-export doctor`: what this machine can run, what of a bundle fits it, and what mends the rest.

It needs nothing but the base package, changes nothing, and imports no inference library into its own process.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from moebius_export.doctor.bundles import Checked, check_whole_bundle
from moebius_export.doctor.gpu import Gpu, gpu_rows, look_at_gpu
from moebius_export.doctor.host import jetson_rows, memory_rows, processor_rows
from moebius_export.doctor.libraries import LIBRARIES, Found, library_rows, look_at_libraries
from moebius_export.doctor.rows import Part, Report, Row, Verdict
from moebius_export.doctor.runtimes import Judged, judge_runtimes, runtime_rows
from moebius_export.doctor.sources import Answer, Sources

__all__ = ["Report", "Sources", "examine"]

T = TypeVar("T")


def examine(bundle: Path | None, sources: Sources, progress: Callable[[str], None]) -> Report:
    """Looks at the machine and, if one is named, at a bundle.

    A check that breaks becomes a row of verdict `failed`; the others go on.

    Args:
        bundle: folder of the bundle, or None.
        sources: the machine.
        progress: is told what is being looked at.
    """
    failed: list[Row] = []

    def look(name: str, probe: Callable[[], T], otherwise: T) -> T:
        progress(name)
        try:
            return probe()
        except Exception as error:  # a machine can be stranger than any probe foresees; the doctor goes on
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            failed.append(Row(name, f"this check itself failed: {text}", Verdict.failed, "report it with this line"))
            return otherwise

    folder = Path.cwd() if bundle is None else bundle
    nothing: list[Row] = []
    machine = [
        *look("processor", lambda: processor_rows(sources), nothing),
        *look("memory and disk", lambda: memory_rows(sources, folder), nothing),
        *look("Jetson", lambda: jetson_rows(sources), nothing),
    ]
    gpu = look("gpu", lambda: look_at_gpu(sources), Gpu(None, None, None, None, "looking for one failed"))
    unknown = {name: Found(Answer(problem="looking for it failed")) for name in LIBRARIES}
    libraries = look("libraries", lambda: look_at_libraries(sources, gpu), unknown)
    graphics = look("driver", lambda: gpu_rows(sources, gpu), nothing)
    installed = look("versions", lambda: library_rows(sources, libraries), nothing)
    unjudged: list[Judged] = []
    judged = look("runtimes", lambda: judge_runtimes(libraries, gpu), unjudged)
    parts = {"machine": machine, "gpu": graphics, "libraries": installed, "runtimes": runtime_rows(judged)}
    sound = None
    if bundle is not None:
        checked = look("bundle", lambda: check_whole_bundle(bundle, libraries, gpu, progress), Checked((), sound=False))
        parts["bundle"], sound = list(checked.rows), checked.sound
    if failed:
        parts["failed checks"] = failed
    return Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        version=_own_version(),
        parts=tuple(Part(name, tuple(rows)) for name, rows in parts.items()),
        usable=tuple(runtime.name for runtime in judged if runtime.usable),
        sound=sound,
    )


def _own_version() -> str:
    try:
        return metadata.version("moebius-edge")
    except metadata.PackageNotFoundError:
        return "from a source tree"
