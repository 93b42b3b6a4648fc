"""Pickled checkpoints, opened without running what they may carry, and the wrappers inside them."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from moebius.errors import CheckpointError, DamagedError
from moebius.sources import listed

FileKind = Literal["safetensors", "torch-zip", "torch-legacy"]

# Wrappers, outermost first in each list. Averaged weights go before plain ones where a file has both.
_EMA_KEYS = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema")
_PLAIN_KEYS = ("state_dict", "model_state_dict", "model", "module")
_EMA_PREFIXES = ("ema_model.", "model_ema.", "ema.")
_PLAIN_PREFIXES = ("module.", "_orig_mod.")
# What averaging programs store among the tensors.
_COUNTERS = ("decay", "num_updates", "n_averaged", "initted", "step")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# The VAE's attention as diffusers named it before 0.17.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(?<=\.attentions\.\d\.)(query|key|value|proj_attn)(?=\.(?:weight|bias)$)")
_MAX_DEPTH = 4


def file_kind(path: Path) -> FileKind:
    """What a weights file is, by its first bytes; by its name too for safetensors, which has no magic number.

    Raises:
        CheckpointError: it is empty or nothing that holds weights (`DamagedError`), a Git LFS pointer, or a tar
            archive.
    """
    with open(path, "rb") as stream:
        head = stream.read(512)
    if not head:
        raise DamagedError(f"{path} is empty; copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` where it came from")
    if head.startswith(b"PK\x03\x04"):
        if path.suffix == ".safetensors":  # torch.load goes by the name, too
            raise CheckpointError(f"{path} is a pickle by its content, not safetensors; rename it to end in .bin")
        return "torch-zip"
    if (path.suffix == ".safetensors" and head.lstrip()[:1] != b"<") or head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"\x80"):
        return "torch-legacy"
    if tarfile.is_tarfile(path):
        raise CheckpointError(
            f"{path} is a tar archive (PyTorch before 0.2, or a packed folder); unpack it, or save it again "
            "with today's torch.save"
        )
    if head.lstrip()[:1] == b"<":
        raise DamagedError(f"{path} is a web page, not weights; copy or download it again, from another address")
    raise DamagedError(
        f"{path} is neither a safetensors file nor a checkpoint of torch.save, or it is damaged; copy or download it "
        "again"
    )


def read_pickle(path: Path, kind: FileKind) -> object:
    """The object in a file of `torch.save`: containers and tensors only, nothing that it carries is run.

    A zip's checksums are verified first; its tensors stay on the disk until they are used.

    Raises:
        CheckpointError: the file carries code or other objects, or is damaged (`DamagedError`).
    """
    if kind == "torch-zip":
        _check_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch-zip")
    except Exception as error:  # a damaged pickle can raise anything: EOFError, KeyError, RecursionError, ...
        if wanted := re.search(r"(?:GLOBAL|unrecognized function) ([\w.]+|<[^>]*>)", str(error)):
            raise CheckpointError(
                f"{path} carries {wanted[1]}, that is code or an object other than tensors; nothing "
                "of it was run. Save the state dict alone, best as safetensors; delete a stranger's file"
            ) from error
        raise DamagedError(
            f"{path} is damaged or not a checkpoint of torch.save ({type(error).__name__}); copy or download it again"
        ) from error


def _check_zip(path: Path) -> None:
    """Refuse archives that torch.save did not write, and those whose content does not match its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = {entry.filename.rpartition("/")[2] for entry in entries}
            if "constants.pkl" in names:
                raise CheckpointError(f"{path} is a TorchScript program, not weights; save its state dict instead")
            if "data.pkl" not in names or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError(f"{path} is a zip archive, but not one of torch.save; unpack it first")
            if (damaged := archive.testzip()) is not None:
                raise DamagedError(f"{path} is damaged: the checksum of {damaged} does not hold; download it again")
    except CheckpointError:
        raise
    except Exception as error:  # BadZipFile; of odd headers also ValueError, NotImplementedError, ...
        raise DamagedError(
            f"{path} is damaged or cut short ({type(error).__name__}); copy or download it again"
        ) from error


def unwrap(content: object, path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dict inside what a file holds, and in words what was chosen or taken off on the way to it.

    Raises:
        CheckpointError: there is no state dict in it, or only averaged weights without names.
    """
    notes: list[str] = []
    for _ in range(_MAX_DEPTH):
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict, names to tensors")
        if "shadow_params" in content:
            raise CheckpointError(f"{path} holds averaged weights as a list without names; {_NAMELESS}")
        inner = next((key for key in _EMA_KEYS + _PLAIN_KEYS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        if "shadow_params" in content[inner]:
            content = _named_averages(content[inner]["shadow_params"], content, path)
            notes.append(f"EMA weights ({inner}.shadow_params, named after the plain weights of the same file)")
            break
        notes += [f"EMA weights ({inner!r})"] if inner in _EMA_KEYS else []
        content = content[inner]
    return _flat(content, path, notes), notes


_NAMELESS = "expected the plain weights beside them, of which they take the names, or a file with names"


def _named_averages(averages: Any, content: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """Averages that diffusers keeps in a list, under the names of the plain weights in the same file.

    The list has the order of the network's parameters, which is that of its state dict without the buffers.
    The buffers (batch-norm statistics) are not averaged; they are taken from the plain weights.
    """
    key = next((key for key in _PLAIN_KEYS if isinstance(content.get(key), Mapping)), None)
    plain = _flat(content[key], path, []) if key else {}
    names = [name for name in plain if name.rpartition(".")[2] not in _BUFFERS]
    shapes = [getattr(one, "shape", None) for one in averages] if isinstance(averages, list | tuple) else []
    if not names or shapes != [plain[name].shape for name in names]:
        raise CheckpointError(
            f"{path} holds {len(shapes)} averaged weights without names and {len(names)} plain ones, whose "
            f"shapes do not match in order; {_NAMELESS}"
        )
    return {**plain, **dict(zip(names, averages, strict=True))}


def _flat(content: object, path: Path, notes: list[str]) -> dict[str, torch.Tensor]:
    """A state dict without prefixes and counters; appends to `notes`."""
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds an empty or nested {type(content).__name__}; expected names to tensors")
    state = {str(name): value for name, value in content.items()}
    if "n_averaged" in state:  # torch.optim.swa_utils.AveragedModel
        notes.append("EMA weights (n_averaged)")
    for prefix in _EMA_PREFIXES + _PLAIN_PREFIXES:
        inside = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        inside = {name: value for name, value in inside.items() if name not in _COUNTERS}
        if inside and prefix in _EMA_PREFIXES:  # what lies beside it are the plain weights and counters
            notes.append(f"EMA weights ({prefix}*)")
            state = inside
        elif inside and all(name.startswith(prefix) or name in _COUNTERS for name in state):
            state = inside
    if others := [name for name in state if not isinstance(state[name], torch.Tensor)]:
        raise CheckpointError(f"{path}: {len(others)} entries are not tensors ({listed(others)}); {_STATE_DICT}")
    return {_OLD_NAME.sub(lambda match: _OLD_ATTENTION[match[1]], name): value for name, value in state.items()}


_STATE_DICT = f"expected a state dict, or one under {', '.join(_EMA_KEYS + _PLAIN_KEYS)}"
