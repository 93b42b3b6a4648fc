"""The page's own calls: jobs, their progress and results, and every input that is refused."""

from __future__ import annotations

import io
import json
import tempfile
import time

import numpy as np
import pytest
from PIL import Image


def create(live, image, mask, options=None, name="a.png"):
    files = {"image": (name, image), "mask": ("m.png", mask)}
    return live.post("/api/v1/jobs", files=files, data={"options": json.dumps(options or {})})


def events(live, job):
    """Every status that the stream of a job gives."""
    with live.client.stream("GET", f"/api/v1/jobs/{job}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]


def ended(live, answer):
    """The last status of a job that was created."""
    assert answer.status_code == 202, answer.text
    return events(live, answer.json()["id"])[-1]


def is_sentence(answer, status, *words):
    """The answer has the status and one sentence, and no traceback."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    detail = answer.json()["detail"]
    assert isinstance(detail, str)
    assert "Traceback" not in detail
    assert "\n" not in detail
    assert len(detail) < 600
    for word in words:
        assert word in detail, detail


# --- results --------------------------------------------------------------------------------------------------


def written(draw, suffix):
    """A picture in a format, with metadata that the format holds."""
    buffer = io.BytesIO()
    image = Image.fromarray(draw.colours(5, 130, 150))
    exif = Image.Exif()
    exif[0x010E] = "a test"
    if suffix == ".tif":
        Image.fromarray(np.random.RandomState(1).randint(0, 65536, (130, 150)).astype(np.uint16)).save(buffer, "TIFF")
    elif suffix == ".png":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(buffer, "PNG", dpi=(300, 300), exif=exif)
    else:
        image.save(buffer, {".jpg": "JPEG", ".webp": "WEBP"}[suffix], exif=exif, quality=90)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_the_result_is_the_file_of_the_command_line(live, draw, filled_by_command, suffix):
    """Same bytes: format, metadata, alpha and bit depth, with options that change the pixels."""
    image, mask = written(draw, suffix), draw.png(draw.mask(130, 150))
    last = ended(live, create(live, image, mask, {"steps": 4, "seed": 7, "mask_dilate": 3}, f"holiday{suffix}"))
    assert last["state"] == "done", last
    answer = live.client.get(f"/api/v1/jobs/{last['id']}/result")
    assert answer.headers["x-seed"] == "7"
    assert answer.headers["content-disposition"] == f"inline; filename*=UTF-8''holiday-filled{suffix}"
    expected = filled_by_command(image, mask, suffix, "--steps", 4, "--seed", 7, "--mask-dilate", 3)
    assert answer.content == expected


def test_the_suffix_is_of_the_content_not_of_the_name(live, draw, mask):
    buffer = io.BytesIO()
    Image.fromarray(draw.colours()).save(buffer, "JPEG")
    last = ended(live, create(live, buffer.getvalue(), mask, {"steps": 2}, "../..\\x/a b.png"))
    answer = live.client.get(f"/api/v1/jobs/{last['id']}/result")
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["content-disposition"].endswith("a%20b-filled.jpg")
    as_png = live.client.get(f"/api/v1/jobs/{last['id']}/result?format=png")
    assert Image.open(io.BytesIO(as_png.content)).format == "PNG"
    is_sentence(live.client.get(f"/api/v1/jobs/{last['id']}/result?format=exe"), 400, "exe", "png")


def test_progress_is_reported_per_step(live, picture, mask):
    live.held.hold()
    answer = create(live, picture, mask, {"steps": 5})
    assert answer.json()["state"] in ("queued", "running")
    is_sentence(live.client.get(f"/api/v1/jobs/{answer.json()['id']}/result"), 409, "done")
    live.held.free.set()
    found = events(live, answer.json()["id"])
    assert [one["state"] for one in found][-1] == "done"
    assert (found[-1]["step"], found[-1]["steps"]) == (5, 5)
    assert {one["steps"] for one in found if one["step"]} == {5}  # 0 before the first step
    assert [one["step"] for one in found] == sorted(one["step"] for one in found)
    status = live.client.get(f"/api/v1/jobs/{answer.json()['id']}").json()
    assert status == found[-1]


def test_the_stream_ends_with_the_end_of_the_job(live, picture, mask, monkeypatch):
    """Also where the job ends between two looks at it: the last status is never `running`."""
    from moebius_serve.api import own

    live.held.hold()
    job = live.jobs.get(create(live, picture, mask, {"steps": 2}).json()["id"])
    assert live.held.inside.wait(10)
    real = own.status

    def status(jobs, one):
        content = real(jobs, one)
        live.held.free.set()
        while one.state == "running":
            time.sleep(0.005)
        return content

    monkeypatch.setattr(own, "status", status)
    found = events(live, job.id)
    assert found[0]["state"] == "running"
    assert found[-1]["state"] == "done"


def test_a_random_seed_is_reported_and_repeats(live, picture, mask):
    first = ended(live, create(live, picture, mask, {"steps": 2, "seed": -1}))
    again = ended(live, create(live, picture, mask, {"steps": 2, "seed": first["seed"]}))
    one, two = (live.client.get(f"/api/v1/jobs/{job['id']}/result").content for job in (first, again))
    assert one == two
    assert ended(live, create(live, picture, mask, {"steps": 2, "seed": -1}))["seed"] != first["seed"]


def test_a_job_is_cancelled_within_a_step(live, picture, mask):
    live.held.hold()
    job = create(live, picture, mask, {"steps": 50}).json()["id"]
    assert live.held.inside.wait(10)
    before = live.held.steps
    assert live.client.delete(f"/api/v1/jobs/{job}").status_code == 204
    live.held.free.set()
    last = ended(live, create(live, picture, mask, {"steps": 2}))  # the next one gets its turn
    assert last["state"] == "done"
    assert live.held.steps - before <= 1 + 2


def test_a_cancelled_job_that_waits_never_starts(live, picture, mask):
    live.held.hold()
    running = create(live, picture, mask, {"steps": 2}).json()["id"]
    waiting = create(live, picture, mask, {"steps": 2})
    assert waiting.json()["position"] == 1
    live.client.delete(f"/api/v1/jobs/{waiting.json()['id']}")
    live.held.free.set()
    assert events(live, running)[-1]["state"] == "done"
    is_sentence(live.client.get(f"/api/v1/jobs/{waiting.json()['id']}"), 404, "no such job")


def test_a_preview_is_upright_and_of_eight_bits(live, draw):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draw.colours(2, 80, 100)).save(buffer, "JPEG", exif=exif)
    answer = live.post("/api/v1/preview", files={"image": ("a.jpg", buffer.getvalue())})
    shown = Image.open(io.BytesIO(answer.content))
    assert (shown.format, shown.mode, shown.size) == ("PNG", "RGB", (80, 100))
    deep = np.full((64, 64), 40000, np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "TIFF")
    answer = live.post("/api/v1/preview", files={"image": ("a.tif", buffer.getvalue())})
    assert np.asarray(Image.open(io.BytesIO(answer.content))).max() == round(40000 / 257)
    is_sentence(live.post("/api/v1/preview", files={"image": ("a.tif", b"II*\0 no")}), 400, "the picture")


def test_defaults_name_modes_and_limits(live):
    facts = live.client.get("/api/v1/defaults").json()
    assert facts["modes"] == ["reference", "best", "balanced", "fast"]
    assert (facts["mode"], facts["segmenter"], facts["image_size"]) == ("best", None, 128)
    assert facts["limits"]["queue"] == 16
    assert facts["defaults"]["num_inference_steps"] == 6
    assert facts["mode_steps"] == {"reference": 6, "best": 6, "balanced": 10, "fast": 3}


def test_the_levers_are_options(live, picture, mask):
    """Each reaches the run or is refused in one sentence; a wrong type is refused by its name."""
    last = ended(live, create(live, picture, mask, {"mode": "fast", "steps": 2, "guidance_interval": [100, 900]}))
    assert (last["state"], last["steps"]) == ("done", 2)
    for options, words in (
        ({"guidance_interval": "1:2"}, "option guidance_interval is '1:2'; expected a list"),
        ({"guidance_interval": [5]}, "guidance-interval"),
        ({"decode": "masked"}, "has no graph vae_decoder_lower"),
        ({"vae_decoder": "tiny"}, "has no graph vae_decoder_tiny"),
        ({"decode": 1}, "option decode is 1; expected a text"),
    ):
        is_sentence(create(live, picture, mask, options), 400, words)


def test_the_servers_mode_is_taken_where_none_is_named(serve, picture, mask, filled_by_command):
    other = serve(mode="reference")
    for options, mode in (({}, "reference"), ({"mode": "best"}, "best")):
        last = ended(other, create(other, picture, mask, options | {"steps": 3}))
        got = other.client.get(f"/api/v1/jobs/{last['id']}/result").content
        assert got == filled_by_command(picture, mask, ".png", "--steps", 3, "--mode", mode)


# --- what is refused ------------------------------------------------------------------------------------------


def header_only(width, height):
    """A PNG that states a size and holds nothing: 60 bytes of it would be gigabytes of pixels."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD_PICTURES = {
    "empty": (b"", 400, "the picture"),
    "text": (b"hello, this is no picture", 400, "not a picture"),
    "truncated": (None, 400, "cannot be decoded"),
    "small": (header_only(63, 64), 400, "64"),
    "120 megapixels": (header_only(12_000, 10_000), 413, "120 megapixels"),
    "200 megapixels": (header_only(20_000, 10_000), 413, "megapixels"),
    "a bomb": (header_only(2_000_000, 2_000_000), 413, "megapixels"),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_bad_pictures_and_masks(live, draw, picture, mask, kind):
    data, status, word = BAD_PICTURES[kind]
    data = draw.png(draw.colours(0, 300, 300))[:-2000] if data is None else data
    is_sentence(create(live, data, mask), status, word)
    is_sentence(create(live, picture, data), status, word.replace("the picture", "the mask"))


def test_bad_masks(live, draw, picture):
    for values, word in (
        (np.zeros((128, 128), np.uint8), "no pixel"),
        (np.full((128, 128), 255, np.uint8), "every pixel"),
    ):
        is_sentence(create(live, picture, draw.png(values)), 400, word)
    is_sentence(create(live, picture, draw.png(draw.mask(128, 130))), 400, "130x128", "must agree")


BAD_OPTIONS = [
    ({"colour": 1}, "unknown option"),
    ({"noise": [1]}, "unknown option"),
    ({"steps": "20"}, "a whole number"),
    ({"steps": True}, "a whole number"),
    ({"steps": 2.5}, "a whole number"),
    ({"steps": 0}, "steps"),
    ({"steps": 10**40}, "steps"),
    ({"seed": -2}, "seed"),
    ({"seed": 2**32}, "seed"),
    ({"guidance_scale": float("nan")}, "guidance"),
    ({"guidance_scale": [1]}, "a number"),
    ({"strength": 0}, "strength"),
    ({"strength": float("inf")}, "strength"),
    ({"mode": "worst"}, "mode"),
    ({"mode": {}}, "a text"),
    ({"sampler": "euler"}, "sampler"),
    ({"mask_dilate": -1}, "mask-dilate"),
    ({"mask_dilate": 1.5}, "mask_dilate"),
    ({"mask_dilate": "\ud800"}, "mask-dilate"),
    ({"compensate_colour": 1}, "true or false"),
    ({"max_squares": 0}, "max-squares"),
    ({"quality": 101}, "1 to 100"),
    ({"mask_orientation": "left"}, "orientation"),
    ({"resize_mask": "yes"}, "true or false"),
]


@pytest.mark.parametrize(("options", "word"), BAD_OPTIONS, ids=[json.dumps(options) for options, _ in BAD_OPTIONS])
def test_bad_options(live, picture, mask, options, word):
    is_sentence(create(live, picture, mask, options), 400, word)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 5000, '{"a":' + "1" * 5000 + "}", "x" * 20_000])
def test_options_that_are_no_object(live, picture, mask, text):
    files = {"image": ("a.png", picture), "mask": ("m.png", mask)}
    answer = live.post("/api/v1/jobs", files=files, data={"options": text})
    assert answer.status_code == (202 if text == "" else 400)  # an empty field counts as none
    if text:
        is_sentence(answer, 400, "expected")


def test_a_form_that_lacks_a_part_or_ends_early(live, picture, mask):
    is_sentence(live.post("/api/v1/jobs", files={"image": ("a.png", picture)}), 400, "mask")
    is_sentence(live.post("/api/v1/jobs", json={}), 400, "image")
    files = {"image": ("a.png", picture), "mask": ("m.png", mask)}
    request = live.client.build_request("POST", "/api/v1/jobs", files=files)
    whole, kind = request.read(), request.headers["content-type"]
    for cut in (len(whole) // 2, len(whole) - 4):
        is_sentence(live.post("/api/v1/jobs", content=whole[:cut], headers={"content-type": kind}), 400)
    is_sentence(live.post("/api/v1/jobs", content=b"x", headers={"content-type": "multipart/form-data"}), 400)


def test_an_unknown_job(live):
    for call in ("", "/events", "/result"):
        is_sentence(live.client.get(f"/api/v1/jobs/none{call}"), 404, "no such job")
    is_sentence(live.client.delete("/api/v1/jobs/none"), 404, "no such job")
    is_sentence(live.client.get("/nothing"), 404)
    is_sentence(live.client.put("/api/v1/jobs"), 405)


def test_select_without_a_model(live, picture):
    answer = live.post("/api/v1/select", files={"image": ("a.png", picture)}, data={"clicks": "[[1, 2, 1]]"})
    is_sentence(answer, 404, "--segmenter")


def test_uploads_stay_in_memory(live, draw, monkeypatch):
    """A form of 3 MB writes no temporary file, which the framework's own parser would."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *a, **k: pytest.fail("a temporary file was made"))
    image = draw.png(draw.colours(0, 1000, 1000))
    assert len(image) > 2 << 20
    answer = live.post("/api/v1/preview", files={"image": ("a.png", image)})
    assert answer.status_code == 200


def test_a_job_that_is_done_takes_no_place_in_the_queue(live, picture, mask):
    """At the moment at which its client can know, so that the next request is not refused."""
    live.held.hold()
    job = live.jobs.get(create(live, picture, mask, {"steps": 2}).json()["id"])
    assert live.held.inside.wait(10)
    seen = []
    live.jobs.watch(job, lambda: seen.append((job.state, live.jobs.facts()["running"])))
    live.held.free.set()
    events(live, job.id)
    assert seen[-1] == ("done", 0)
