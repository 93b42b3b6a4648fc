"""Engines that a folder already holds when some of its graphs are built again: which stay, and why others go."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from moebius_export.errors import ExportError
from moebius_export.placing import link_file
from moebius_runtime.bundle import Bundle
from moebius_runtime.errors import EngineError
from moebius_runtime.manifest import GraphName
from moebius_runtime.passport import (
    PASSPORT_NAME,
    EngineInfo,
    Passport,
    check_bundle,
    check_engine,
    engine_file,
    read_passport,
)

_SHARED = ("backend", "backend_version", "precision", "gpu", "sm", "driver", "cuda", "flags")


def check_options_agree(out: Path, stamp: dict[str, Any], graphs: Collection[GraphName]) -> None:
    """Refuses a build after which one passport could not describe all engines of the folder.

    Args:
        out: the folder of engines; it need not exist.
        stamp: the fields of the new passport, without `engines`.
        graphs: that are built now; engines of all others are to stay.

    Raises:
        ExportError: the folder holds valid engines of other graphs that were built with other options, on another
            driver or for another GPU.
    """
    passport, _ = _passport(out)
    if passport is None:
        return
    others = [graph for graph in passport.engines if graph not in graphs]
    different = _differences(passport, stamp)
    if others and different:
        every = ",".join([*graphs, *others])
        raise ExportError(
            f"{out} holds engines of {', '.join(others)} that were built with {'; '.join(different)}. One passport "
            f"describes all engines of a folder. Build them together (--graphs {every}), use the same options, or "
            "remove that folder first. Nothing was changed"
        )


def keep_earlier(
    bundle: Bundle,
    out: Path,
    folder: Path,
    stamp: dict[str, Any],
    graphs: Collection[GraphName],
    note: Callable[[str], None],
) -> dict[GraphName, EngineInfo]:
    """Links what stays of the folder `out` into the new `folder`; returns the passport entries of the kept engines.

    An engine stays if it is not built now, its SHA-256 is that of its passport, and it was built from the files that
    the bundle has now. Files that are no engines stay too. Each engine that goes is named in a note.

    Args:
        bundle: that the engines belong to.
        out: the folder of engines; it need not exist.
        folder: the complete new engines, which `out` will become.
        stamp, graphs: as of `check_options_agree`, which is repeated: another build may have ended meanwhile.
        note: called with one line for each engine that cannot stay.

    Raises:
        ExportError: as `check_options_agree`.
        OSError: a file can be neither linked nor copied.
    """
    if not out.is_dir():
        return {}
    check_options_agree(out, stamp, graphs)
    passport, why = _passport(out)
    kept: dict[GraphName, EngineInfo] = {}
    built = {engine_file(graph) for graph in graphs}
    for graph, engine in passport.engines.items() if passport else ():
        if graph in graphs:
            continue
        try:
            alone = passport.model_copy(update={"engines": {graph: engine}})  # type: ignore[union-attr]
            check_bundle(out, alone, bundle.manifest)
            check_engine(out, alone, graph)
        except EngineError as error:
            note(f"the earlier engine of {graph} is removed: {error}")
            built.add(engine_file(graph))
        else:
            kept[graph] = engine
    named = {engine_file(graph) for graph in kept}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if name == PASSPORT_NAME or name in built:
            continue
        if path.suffix == ".plan" and name not in named:
            note(f"the earlier {path} is removed: {why or 'its passport does not name it'}")
        elif path.is_dir() and not path.is_symlink():
            (folder / name).mkdir(exist_ok=True)
        else:
            link_file(path, folder / name)
    return kept


def _passport(out: Path) -> tuple[Passport | None, str | None]:
    """The passport of a folder, or why it has none that can be believed."""
    if not out.is_dir():
        return None, None
    try:
        return read_passport(out), None
    except EngineError as error:
        return None, str(error)


def _differences(passport: Passport, stamp: dict[str, Any]) -> list[str]:
    """What the earlier engines were built with, where the new ones are not: `opt_level 5 (now default)`."""
    found = []
    for name in _SHARED:
        before, now = getattr(passport, name), stamp[name]
        if before == now:
            continue
        if name == "flags":
            keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            found += [f"{key} {before.get(key, 'unknown')} (now {now.get(key, 'unknown')})" for key in keys]
        else:
            found.append(f"{name} {before} (now {now})")
    return found
