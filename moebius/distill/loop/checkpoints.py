"""Checkpoints of a run: all state of the next step, in a folder that is written atomically.

    OUT/checkpoints/step-00001200/
      state.json            step, settings, and the state of optimizer, schedule and scaler without tensors
      network.safetensors   weights and buffers in training
      average.safetensors   the averaged ones (EMA), where there are any
      optimizer.safetensors momenta, by parameter name
      rank-0.safetensors    states of the random generators of each process
      rank-0.json           its position in the data

Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moebius.distill.loop.sharding import spread_as, whole
from moebius.errors import TrainingError

_NAME = re.compile(r"step-([0-9]{8})")
_PART = re.compile(r"\.part-[0-9a-f]{16}")
_SCHEMA = 1


@dataclass
class RankState:
    """One process' part: generator states (uint8 tensors by name) and its position in the data."""

    generators: dict[str, Tensor] = field(default_factory=dict)
    position: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunState:
    """The part that all processes share. `numbers` is JSON: step, settings, schedule, scaler, optimizer's options."""

    numbers: dict[str, Any]
    network: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor] | None = None


def folder_of(out: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return out / "checkpoints" / f"step-{step:08d}"


def latest(out: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    return max(_all(out), default=None)


def write_rank(part: Path, rank: int, state: RankState) -> None:
    """Writes one process' part into the folder that `begin` made.

    Raises:
        TrainingError: the disk is full or not writable.
    """
    try:
        _save_tensors(state.generators, part / f"rank-{rank}.safetensors")
        _save_json(state.position, part / f"rank-{rank}.json")
    except (OSError, SafetensorError) as error:
        raise _unwritable(part, error) from error


def begin(out: Path) -> Path:
    """Creates a folder under a temporary name for a new checkpoint; removes leftovers of killed runs.

    Only one run may write to `out`, and only its main process calls this.

    Raises:
        TrainingError: it cannot be made.
    """
    parent = out / "checkpoints"
    part = _temporary(parent)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for path in parent.iterdir():
            if _PART.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
        part.mkdir()
    except OSError as error:
        raise _unwritable(parent, error) from error
    return part


def finish(part: Path, out: Path, step: int, state: RunState, keep: int) -> Path:
    """Writes the shared part, renames the folder to its final name, and removes all but the last `keep`.

    Raises:
        TrainingError: the disk is full or not writable. The checkpoints before are untouched.
    """
    target = folder_of(out, step)
    try:
        _save_tensors(state.network, part / "network.safetensors")
        _save_tensors(state.optimizer, part / "optimizer.safetensors")
        if state.average is not None:
            _save_tensors(state.average, part / "average.safetensors")
        _save_json(state.numbers | {"schema_version": _SCHEMA}, part / "state.json")
        if target.exists():
            remove(target)  # of a run that was resumed from an earlier checkpoint
        os.replace(part, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise _unwritable(target, error) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(part)
    for old in sorted(_all(out))[:-keep]:
        remove(old)
    return target


def remove(folder: Path) -> None:
    """Removes a checkpoint or temporary folder, ignoring errors.

    The folder is renamed to a temporary name first, so an interruption leaves no half checkpoint.
    """
    doomed = _temporary(folder.parent)
    with suppress(OSError):
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def read(folder: Path, rank: int) -> tuple[RunState, RankState]:
    """Reads a checkpoint for one process.

    Raises:
        TrainingError: a file is missing, damaged, or of another version.
    """
    try:
        numbers = json.loads((folder / "state.json").read_text("utf-8"))
        if not isinstance(numbers, dict) or numbers.get("schema_version") != _SCHEMA:
            raise TrainingError(f"{folder} is a checkpoint of another version; expected schema_version {_SCHEMA}")
        if not (folder / f"rank-{rank}.json").exists():
            raise TrainingError(f"{folder} has no part for process {rank}; go on with as many processes as before")
        average = folder / "average.safetensors"
        shared = RunState(
            numbers,
            load_file(folder / "network.safetensors"),
            load_file(folder / "optimizer.safetensors"),
            load_file(average) if average.exists() else None,
        )
        position = json.loads((folder / f"rank-{rank}.json").read_text("utf-8"))
        return shared, RankState(load_file(folder / f"rank-{rank}.safetensors"), position)
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(
            f"{folder} is damaged ({error}); remove it, and the run goes on from the one before"
        ) from error


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[Any]]:
    """Whole tensors as `PARAMETER/NAME`, and the groups' options as JSON with parameter names in place of numbers."""
    names = _names(network, optimizer)
    state = optimizer.state_dict()
    held = {f"{names[index]}/{key}": value for index, kept in state["state"].items() for key, value in kept.items()}
    if loose := [name for name, value in held.items() if not isinstance(value, Tensor)]:
        raise TrainingError(f"the optimizer's state has no tensor at {loose[0]}; it cannot be kept")
    tensors = {name: whole(value) for name, value in held.items()}
    groups = [group | {"params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    return tensors, groups


def load_optimizer(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[Any]
) -> None:
    """Restores the state from `optimizer_state`.

    Raises:
        TrainingError: they are of another network.
    """
    names = _names(network, optimizer)
    numbers = {name: index for index, name in names.items()}
    parameters = dict(network.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    try:
        for name, value in tensors.items():
            parameter, key = name.rsplit("/", 1)
            like = parameters[parameter] if value.ndim else value  # a momentum has its parameter's rows, a step none
            state.setdefault(numbers[parameter], {})[key] = spread_as(value, like)
        restored = [
            {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
            | {"params": [numbers[name] for name in group["params"]]}
            for group in groups
        ]
        optimizer.load_state_dict({"state": state, "param_groups": restored})
    except (KeyError, ValueError) as error:
        raise TrainingError(f"the checkpoint's optimizer is of another network ({error})") from error


def _names(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Number of a parameter in the optimizer's state dict -> its name in the network."""
    known = {id(parameter): name for name, parameter in network.named_parameters()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {index: known[id(parameter)] for index, parameter in enumerate(ordered)}


def _temporary(parent: Path) -> Path:
    return parent / f".part-{secrets.token_hex(8)}"


def _all(out: Path) -> list[Path]:
    folder = out / "checkpoints"
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    _sync(path)


def _save_json(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Flushes a file or folder to the disk. Windows flushes only what is open for writing, and no folders."""
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(path: Path, error: Exception) -> TrainingError:
    reason = getattr(error, "strerror", None) or error
    return TrainingError(f"cannot write {path}: {reason}; free some space or choose another folder")
