"""The key of a picture decides its shard and its seed, so that results depend on neither machines nor their number."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping

from moebius_runtime.errors import InputError, one_line

MAX_KEY = 400  # characters; a file system's limit for one name is 255 bytes, and a name is one part of a key
_MAX_PART = 200  # bytes of UTF-8: suffixes and the temporary name of an atomic write fit beside it
CONTROL = "_moebius-batch"
"""Folder of the destination that holds the job's record and reports. No key begins with it."""


def check_key(key: str, where: str) -> str:
    """Returns the key after checking that, joined to a folder, it names a file inside of that folder.

    Args:
        key: parts joined by `/`, without a suffix.
        where: what holds the key, for the message.

    Raises:
        InputError: the key is empty, too long, absolute, has a part `.` or `..` or an empty or hidden one, or holds
            characters that some file systems or stores do not keep.
    """
    parts = key.split("/")
    reason = None
    if not key or len(key) > MAX_KEY or any(len(part.encode(errors="replace")) > _MAX_PART for part in parts):
        reason = f"it is empty, over {MAX_KEY} characters, or has a part over {_MAX_PART} bytes"
    elif any(part in ("", ".", "..") for part in parts):
        reason = "it leaves the folder of results, or has an empty part"
    elif any(part.startswith(".") or part != part.strip() or part.endswith(".") for part in parts):
        reason = "a part begins or ends with a dot or a space"
    elif re.search(r'[\\:*?"<>|]', key) or not key.isprintable():
        reason = 'it holds a control character or one of \\ : * ? " < > |'
    elif parts[0].lower() == CONTROL:
        reason = f"{CONTROL} is the folder of the job's own files"
    if reason:
        shown = one_line(key if len(key) <= 80 else f"{key[:80]}...")
        raise InputError(f"{where}: the key {shown!r} cannot name a result: {reason}; rename the picture")
    return key


def shard_of(key: str, shards: int) -> int:
    """The shard of a key, 0 to shards - 1: the first 64 bits of SHA-256 of "shard", NUL and the key, modulo shards."""
    return int.from_bytes(_digest("shard", key)[:8], "big") % shards


def seed_of(key: str, seed: int) -> int:
    """The seed of a picture, 32 bits: the first of SHA-256 of "seed", the job's seed and the key, joined by NUL."""
    return int.from_bytes(_digest(f"seed\0{seed}", key)[:4], "big")


def _digest(purpose: str, key: str) -> bytes:
    return hashlib.sha256(f"{purpose}\0{key}".encode()).digest()


def parse_share(text: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns (I, N) of `--shard I/N`, I from 1 to N; without one that of Slurm's job array, else (1, 1).

    In an array, I is (SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / SLURM_ARRAY_TASK_STEP + 1 and N is
    SLURM_ARRAY_TASK_COUNT.

    Raises:
        InputError: the text is not of this form, or the array's numbers are not a complete range.
    """
    if text is not None:
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise InputError(f"--shard {text}: expected I/N with 1 <= I <= N, such as 2/16")
        return int(found[1]), int(found[2])
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "COUNT", "STEP")]
    task, low, count, step = (environment.get(name) for name in names)
    if task is None or low is None or count is None:
        return 1, 1
    try:
        offset, odd = divmod(int(task) - int(low), int(step or 1))
        index, total = offset + 1, int(count)
    except (ValueError, ZeroDivisionError):
        index, total, odd = 0, 0, 1
    if odd or not 1 <= index <= total:
        raise InputError(
            f"task {task} of the Slurm array ({count} tasks from {low}) has no place in 1 to {count}: the array is "
            "not a complete range; give --shard I/N"
        )
    return index, total
