"""Files and folders: read only where they are plain, written whole or not at all, kept in the user's cache."""

from moebius_runtime.files.folders import link_file, placed_whole
from moebius_runtime.files.reading import MappedFile, native_path, open_plain, read_plain, sha256_file
from moebius_runtime.files.writing import atomic_write, check_writable

__all__ = [
    "MappedFile",
    "atomic_write",
    "check_writable",
    "link_file",
    "native_path",
    "open_plain",
    "placed_whole",
    "read_plain",
    "sha256_file",
]
