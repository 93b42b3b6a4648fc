"""Sources of a job: a folder of pictures, tars, or a table of paths and URLs. Each gives shards with fixed numbers."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from moebius_batch import tars
from moebius_batch.errors import StoreError
from moebius_batch.items import Blob, Item, Shard, cut
from moebius_batch.keys import check_key
from moebius_batch.stores import Entry, changed, is_remote, joined, normal, store_of
from moebius_runtime.commands.pairing import HEIF_SUFFIXES, SUFFIXES
from moebius_runtime.errors import InputError, RuntimeUnavailableError

_PICTURES = (*SUFFIXES, *HEIF_SUFFIXES)
_TABLES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns: of pictures, of masks and of keys; the last two may be missing in the table."""

    picture: str = "url"
    mask: str = "mask"
    key: str = "key"


@dataclass(frozen=True)
class Source:
    """A listed source.

    Attributes:
        kind: folder, tars or table.
        shards: all shards of the job, by number.
        pictures: their number, or None where tars are listed later.
        fingerprint: SHA-256 over keys, paths and sizes: the same as long as the list is.
        mask: the mask of all pictures without their own, or None.
    """

    kind: str
    shards: list[Shard]
    pictures: int | None
    fingerprint: str
    mask: Blob | None


def open_source(source: str, out: str, masks: str | None, columns: Columns, shard_size: int) -> Source:
    """Lists a source.

    Args:
        source: a folder of pictures or of tars, a tar, or a table (.csv, .jsonl, .parquet); a path or a URL.
        out: the destination, which is left out where it lies in the source.
        masks: one mask for all, or a folder of masks with the pictures' names; None takes `KEY.mask.png` beside a
            picture, or the table's column.
        columns: of a table.
        shard_size: pictures in a shard, about; a tar is one shard.

    Raises:
        InputError: there is no source, it holds no pictures, keys are not unique or cannot name results, a table has
            not its columns, a local tar is damaged.
        StoreError: a store cannot be reached.
    """
    source = normal(source)
    kind = store_of(source).kind(source)
    if kind is None:
        raise InputError(f"there is no {source}; expected a folder, a tar or a table ({', '.join(_TABLES)})")
    if source == normal(out):
        raise InputError(f"--out {out} is the source; choose another folder")
    common, by_key = (None, None) if masks is None else _masks(normal(masks))
    suffix = os.path.splitext(source)[1].lower()
    if kind == "folder":
        inside = [normal(one).removeprefix(f"{source}/") for one in (out, masks) if one is not None]
        entries = [e for e in store_of(source).listing(source) if not any(e.name.startswith(f"{n}/") for n in inside)]
        packed = [e for e in entries if e.name.lower().endswith(".tar")]
        loose = [e for e in entries if e.name.lower().endswith(_PICTURES)]
        if packed and loose:
            raise InputError(
                f"{source} holds both tars ({packed[0].name}) and pictures ({loose[0].name}); separate them"
            )
        if packed:
            return _tars([(joined(source, e.name), e) for e in packed], common, by_key)
        items = _folder(source, loose)
        if not items:
            raise InputError(f"no picture in {source}; expected files that end in {', '.join(_PICTURES)}, or .tar")
    elif suffix == ".tar":
        entry = store_of(source).entry(source) or Entry("", -1)
        return _tars([(source, replace(entry, name=source.rpartition("/")[2]))], common, by_key)
    elif suffix in _TABLES:
        items = _table(source, suffix, columns)
    else:
        raise InputError(f"{source} is a file; expected a folder, a .tar or a table ({', '.join(_TABLES)})")
    if by_key is not None:
        items = [Item(one.key, one.file, one.picture, by_key.get(one.key, one.mask)) for one in items]
    if common is None and not any(one.mask for one in items):
        raise InputError(
            f"no picture of {source} has a mask; give --masks, or KEY.mask.png beside each picture, or a table's "
            f"column {columns.mask!r}"
        )
    name = "folder" if kind == "folder" else "table"
    sized = name == "folder"  # a table's URLs may be anywhere: not every size is known, and missing files are lines
    facts = (
        f"{_fact(i.key, i.picture, source, sized)}\0{_fact('', i.mask, source, sized) if i.mask else ''}" for i in items
    )
    return Source(name, cut(items, shard_size), len(items), _hash(facts), common)


def items_of(shard: Shard, temporary: Path) -> tuple[Item, ...]:
    """The pictures of a shard; a remote tar is copied into the folder `temporary` first. Errors as `open_source`."""
    if shard.items is not None:
        return shard.items
    assert shard.tar is not None
    url = shard.tar.url
    path = Path(url)
    if is_remote(url):
        handle, name = tempfile.mkstemp(".tar", dir=temporary)
        os.close(handle)
        path = Path(name)
        store_of(url).get(url, path)
    listed = shard.tar.listed
    if listed is not None and not listed.is_now(store_of(url).entry(url), os.path.getsize(path)):
        raise changed(url, listed)
    return tuple(tars.index(path, url, shard.name))


def _fact(key: str, blob: Blob, root: str, sized: bool) -> str:
    """What identifies a file of the list wherever the source is mounted."""
    return f"{key}\0{blob.url.removeprefix(root)}\0{blob.size if sized else -1}"


def _hash(facts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for fact in sorted(facts):
        digest.update(fact.encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()


def _by_key(root: str, entries: Iterable[Entry], what: str) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for entry in entries:
        key = check_key(entry.name.rpartition(".")[0], root)
        if key in found:
            raise InputError(
                f"{root}: {found[key].name} and {entry.name} have one key; a {what} needs its own, rename one"
            )
        found[key] = entry
    return found


def _blob(root: str, entry: Entry) -> Blob:
    return Blob(joined(root, entry.name), entry.size, entry.stamp)


def _folder(root: str, entries: list[Entry]) -> list[Item]:
    masks = [e for e in entries if PurePosixPath(e.name).stem.lower().endswith(".mask")]
    beside = {key[: -len(".mask")]: entry for key, entry in _by_key(root, masks, "mask").items()}
    taken = {entry.name for entry in masks}
    pictures = _by_key(root, (e for e in entries if e.name not in taken), "picture")
    return [
        Item(key, entry.name, _blob(root, entry), _blob(root, beside[key]) if key in beside else None)
        for key, entry in pictures.items()
    ]


def _masks(masks: str) -> tuple[Blob | None, dict[str, Blob] | None]:
    """One mask for all, or masks by key."""
    kind = store_of(masks).kind(masks)
    if kind is None:
        raise InputError(f"there is no {masks}; expected --masks to be a picture or a folder of pictures")
    if kind == "file":
        return Blob(masks), None
    entries = [e for e in store_of(masks).listing(masks) if e.name.lower().endswith(_PICTURES)]
    return None, {key: _blob(masks, entry) for key, entry in _by_key(masks, entries, "mask").items()}


def _tars(found: list[tuple[str, Entry]], common: Blob | None, by_key: dict[str, Blob] | None) -> Source:
    if by_key is not None:
        raise InputError(
            "--masks is a folder and the source holds tars; pack KEY.mask.png beside KEY.jpg, or give one mask"
        )
    shards: list[Shard] = []
    names: dict[str, str] = {}
    count: int | None = 0
    for number, (url, entry) in enumerate(found):
        name = check_key(PurePosixPath(entry.name).stem, url)
        if (other := names.setdefault(name.lower(), url)) != url:
            raise InputError(f"{other} and {url} have one name, which begins the keys of a tar's pictures; rename one")
        shards.append(Shard(number, name, tar=Blob(url, entry.size, entry.stamp)))
        if is_remote(url):
            count = None  # listing it takes its whole transfer: that is its shard's first step
        elif count is not None:
            count += len(tars.index(Path(url), url, name))
    return Source("tars", shards, count, _hash(f"{s.name}\0{s.tar.size if s.tar else ''}" for s in shards), common)


def _table(url: str, suffix: str, columns: Columns) -> list[Item]:
    folder = url.rpartition("/" if is_remote(url) else os.sep)[0]

    def place(text: str) -> Blob:
        where = normal(text if is_remote(text) or os.path.isabs(text) else joined(folder, text))
        entry = None if is_remote(where) else store_of(where).entry(where)  # no request a row
        return Blob(where) if entry is None else Blob(where, entry.size, entry.stamp)

    found: dict[str, Item] = {}
    for number, row in enumerate(_rows(url, suffix, columns), 1):
        picture, mask, key = (row.get(name) for name in (columns.picture, columns.mask, columns.key))
        where = f"{url}, row {number}"
        if not isinstance(picture, str) or not picture or not isinstance(mask, str | None):
            raise InputError(
                f"{where}: expected text in column {columns.picture!r}, and in {columns.mask!r} text or nothing"
            )
        file = PurePosixPath(picture.partition("?")[0]).name
        key = check_key(PurePosixPath(file).stem if key is None or key == "" else str(key), where)
        if key in found:
            raise InputError(
                f"{where}: the key {key!r} comes twice in {url}; give each row its own in a column {columns.key!r}"
            )
        found[key] = Item(key, file, place(picture), place(mask) if mask else None)
    if not found:
        raise InputError(f"{url} has no rows; expected one a picture")
    return list(found.values())


def _rows(url: str, suffix: str, columns: Columns) -> Iterator[dict[str, object]]:
    data = store_of(url).read(url)
    if suffix == ".parquet":
        yield from _parquet_rows(url, data, columns)
        return
    try:
        text = data.decode("utf-8-sig")
        if suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            _check_columns(url, reader.fieldnames or [], columns)
            yield from reader
            return
        for number, line in enumerate(filter(str.strip, text.split("\n")), 1):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"row {number} is no object")
            _check_columns(url, list(row), columns)
            yield row
    except InputError:
        raise
    except (ValueError, csv.Error, RecursionError) as error:  # ValueError: also of UTF-8 and JSON
        raise InputError(f"{url} is not a whole {suffix} table in UTF-8 ({error}); write it again") from error


def _parquet_rows(url: str, data: bytes, columns: Columns) -> Iterator[dict[str, object]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RuntimeUnavailableError(f"{url} needs pyarrow. Install it: pip install 'moebius-edge[cloud]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        names = table.schema_arrow.names
        _check_columns(url, names, columns)
        wanted = [name for name in (columns.picture, columns.mask, columns.key) if name in names]
        for batch in table.iter_batches(columns=wanted):
            yield from batch.to_pylist()
    except InputError:
        raise
    except Exception as error:  # pyarrow's own classes
        raise InputError(f"{url} is not a whole parquet file ({str(error)[:200]}); write it again") from error


def _check_columns(url: str, names: Iterable[str], columns: Columns) -> None:
    there = list(names)
    if columns.picture not in there:
        listed = ", ".join(map(repr, there[:10])) or "none"
        raise InputError(
            f"{url} has no column {columns.picture!r} (its columns: {listed}); name the column of pictures with "
            "--url-column"
        )


__all__ = ["Columns", "Source", "StoreError", "items_of", "open_source"]
