"""Tars in WebDataset's layout: `KEY.jpg`, `KEY.mask.png` and `KEY.json` are adjacent members."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from moebius_batch.items import Blob, Item
from moebius_batch.keys import check_key
from moebius_batch.stores import MAX_PICTURE, mtime
from moebius_runtime.commands.pairing import SUFFIXES
from moebius_runtime.errors import InputError, one_line

_MASKS = tuple(f".mask{suffix}" for suffix in SUFFIXES)


def index(path: Path, name: str, prefix: str) -> list[Item]:
    """Lists the pictures of a plain, local tar from its headers; nothing is extracted.

    Args:
        path: the tar. Compressed ones are refused, because parts of them cannot be read alone.
        name: its name in messages.
        prefix: what begins each key, before a `/`: the tar's own name, so that tars may repeat each other's keys.

    Raises:
        InputError: the tar is truncated or damaged, a key comes twice or cannot name a result, or a sample holds
            several pictures or masks.
    """
    found: dict[str, dict[str, Blob]] = {}
    files: dict[str, str] = {}
    current, end = None, -1
    try:
        stamp = mtime(os.stat(path))
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else every header is kept
                if tar.offset <= end:
                    raise tarfile.ReadError("its headers lead backwards")
                end = tar.offset
                key, suffix = _split(member.name)
                kind = next((k for k, ends in (("mask", _MASKS), ("picture", SUFFIXES)) if suffix in ends), None)
                kind = "extra" if suffix == ".json" else kind
                if kind is None or member.isdir():
                    continue
                where = f"{name}: {one_line(member.name)}"
                if not member.isreg() or member.issparse() or member.size > MAX_PICTURE:
                    raise InputError(f"{where} is not a plain file of at most {MAX_PICTURE >> 20} MiB; pack it again")
                if key != current:
                    check_key(f"{prefix}/{key}", name)
                    if key in found:
                        raise InputError(f"{where}: the key {key!r} comes twice; pack the tar with one sample a key")
                    found[key], current = {}, key
                if kind in found[key]:
                    raise InputError(f"{where}: its sample has a {kind} already; pack the tar with one of each")
                found[key][kind] = Blob(str(path), member.size, stamp, member.offset_data)
                if kind == "picture":
                    files[key] = member.name
            offset = tar.offset
        with open(path, "rb") as stream:  # tarfile takes a damaged header for the end, which is a block of zeros
            stream.seek(offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header and no end at byte {offset} of {os.path.getsize(path)}")
    except InputError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise InputError(f"{name} is not a whole, plain tar ({one_line(str(error))}); copy or pack it again") from error
    return [
        Item(f"{prefix}/{key}", files[key], parts["picture"], parts.get("mask"), parts.get("extra"))
        for key, parts in sorted(found.items())
        if "picture" in parts
    ]


def _split(name: str) -> tuple[str, str]:
    """Key and suffix at the first dot of the last part: `a.b/01.mask.png` gives `a.b/01` and `.mask.png`."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, dot, rest = last.partition(".")
    return folder + slash + stem, (dot + rest).lower()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Writes a tar whose bytes depend on the names and contents alone: no times, no owners."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
