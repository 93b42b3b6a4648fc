"""Checkpoints of the student, the teacher and the VAE: fetched, checked, and kept as safetensors.

A pickle is opened once, without running what it may carry. When its tensors fit the network they are written
to the cache as safetensors, under the pickle's SHA-256 and with their own SHA-256 beside them; later runs
read only that.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moebius import hub
from moebius.errors import CheckpointError, DamagedError, MisfitError
from moebius.hub_cache import blob_of
from moebius.locate import locate
from moebius.pickles import file_kind, read_pickle, unwrap
from moebius.sources import HubSource, LocatedFile, Progress, StandInSource, listed, parse_source
from moebius.stand_in import TensorSpec, stand_in_state_dict

__all__ = ["Checkpoint", "CheckpointError", "TensorSpec", "load_checkpoint", "load_config"]

_LISTED = 20
_MAX_CONFIG = 1 << 20
_FORMAT = "weights-v1"  # names the cache's folder; a change to what `unwrap` picks needs a new one
_RAISED = (torch.float16, torch.bfloat16)  # to float32, which holds every value of both


@dataclass(frozen=True)
class Checkpoint:
    """A state dict that fits its network, and where it came from.

    `sha256` is that of the safetensors file read; for stand-in weights, of their names, shapes, dtypes and
    values.
    """

    state_dict: dict[str, torch.Tensor]
    sha256: str
    origin: str
    stand_in: bool


def load_checkpoint(
    source: str,
    expected: Mapping[str, TensorSpec],
    *,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """The weights that `source` names, in the order of `expected`, with exactly its names, shapes and dtypes.

    `source` is the name of released weights (`moebius.sources.RELEASED`), `hub:OWNER/REPO[/FOLDER][@REVISION]`, a
    local file or folder, `shipped:NAME`, or `stand-in[:SEED]`. A hub's file that arrives or lies in the cache damaged
    is downloaded again, once.
    float16 and bfloat16 are raised to float32 where that is expected. Averaged (EMA) weights are taken where there
    are any. Both are said in `origin`. `cache_dir` is where conversions are kept (default: see
    `cache_folder`). `progress` is called with a line of text before each step that takes time.

    Raises:
        CheckpointError: not found, cannot be fetched, ambiguous, damaged, carries code, does not fit
            `expected` (`MisfitError`; all that does not is named), holds values that are not finite, or the cache
            cannot be written.
    """
    parsed, say = parse_source(source), progress or (lambda _: None)
    if isinstance(parsed, StandInSource):
        say(f"drawing stand-in weights, seed {parsed.seed}")
        drawn = stand_in_state_dict(expected, parsed.seed)
        return Checkpoint(drawn, _hash_tensors(drawn), f"stand-in:{parsed.seed}", stand_in=True)
    located = locate(source, progress)
    folder = _weights_folder(cache_dir)
    try:
        try:
            tensors, digest, notes = _read(located, expected, folder, say)
        except DamagedError:
            if not isinstance(parsed, HubSource):
                raise
            located = replace(located, path=hub.fetch_again(parsed, located.path, progress))
            tensors, digest, notes = _read_again(located, expected, folder, say)
    except OSError as error:
        raise CheckpointError(f"cannot read {located.path}: {error.strerror or error}; check the file") from error
    say(f"checking {len(tensors)} tensors")
    state_dict, raised = _fit(tensors, expected, located.path)
    return Checkpoint(state_dict, digest, "; ".join([located.origin, *notes, *raised]), stand_in=False)


def load_config(source: str, name: str = "config.json", progress: Progress | None = None) -> dict[str, Any] | None:
    """The JSON object in the file `name` beside the weights of `source`; None if there is no such file.

    Raises:
        CheckpointError: it cannot be fetched or read, is over 1 MiB, or is not a JSON object.
    """
    parsed = parse_source(source)
    if isinstance(parsed, StandInSource):
        return None
    try:
        if isinstance(parsed, HubSource):
            path = hub.fetch_file(parsed, name, progress)
        else:
            path = (parsed.path if parsed.path.is_dir() else parsed.path.parent) / name
        if path is None or not path.exists():
            return None
        try:
            return _read_config(path)
        except DamagedError:
            if not isinstance(parsed, HubSource) or hub.offline():
                raise
            return _read_config(hub.fetch_again(parsed, path, progress))
    except OSError as error:
        raise CheckpointError(f"cannot read {name} of {source}: {error.strerror or error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        DamagedError: it is none.
    """
    if not path.is_file() or path.stat().st_size > _MAX_CONFIG:
        raise DamagedError(f"{blob_of(path)} is not a file of at most 1 MiB; expected a small JSON object")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, nested too deeply
        raise DamagedError(
            f"{blob_of(path)} is not JSON ({error}); copy or download it again, or delete it: {path.name} is optional"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content


def cache_folder() -> Path:
    """Where conversions are kept: `MOEBIUS_CACHE`, else `moebius-edge` in the user's cache folder."""
    if chosen := os.environ.get("MOEBIUS_CACHE"):
        return Path(chosen)
    try:
        if os.name == "nt":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or "")
            if not base.is_absolute():  # the standard says to ignore a relative one
                base = Path.home() / ".cache"
    except RuntimeError as error:
        raise CheckpointError(f"no home folder to keep weights in ({error}); set MOEBIUS_CACHE to a folder") from error
    return base / "moebius-edge"


def _weights_folder(cache_dir: str | Path | None) -> Path:
    return (Path(cache_dir) if cache_dir is not None else cache_folder()) / _FORMAT


def _read(
    located: LocatedFile, expected: Mapping[str, TensorSpec], folder: Path, say: Progress
) -> tuple[dict[str, torch.Tensor], str, list[str]]:
    """The tensors of a weights file, the SHA-256 of the safetensors that they come from, and notes.

    Raises:
        DamagedError: its SHA-256 is not the published one, or none was published and it cannot be read.
        CheckpointError: as `load_checkpoint`.
    """
    path = located.path
    say(f"hashing {path.name}")
    digest = _hash_file(path)
    sidecar = _sidecar(path)
    published = located.sha256 or (_read_sidecar(sidecar) if sidecar.is_file() else digest)
    if published != digest:
        raise DamagedError(
            f"{blob_of(path)} is damaged: its SHA-256 is {digest[:16]}..., but {(published or 'no hash')[:16]}... was "
            "published with it; delete it and copy or download it again"
        )
    try:
        return _opened(path, digest, expected, folder, say)
    except DamagedError as error:
        if located.sha256 is None:
            raise
        raise CheckpointError(f"{error}; it was published so (the SHA-256 holds), name another revision") from error


def _read_again(
    located: LocatedFile, expected: Mapping[str, TensorSpec], folder: Path, say: Progress
) -> tuple[dict[str, torch.Tensor], str, list[str]]:
    """`_read` of a file that was just downloaded a second time.

    Raises:
        CheckpointError: as `_read`, with what is left to do.
    """
    try:
        return _read(located, expected, folder, say)
    except DamagedError as error:
        what = str(error).rpartition("; ")[0]  # without what to do about a local file
        raise CheckpointError(
            f"{what}; it came damaged in a second download too, {hub.endpoint()} or a proxy changes it. Set "
            "HF_ENDPOINT to another mirror, or unset it, and run again, which downloads it again; or name a local copy"
        ) from error


def _opened(
    path: Path, digest: str, expected: Mapping[str, TensorSpec], folder: Path, say: Progress
) -> tuple[dict[str, torch.Tensor], str, list[str]]:
    """As `_read`, of a file with a known SHA-256."""
    kind = file_kind(path)
    if kind == "safetensors":
        tensors, notes = unwrap(_read_safetensors(path)[0], path)
        return tensors, digest, notes
    kept = folder / f"{digest}.safetensors"
    kept_digest = _verified(kept, say)
    if kept_digest is None:
        say(f"opening {path.name}, for the first and only time")
        tensors, notes = unwrap(read_pickle(path, kind), path)
        _fit(tensors, expected, path)  # what does not fit is not kept
        say(f"keeping it as safetensors in {folder}")
        kept_digest = _keep(tensors, kept, "; ".join(notes))
    tensors, metadata = _read_safetensors(kept)
    return tensors, kept_digest, [metadata["notes"]] if metadata.get("notes") else []


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # SafetensorError, and what torch raises for a header that it cannot honour
        raise DamagedError(
            f"{path} is damaged or not a safetensors file ({error}); copy or download it again"
        ) from error


def _fit(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, TensorSpec], path: Path
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """`tensors` in the order and dtypes of `expected`, and a note if some were raised to float32."""
    if faults := _faults(tensors, expected):
        lines = [f"{len(names)} {kind} ({listed(names, _LISTED)})" for kind, names in faults.items()]
        raise MisfitError(
            f"{path} does not fit a network of {len(expected)} tensors: {'; '.join(lines)}. "
            "Check that the file and the chosen network belong together",
            faults.get("unexpected", []),
        )
    raised = sum(tensors[name].dtype != dtype for name, (_, dtype) in expected.items())
    fitted = {name: tensors[name].detach().to(dtype).contiguous() for name, (_, dtype) in expected.items()}
    endless = [name for name, tensor in fitted.items() if not bool(torch.isfinite(tensor).all())]
    if endless:
        raise CheckpointError(
            f"{path}: {len(endless)} tensors hold NaN or infinite values ({listed(endless, _LISTED)}); "
            "the file is damaged or its training diverged, use another"
        )
    return fitted, [f"{raised} half-precision tensors raised to float32"] if raised else []


def _faults(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
    """Everything that keeps `tensors` from being a state dict of `expected`, by kind. Reads no values."""
    faults: dict[str, list[str]] = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of wrong shape": [],
        "of wrong dtype": [],
        "not dense tensors on the CPU": [],
    }
    for name, (shape, dtype) in expected.items():
        if (tensor := tensors.get(name)) is None:
            continue
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            faults["not dense tensors on the CPU"].append(name)
        elif tuple(tensor.shape) != tuple(shape):
            faults["of wrong shape"].append(f"{name} {list(tensor.shape)}, expected {list(shape)}")
        elif tensor.dtype != dtype and not (dtype == torch.float32 and tensor.dtype in _RAISED):
            faults["of wrong dtype"].append(f"{name} {_name(tensor.dtype)}, expected {_name(dtype)}")
    return {kind: names for kind, names in faults.items() if names}


def _keep(tensors: Mapping[str, torch.Tensor], target: Path, notes: str) -> str:
    """Write a conversion and then its hash, which vouches for it; each whole or not at all."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():  # safetensors has no shared storage
        shared = (pointer := tensor.untyped_storage().data_ptr()) in seen
        seen.add(pointer)
        apart[name] = tensor.detach().clone() if shared else tensor.detach().contiguous()
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # One entry only: safetensors writes several in random order, and equal weights need equal hashes.
        save_file(apart, part, metadata={"notes": notes})
        digest = _hash_file(part)
        _move(part, target)
        part.write_text(f"{digest}  {target.name}\n", encoding="ascii")
        _move(part, _sidecar(target))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot keep the converted weights in {target.parent}: {reason}; free some space, or set "
            "MOEBIUS_CACHE to a folder that can be written"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return digest


def _move(part: Path, target: Path) -> None:
    """Put a finished file in its place, its bytes on the disk before its name."""
    with open(part, "rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(part, target)


def _verified(kept: Path, say: Progress) -> str | None:
    """The SHA-256 of a kept conversion that is still what was written; None where it has to be made."""
    sidecar = _sidecar(kept)
    if not (kept.is_file() and sidecar.is_file()):
        return None
    digest = _hash_file(kept)
    if digest == _read_sidecar(sidecar):
        return digest
    say(f"the kept conversion {kept} is damaged (its SHA-256 is not the one beside it); making it anew")
    return None


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _read_sidecar(path: Path) -> str | None:
    """The hash in a file as `sha256sum` writes it, or None if it holds none."""
    with open(path, "rb") as stream:
        match = re.match(rb"([0-9a-fA-F]{64})(?:\s|$)", stream.read(80))
    return match[1].decode().lower() if match else None


def _hash_file(path: Path) -> str:
    digest = sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # [bytes]
    return digest.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
