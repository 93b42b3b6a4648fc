"""Writing folders whole or not at all, such as bundles and engines.

A folder is built under a temporary name beside its final one (`.NAME.XXXX.part`) and renamed once it is complete. The
next process removes what a killed one left behind; a folder that another process still builds in is locked, and stays.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moebius_runtime.errors import MoebiusError
from moebius_runtime.files.writing import NOTHING_LEFT, cannot_write


@contextmanager
def placed_whole(out: Path) -> Iterator[Path]:
    """A temporary folder to build in. It is moved to `out` after the block, or removed if the block raises.

    A folder that was at `out` stays there until the complete new one replaces it.

    Raises:
        OutputError: the folder cannot be written, there is a file or a link at `out`, or the disk is full.
    """
    try:
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise cannot_write(out, "a file or a link has that name", "Choose the name of a folder.")
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear(out)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise cannot_write(out, error) from error
    lock = _locked(temporary)
    try:
        yield temporary
        temporary.chmod(0o755)
        _exchange(temporary, out)
    except OSError as error:
        if isinstance(error, MoebiusError):
            raise
        raise cannot_write(out, error, NOTHING_LEFT) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def link_file(source: Path, target: Path) -> None:
    """Puts a file or a symbolic link at `target` too, by a hard link, or by a copy where hard links are unsupported."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(new: Path, out: Path) -> None:
    """Renames `new` to `out`; the old folder is deleted only after that has succeeded."""
    if not out.exists():
        os.replace(new, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    os.replace(out, old)
    try:
        os.replace(new, out)
    except OSError:
        os.replace(old, out)
        raise
    shutil.rmtree(old)


def _clear(out: Path) -> None:
    """Removes what a killed process left behind. An old folder that it had already moved away is restored first."""
    for path in sorted(out.parent.glob(f".{_escaped(out.name)}.*")):
        if path.suffix not in (".part", ".old") or path.is_symlink() or not path.is_dir():
            continue
        lock = _locked(path)
        if lock is None:
            continue
        try:
            if path.suffix == ".old" and not out.exists() and any(path.iterdir()):
                os.replace(path, out)
            else:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _escaped(name: str) -> str:
    """The name as a `glob` pattern that matches only itself."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _locked(folder: Path) -> int | None:
    """A handle that locks the folder until it is closed; None if another process holds it or locks are unsupported."""
    if sys.platform == "win32":  # it has no such locks: what a killed process leaves behind stays
        return None
    import fcntl  # noqa: TID251

    handle = None
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    if handle is not None:
        os.close(handle)
    return None
