"""onnxruntime-web, pinned by version and hashes: from a folder, or from the npm registry."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from moebius_export.errors import ExportError
from moebius_runtime.errors import InputError
from moebius_runtime.files import atomic_write, read_plain
from moebius_runtime.files.cache import cache_folder

VERSION = "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Of the package on npm, in npm's notation."""

FILES = {
    "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
    "ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
    "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
}
"""The build `/webgpu`, which holds the WebGPU provider and the CPU provider: file name in `dist`, SHA-256."""

REGISTRY = "https://registry.npmjs.org"
_MOST_BYTES = 64 << 20  # of the package, and of one file in it
_SECONDS = 60.0  # without a byte


def runtime_files(folder: Path | None = None) -> dict[str, bytes]:
    """Returns the content of the files that a site needs of onnxruntime-web.

    Args:
        folder: of the package (`node_modules/onnxruntime-web`) or its `dist`. None takes the copy in the user's cache
            folder, or downloads the package from the npm registry (`npm_config_registry`, else registry.npmjs.org).

    Raises:
        InputError: the folder lacks a file, or a file is of another version or damaged.
        ExportError: the package cannot be downloaded, or is not the pinned one.
    """
    if folder is not None:
        return _from_folder(folder)
    kept = cache_folder() / f"onnxruntime-web-{VERSION}"
    try:
        return _from_folder(kept)
    except InputError:  # not there yet, or damaged: it is fetched and written again
        files = _unpacked(_download(_registry()))
    kept.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with atomic_write(kept / name) as stream:
            stream.write(data)
    return files


def _from_folder(folder: Path) -> dict[str, bytes]:
    dist = folder / "dist" if (folder / "dist").is_dir() else folder
    files = {}
    for name, sha256 in FILES.items():
        try:
            data = read_plain(dist / name, _MOST_BYTES)
        except OSError as error:
            raise InputError(
                f"{dist / name}: {error.strerror}; expected the folder of onnxruntime-web {VERSION}, as "
                f"`npm install onnxruntime-web@{VERSION}` makes it"
            ) from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InputError(
                f"{dist / name} is not the file of onnxruntime-web {VERSION}: its SHA-256 differs. Install that version"
            )
        files[name] = data
    return files


def _registry() -> str:
    """The registry's address, by the variable that npm itself reads."""
    names = ("npm_config_registry", "NPM_CONFIG_REGISTRY")
    address = next((os.environ[name] for name in names if os.environ.get(name)), REGISTRY)
    if not address.startswith(("https://", "http://")):
        raise InputError(f"npm_config_registry is {address!r}; expected an address that begins with https://")
    return address.rstrip("/")


def _download(registry: str) -> bytes:
    address = f"{registry}/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
    instead = "Download it yourself (`npm pack`), unpack it, and give its folder with --onnxruntime-web"
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer:
            data: bytes = answer.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise ExportError(f"cannot download {address}: {reason}. {instead}") from error
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if f"sha512-{digest}" != INTEGRITY:
        raise ExportError(
            f"{address} is not the package that is expected ({len(data):,} bytes, its SHA-512 differs): it was damaged "
            f"or exchanged, and nothing of it was used. {instead}"
        )
    return data


def _unpacked(package: bytes) -> dict[str, bytes]:
    """The pinned files of the package, whose hash has been checked. Nothing is written."""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as archive:
        for name, sha256 in FILES.items():
            member = archive.extractfile(f"package/dist/{name}")
            data = b"" if member is None else member.read()
            if hashlib.sha256(data).hexdigest() != sha256:
                raise ExportError(f"the package onnxruntime-web {VERSION} holds another {name} than expected")
            files[name] = data
    return files
