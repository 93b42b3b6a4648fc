"""Which pictures go with which masks, and where results go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moebius_runtime.batch import Job, plan_jobs
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
    os.mkfifo(images / "b.jpg")
    assert [job.image.name for job in plan_jobs(images, mask, tmp_path / "out")] == ["a.jpg"]
