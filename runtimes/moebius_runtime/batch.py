"""Which pictures to fill with which masks: one of each, or folders paired by stem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from moebius_runtime.comparison import comparison_path
from moebius_runtime.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")


@dataclass(frozen=True)
class Job:
    """One picture, its mask, and where the result and the strip that compares them go."""

    image: Path
    mask: Path
    out: Path
    strip: Path | None = None

    @property
    def written(self) -> list[Path]:
        """Every file that the job writes."""
        return [self.out] if self.strip is None else [self.out, self.strip]


def plan_jobs(image: Path, mask: Path, out: Path, *, strips: bool = False) -> list[Job]:
    """The work that IMAGE, `--mask` and `--out` mean.

    A folder of pictures goes with one mask for all, or with a folder of masks whose stems are the pictures'. Results
    of a folder go to the folder `out` under the pictures' names, with a suffix that can be written; with `strips`,
    so do before | mask | after, as `NAME-comparison.png`.

    Raises:
        InputError: a path that is not there, a folder without pictures, two pictures or masks of one stem, pictures
            without a mask, or a result that would overwrite another, or a picture or a mask that is read.
    """
    try:
        jobs = _jobs(image, mask, out)
        if strips:
            jobs = [replace(job, strip=comparison_path(job.out)) for job in jobs]
        taken = {path.resolve() for job in jobs for path in (job.image, job.mask)}
        for path in (path for job in jobs for path in job.written):
            if path.resolve() in taken:
                raise InputError(
                    f"{path} would overwrite a picture or mask that is read, or another result; choose another --out"
                )
            taken.add(path.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in a name; links in a circle, before Python 3.13
        reason = getattr(error, "strerror", None) or error
        where = getattr(error, "filename", None) or f"{image}, --mask {mask} or --out {out}"
        raise InputError(f"cannot read {where}: {reason}; name readable files or folders") from error
    return jobs


def _jobs(image: Path, mask: Path, out: Path) -> list[Job]:
    for path, what in ((image, "picture"), (mask, "mask")):
        if not path.exists():
            raise InputError(f"there is no {what} at {path}; expected a file or a folder")
    if not image.is_dir():
        if mask.is_dir():
            raise InputError(f"--mask {mask} is a folder and {image} one picture; name the picture's mask")
        return [Job(image, mask, out / _result_name(image) if out.is_dir() else out)]
    if out.is_file():
        raise InputError(f"--out {out} is a file and {image} a folder; name a folder for the results")
    pictures = _by_stem(image, "picture")
    masks = _by_stem(mask, "mask") if mask.is_dir() else dict.fromkeys(pictures, mask)
    if without := sorted(pictures[stem].name for stem in pictures.keys() - masks.keys()):
        listed = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        raise InputError(f"no mask in {mask} for {listed}; a mask has its picture's name, with any suffix")
    return [Job(path, masks[stem], out / _result_name(path)) for stem, path in sorted(pictures.items())]


def _by_stem(folder: Path, what: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or not path.is_file() or path.name.startswith("."):
            continue
        if path.stem in found:
            raise InputError(
                f"{found[path.stem]} and {path.name} have one stem; a {what} is found by it, so rename one"
            )
        found[path.stem] = path
    if not found:
        raise InputError(f"no {what} in {folder}; expected files that end in {', '.join(SUFFIXES)}")
    return found


def _result_name(image: Path) -> str:
    return image.name if image.suffix.lower() not in (".bmp", ".gif") else f"{image.stem}.png"
