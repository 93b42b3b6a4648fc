"""Which pictures go with which masks, and where results go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moebius_runtime.commands import pairing
from moebius_runtime.commands.pairing import Job, plan, plan_jobs
from moebius_runtime.errors import InputError


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def refusal(*paths: Path, strips: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        plan_jobs(*paths, strips=strips)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_picture(tmp_path):
    here = touch(tmp_path, "a.jpg", "m.png")
    image, mask, out = here / "a.jpg", here / "m.png", here / "b.png"
    assert plan_jobs(image, mask, out) == [Job(image, mask, out)]
    (job,) = plan_jobs(image, mask, out, strips=True)
    assert job == Job(image, mask, out, here / "b-comparison.png")
    assert job.written == [out, here / "b-comparison.png"]


def test_one_picture_into_a_folder(tmp_path):
    here = touch(tmp_path, "a.jpg", "anim.gif", "m.png")
    out = touch(tmp_path / "out")
    assert plan_jobs(here / "a.jpg", here / "m.png", out)[0].out == out / "a.jpg"
    assert plan_jobs(here / "anim.gif", here / "m.png", out)[0].out == out / "anim.png"  # GIF is not written


def test_a_folder_with_one_mask_for_all(tmp_path):
    images = touch(tmp_path / "in", "b.PNG", "a.jpg", "c.bmp", "notes.txt", ".hidden.png", "Thumbs.db")
    touch(images / "sub.png")  # a folder with the name of a picture
    mask = touch(tmp_path, "m.png") / "m.png"
    out = tmp_path / "out"
    assert plan_jobs(images, mask, out) == [
        Job(images / "a.jpg", mask, out / "a.jpg"),
        Job(images / "b.PNG", mask, out / "b.PNG"),
        Job(images / "c.bmp", mask, out / "c.png"),
    ]
    assert not out.exists()  # planning makes nothing


def test_a_folder_with_masks_by_stem(tmp_path):
    images = touch(tmp_path / "in", "a.jpg", "b.tiff")
    masks = touch(tmp_path / "masks", "b.webp", "a.png", "more.png")
    jobs = plan_jobs(images, masks, tmp_path / "out")
    assert [(job.image.name, job.mask.name, job.out.name) for job in jobs] == [
        ("a.jpg", "a.png", "a.jpg"),
        ("b.tiff", "b.webp", "b.tiff"),
    ]


def test_refusals(tmp_path):
    images = touch(tmp_path / "in", "a.jpg", "b.jpg")
    masks = touch(tmp_path / "masks", "a.png")
    mask, out = masks / "a.png", tmp_path / "out"
    empty = touch(tmp_path / "empty", "notes.txt")
    assert "there is no picture at" in refusal(tmp_path / "no.jpg", mask, out)
    assert "there is no mask at" in refusal(images, tmp_path / "no.png", out)
    assert "is a folder and" in refusal(images / "a.jpg", masks, out)
    assert "no mask in" in refusal(images, masks, out)
    assert "for b.jpg;" in refusal(images, masks, out)
    assert f"no picture in {empty}" in refusal(empty, mask, out)
    assert f"no mask in {empty}" in refusal(images, empty, out)
    assert "is a file and" in refusal(images, mask, mask)
    touch(images, "a.png")
    assert "a.jpg and a.png have one stem" in refusal(images, masks, out)


def test_many_missing_masks_are_counted(tmp_path):
    images = touch(tmp_path / "in", *(f"{index}.jpg" for index in range(9)))
    message = refusal(images, touch(tmp_path / "masks", "0.png"), tmp_path / "out")
    assert "for 1.jpg, 2.jpg, 3.jpg, 4.jpg, 5.jpg and 3 more;" in message


def test_results_never_replace_what_is_read(tmp_path):
    here = touch(tmp_path, "a.png", "m.png", "b-comparison.png")
    image, mask = here / "a.png", here / "m.png"
    (here / "link.png").symlink_to(mask)
    for out in (image, mask, here / "sub" / ".." / "m.png", here / "link.png", here):
        touch(here / "sub")
        assert "would overwrite" in refusal(image, mask, out)
    images = touch(tmp_path / "in", "m.png", "x.png")
    assert "would overwrite" in refusal(images, mask, images)
    # the strip is a result too
    assert plan_jobs(image, here / "b-comparison.png", here / "b.png")
    assert "would overwrite" in refusal(image, here / "b-comparison.png", here / "b.png", strips=True)


def test_results_never_replace_one_another(tmp_path):
    images = touch(tmp_path / "in", "a.png", "a-comparison.png")
    mask = touch(tmp_path, "m.png") / "m.png"
    assert len(plan_jobs(images, mask, tmp_path / "out")) == 2
    assert "or another result" in refusal(images, mask, tmp_path / "out", strips=True)


def test_names_that_no_system_takes(tmp_path):
    mask = touch(tmp_path, "m.png") / "m.png"
    refusal(tmp_path / ("x" * 5000), mask, tmp_path / "out.png")
    refusal(tmp_path / "a\0b", mask, tmp_path / "out.png")
    refusal(mask, tmp_path / ("x" * 5000), tmp_path / "out.png")
    circle = tmp_path / "circle.png"
    circle.symlink_to(circle)
    refusal(circle, mask, tmp_path / "out.png")


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    images, mask = touch(tmp_path / "in", "a.jpg"), touch(tmp_path, "m.png") / "m.png"

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"cannot read {images}: Permission denied" in refusal(images, mask, tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_in_a_folder_are_passed_over(tmp_path):
    images, mask = touch(tmp_path / "in", "a.jpg"), touch(tmp_path, "m.png") / "m.png"
    os.mkfifo(images / "b.jpg")  # noqa: TID251
    assert [job.image.name for job in plan_jobs(images, mask, tmp_path / "out")] == ["a.jpg"]


# --- what is left out, sub-folders --------------------------------------------------------------------------


def test_everything_that_is_left_out_is_counted(tmp_path):
    images = touch(tmp_path / "in", "a.jpg", "b.jfif", "c.JPE", "d.avif", "x.cr2", "notes.txt", ".hidden.png")
    touch(images / "one", "e.jpg")
    touch(images / "two")
    (images / "link").symlink_to("one")
    masks = touch(tmp_path / "masks", "a.png", "b.png", "c.png", "d.png", "more.png")
    planned = plan(images, masks, tmp_path / "out")
    assert [job.out.name for job in planned.jobs] == ["a.jpg", "b.jfif", "c.JPE", "d.avif"]
    assert planned.note == (
        f"{images}: left out: 2 sub-folders (--recursive enters them), 1 linked or hidden sub-folder, "
        "2 files that are no pictures by their suffix, 1 hidden file, 1 mask without a picture"
    )
    assert plan(touch(tmp_path / "clean", "a.jpg"), masks / "a.png", tmp_path / "out").note is None


@pytest.mark.parametrize("there", [True, False])
def test_heic_by_its_plugin(tmp_path, monkeypatch, there):
    monkeypatch.setattr(pairing, "find_spec", lambda name: there if name == "pillow_heif" else None)
    images, mask = touch(tmp_path / "in", "a.jpg", "b.HEIC", "c.heif"), touch(tmp_path, "m.png") / "m.png"
    planned = plan(images, mask, tmp_path / "out")
    if there:
        assert [job.out.name for job in planned.jobs] == ["a.jpg", "b.png", "c.png"]
        assert planned.note is None
    else:
        assert planned.note == (
            f'{images}: left out: 2 HEIC pictures (`pip install "moebius-edge[heif]"` to read HEIC)'
        )


def test_sub_folders_are_mirrored(tmp_path):
    images = touch(tmp_path / "in", "a.jpg")
    touch(images / "x" / "y", "a.jpg", "b.bmp")
    touch(images / "out", "old.jpg")  # the results of an earlier run
    touch(images / "masks" / "x" / "y", "a.png", "b.png")
    touch(images / "masks", "a.png")
    (images / "x" / "circle").symlink_to(images)
    out = images / "out"
    planned = plan(images, images / "masks", out, recursive=True)
    assert {job.out.relative_to(out).as_posix(): job.mask.relative_to(images).as_posix() for job in planned.jobs} == {
        "a.jpg": "masks/a.png",
        "x/y/a.jpg": "masks/x/y/a.png",
        "x/y/b.png": "masks/x/y/b.png",
    }
    assert planned.note == f"{images}: left out: 1 linked or hidden sub-folder"


def test_a_result_stays_in_the_output_folder(tmp_path):
    images, mask = touch(tmp_path / "in" / "x", "a.jpg").parent, touch(tmp_path, "m.png") / "m.png"
    touch(tmp_path / "elsewhere")
    (touch(tmp_path / "out") / "x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link that leaves --out"):
        plan(images, mask, tmp_path / "out", recursive=True)


def test_one_stem_and_one_mask_for_all(tmp_path):
    """Nothing is paired, so nothing needs another name; only what would become one file keeps its old suffix."""
    images, mask = touch(tmp_path / "in", "s.jpg", "s.png", "s.bmp", "s.gif"), touch(tmp_path, "m.png") / "m.png"
    jobs = plan_jobs(images, mask, tmp_path / "out", strips=True)
    assert [job.out.name for job in jobs] == ["s.bmp.png", "s.gif.png", "s.jpg", "s.png"]
    assert len({path for job in jobs for path in job.written}) == 8


def test_a_mask_in_the_folder_of_pictures_is_no_picture(tmp_path):
    images = touch(tmp_path / "in", "a.jpg", "mask.png")
    assert [job.image.name for job in plan_jobs(images, images / "mask.png", tmp_path / "out")] == ["a.jpg"]
