"""Pairs pictures with masks: a picture with its mask, or the files of two folders by their stems."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path, PurePath

from moebius_runtime.errors import InputError
from moebius_runtime.images.comparison import comparison_path

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif")
HEIF_SUFFIXES = (".heic", ".heif")
"""Read where the package pillow-heif (extra `heif`) is installed."""

STREAM = Path("-")
"""Stands for standard input or output."""

# What is skipped in a folder: (singular, plural) of each kind.
_HEIF_HINT = '(`pip install "moebius-edge[heif]"` to read HEIC)'
_KINDS = {
    "folder": ("sub-folder (--recursive enters it)", "sub-folders (--recursive enters them)"),
    "link": ("linked or hidden sub-folder", "linked or hidden sub-folders"),
    "locked": ("sub-folder that cannot be read", "sub-folders that cannot be read"),
    "heif": (f"HEIC picture {_HEIF_HINT}", f"HEIC pictures {_HEIF_HINT}"),
    "other": ("file that is no picture by its suffix", "files that are no pictures by their suffix"),
    "hidden": ("hidden file", "hidden files"),
    "mask": ("mask without a picture", "masks without a picture"),
}
_WRITTEN_AS_PNG = (".bmp", ".gif", *HEIF_SUFFIXES)


@dataclass(frozen=True)
class Job:
    """One picture, its mask, and the paths of the result and of the comparison strip."""

    image: Path
    mask: Path
    out: Path
    strip: Path | None = None

    @property
    def written(self) -> list[Path]:
        """Every file that the job writes."""
        return [path for path in (self.out, self.strip) if path is not None and path != STREAM]


@dataclass(frozen=True)
class Plan:
    """The jobs, and a note on files of the folders that were skipped, or None."""

    jobs: list[Job]
    note: str | None = None


def plan_jobs(image: Path, mask: Path, out: Path, *, strips: bool = False) -> list[Job]:
    """The jobs of `plan`."""
    return plan(image, mask, out, strips=strips).jobs


def plan(image: Path, mask: Path, out: Path, *, strips: bool = False, recursive: bool = False) -> Plan:
    """Returns the jobs that IMAGE, `--mask` and `--out` stand for.

    A folder of pictures takes one mask for all, or a folder of masks with the pictures' stems. Its results go to the
    folder `out` under the pictures' names, with a suffix that can be written. `strips` adds before | mask | after, as
    `NAME-comparison.png`. `recursive` enters sub-folders, except links, and mirrors them in `out`; masks are then
    expected in the same sub-folders.

    Raises:
        InputError: a path does not exist, a folder holds no pictures, two pictures or masks that are paired share a
            stem, a picture has no mask, or a result would be outside of `out` or overwrite another result, a picture
            or a mask.
    """
    try:
        planned = _plan(image, mask, out, recursive)
        jobs = planned.jobs
        if strips:
            if out == STREAM:
                raise InputError("--save-comparison has no place beside --out -; name a file for the result")
            names = Counter(comparison_path(job.out) for job in jobs)
            jobs = [
                replace(job, strip=comparison_path(job.out, whole=names[comparison_path(job.out)] > 1)) for job in jobs
            ]
        taken = {path.resolve() for job in jobs for path in (job.image, job.mask) if path != STREAM}
        for path in (path for job in jobs for path in job.written):
            if path.resolve() in taken:
                raise InputError(
                    f"{path} would overwrite a picture or mask that is read, or another result; choose another --out"
                )
            taken.add(path.resolve())
        if image.is_dir():
            _check_inside(jobs, out)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in a name; a loop of links, before Python 3.13
        reason = getattr(error, "strerror", None) or error
        where = getattr(error, "filename", None) or f"{image}, --mask {mask} or --out {out}"
        raise InputError(f"cannot read {where}: {reason}; name readable files or folders") from error
    return replace(planned, jobs=jobs)


def _check_inside(jobs: list[Job], out: Path) -> None:
    """Refuses results that a link in the output folder would write elsewhere."""
    root = out.resolve()
    for folder in {path.parent for job in jobs for path in job.written}:
        if not folder.resolve().is_relative_to(root):
            raise InputError(f"{folder} is a link that leaves --out {out}; remove it, or choose another --out")


def _plan(image: Path, mask: Path, out: Path, recursive: bool) -> Plan:
    if image == mask == STREAM:
        raise InputError(
            "IMAGE and --mask are both '-', and standard input holds one of them; name a file for the other"
        )
    for path, what in ((image, "picture"), (mask, "mask")):
        if path != STREAM and not path.exists():
            raise InputError(f"there is no {what} at {path}; expected a file or a folder")
    if image == STREAM or not image.is_dir():
        if mask != STREAM and mask.is_dir():
            what = "a picture from standard input" if image == STREAM else f"{image} one picture"
            raise InputError(f"--mask {mask} is a folder and {what}; name the picture's mask")
        if out != STREAM and out.is_dir():
            if image == STREAM:
                raise InputError(f"--out {out} is a folder; name a file for the picture from standard input")
            out = out / result_name(image)
        return Plan([Job(image, mask, out)])
    if out == STREAM or out.is_file():
        what = "one stream" if out == STREAM else "a file"
        raise InputError(f"--out {out} is {what} and {image} a folder; name a folder for the results")
    skipped: Counter[str] = Counter()
    own = {path.resolve() for path in (out, mask) if path != STREAM}  # they may be inside the folder of pictures
    pictures = _files(image, "picture", recursive, skipped, own - {image.resolve()})
    if mask == STREAM or not mask.is_dir():
        pictures = [path for path in pictures if path.resolve() != mask.resolve()] if mask != STREAM else pictures
        masks = dict.fromkeys(pictures, mask)
    else:
        by_stem = _by_stem(image, pictures, "picture")
        there = _by_stem(mask, _files(mask, "mask", recursive, Counter(), own - {mask.resolve()}), "mask")
        if without := sorted(str(path.relative_to(image)) for stem, path in by_stem.items() if stem not in there):
            listed = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
            raise InputError(f"no mask in {mask} for {listed}; a mask has its picture's name, with any suffix")
        masks = {path: there[stem] for stem, path in by_stem.items()}
        if unused := len(there.keys() - by_stem.keys()):
            skipped["mask"] = unused
    results = _results(image, pictures)
    return Plan([Job(path, masks[path], out / results[path]) for path in pictures], _note(image, skipped))


def _files(folder: Path, what: str, recursive: bool, skipped: Counter[str], apart: set[Path]) -> list[Path]:
    """Returns the pictures of a folder, and counts everything else in `skipped` by kind.

    Links to folders are not entered: they could lead out of the folder or form a loop.
    """
    known = SUFFIXES + (HEIF_SUFFIXES if find_spec("pillow_heif") else ())
    found = []
    for place, folders, names in os.walk(folder, onerror=_unreadable(folder, skipped)):
        here = Path(place)
        inner = sorted(name for name in folders if (here / name).resolve() not in apart)
        entered = [name for name in inner if recursive and not (here / name).is_symlink() and name[0] != "."]
        for name in inner:
            if name not in entered:
                skipped["link" if recursive or (here / name).is_symlink() or name[0] == "." else "folder"] += 1
        folders[:] = entered
        for path in (here / name for name in sorted(names)):
            suffix = path.suffix.lower()
            if path.name.startswith("."):
                skipped["hidden"] += 1
            elif suffix in known and path.is_file():
                found.append(path)
            elif suffix in HEIF_SUFFIXES:
                skipped["heif"] += 1
            else:
                skipped["other"] += 1
    if not found:
        note = _note(folder, skipped)
        suffixes = ", ".join(SUFFIXES)
        raise InputError(f"no {what} in {folder}; expected files that end in {suffixes}{f' ({note})' if note else ''}")
    return sorted(found)


def _unreadable(folder: Path, skipped: Counter[str]) -> Callable[[OSError], None]:
    """Handler of `os.walk` for unreadable folders: raises for the named folder, counts sub-folders."""

    def handle(error: OSError) -> None:
        if error.filename == str(folder):
            raise error
        skipped["locked"] += 1

    return handle


def _by_stem(folder: Path, paths: list[Path], what: str) -> dict[Path, Path]:
    """{path in the folder without suffix: path}."""
    found: dict[Path, Path] = {}
    for path in paths:
        stem = path.relative_to(folder).with_suffix("")
        if stem in found:
            raise InputError(f"{found[stem]} and {path.name} have one stem; a {what} is found by it, so rename one")
        found[stem] = path
    return found


def _results(folder: Path, pictures: list[Path]) -> Mapping[Path, Path]:
    """{picture: path of its result in the output folder}. Where two names would collide, the old suffix is kept."""
    plain = {path: path.relative_to(folder).with_name(result_name(path)) for path in pictures}
    count = Counter(plain.values())
    return {
        path: name if count[name] == 1 or name.name == path.name else name.with_name(f"{path.name}.png")
        for path, name in plain.items()
    }


def _note(folder: Path, skipped: Counter[str]) -> str | None:
    """One sentence on what was skipped."""
    parts = [
        f"{skipped[kind]} {one if skipped[kind] == 1 else more}"
        for kind, (one, more) in _KINDS.items()
        if skipped[kind]
    ]
    return f"{folder}: left out: {', '.join(parts)}" if parts else None


def result_name(image: PurePath) -> str:
    """The name of a picture's result: its own, with the suffix `.png` where its format is read but not written."""
    return image.name if image.suffix.lower() not in _WRITTEN_AS_PNG else f"{image.stem}.png"
