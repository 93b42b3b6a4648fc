"""Folders that appear whole or not at all. No PyTorch here: what is built on a device is placed in the same way.

A folder is made under a temporary name beside its place (`.NAME.XXXX.part`) and renamed when it is complete. What a
killed process left behind is removed by the next one; a folder that a process still works in is locked, and stays.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moebius_runtime.errors import MoebiusError, OutputError

try:
    import fcntl
except ImportError:  # Windows: without locks, what is left behind stays
    fcntl = None  # type: ignore[assignment]


@contextmanager
def placed_whole(out: Path) -> Iterator[Path]:
    """A folder to build in, moved to `out` when the block ends well and removed when it does not.

    What was at `out` before stays until then, whatever ends the block, and is replaced only by the complete folder.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear(out)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}. Choose a writable folder.") from error
    lock = _locked(temporary)
    try:
        yield temporary
        temporary.chmod(0o755)
        _exchange(temporary, out)
    except OSError as error:
        if isinstance(error, MoebiusError):
            raise
        raise OutputError(f"cannot write {out}: {error.strerror or error}. Nothing was changed there.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def link_file(source: Path, target: Path) -> None:
    """Puts a file, or a symbolic link as it is, at `target` too: by a hard link, or a copy where there are none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(new: Path, out: Path) -> None:
    """Renames `new` to `out`; what was there before goes only once that has worked."""
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
    """Removes what a killed process left behind, after putting back what it had just moved out of the way."""
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
    """The name as a pattern of `glob` that matches only itself."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _locked(folder: Path) -> int | None:
    """A handle that locks the folder until it is closed, or None where another process has it or there are no locks."""
    if fcntl is None:
        return None
    handle = None
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    if handle is not None:
        os.close(handle)
    return None
