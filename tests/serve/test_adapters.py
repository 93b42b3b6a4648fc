"""Clients of others, as they send their requests: IOPaint's front end, OpenAI's Python client, moebius-gimp."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

# What IOPaint's front end sends (its InpaintRequest schema), with values of its own defaults.
IOPAINT = {
    "name": "sd1.5",
    "negative_prompt": "",
    "prompt": "a dog",
    "ldm_steps": 30,
    "ldm_sampler": "ddim",
    "zits_wireframe": True,
    "cv2_flag": "INPAINT_NS",
    "cv2_radius": 5,
    "hd_strategy": "Crop",
    "hd_strategy_crop_triger_size": 640,
    "hd_strategy_crop_margin": 128,
    "hd_trategy_resize_imit": 2048,
    "use_croper": False,
    "croper_x": 0,
    "croper_y": 0,
    "croper_height": 512,
    "croper_width": 512,
    "use_extender": False,
    "extender_x": 0,
    "extender_y": 0,
    "extender_height": 640,
    "extender_width": 640,
    "sd_scale": 1.0,
    "sd_mask_blur": 12,
    "sd_strength": 1.0,
    "sd_steps": 3,
    "sd_guidance_scale": 2.0,
    "sd_sampler": "DPM++ 2M",
    "sd_seed": 42,
    "sd_match_histograms": False,
    "sd_outpainting_softness": 20,
    "sd_outpainting_space": 20,
    "sd_lcm_lora": False,
    "enable_controlnet": False,
    "controlnet_conditioning_scale": 0.4,
    "controlnet_method": "",
    "enable_brushnet": False,
    "brushnet_method": "random_mask",
    "brushnet_conditioning_scale": 1.0,
    "enable_powerpaint_v2": False,
    "powerpaint_task": "text-guided",
}


def b64(data: bytes, url: bool = False) -> str:
    return ("data:image/png;base64," if url else "") + base64.b64encode(data).decode()


def refused(answer, status, word):
    assert answer.status_code == status, answer.text
    assert word in answer.json()["detail"]


@pytest.mark.parametrize("url", [False, True])
def test_iopaint(live, picture, mask, filled_by_command, url):
    answer = live.post("/api/v1/inpaint", json=IOPAINT | {"image": b64(picture, url), "mask": b64(mask, url)})
    assert answer.status_code == 200, answer.text
    assert (answer.headers["content-type"], answer.headers["x-seed"]) == ("image/png", "42")
    options = ["--steps", 3, "--seed", 42, "--guidance-scale", 2, "--strength", 1]
    assert answer.content == filled_by_command(picture, mask, ".png", *options)


def test_iopaint_without_options_takes_the_bundles(live, picture, mask, filled_by_command):
    answer = live.post("/api/v1/inpaint", json={"image": b64(picture), "mask": b64(mask), "ldm_steps": None})
    assert answer.content == filled_by_command(picture, mask, ".png")
    again = live.post("/api/v1/inpaint", json={"image": b64(picture), "mask": b64(mask), "sd_seed": -1})
    assert 0 <= int(again.headers["x-seed"]) < 2**32


def test_iopaint_refusals(live, draw, picture, mask):
    whole = {"image": b64(picture), "mask": b64(mask)}
    for change, word in (
        ({"image": None}, "image is missing"),
        ({"image": 3}, "image is missing"),
        ({"mask": "data:image/png;base64,"}, "the mask is empty"),
        ({"mask": "no base64!"}, "not valid base64"),
        ({"mask": b64(draw.png(draw.mask(128, 140)))}, "must agree"),
        ({"sd_steps": "many"}, "steps"),
        ({"sd_seed": "x"}, "seed"),
        ({"sd_sampler": []}, None),
    ):
        answer = live.post("/api/v1/inpaint", json=whole | change)
        if word:
            refused(answer, 400, word)
        else:
            assert answer.status_code == 200
    for text in ("{", "[1]", '"x"', "null", ""):
        answer = live.post("/api/v1/inpaint", content=text, headers={"content-type": "application/json"})
        assert answer.status_code == 400


def test_iopaint_config(live):
    config = live.client.get("/api/v1/server-config").json()
    assert config["plugins"] == []
    assert config["modelInfos"] == [live.client.get("/api/v1/model").json()]
    assert config["modelInfos"][0]["model_type"] == "inpaint"
    assert live.client.get("/api/v1/samplers").json() == config["samplers"] == ["ddim", "dpmpp-2m", "unipc"]


def test_clients_of_other_programs_can_use_a_distilled_bundle(serve, toy_copy, picture, mask):
    """They always send a scale, a sampler and many steps; our own API refuses what the network does not have."""
    from moebius_runtime.bundle.manifest import Manifest, read_manifest, write_manifest

    content = read_manifest(toy_copy.path).model_dump()
    content["graphs"]["unet"] = content["graphs"].pop("unet_conditional")
    content["guidance"] = {"distilled": 2.5}
    content["defaults"] |= {"sampler": "lcm", "num_inference_steps": 2}
    write_manifest(Manifest.model_validate(content), toy_copy.path)
    live = serve(toy_copy.path)
    both = {"image": b64(picture), "mask": b64(mask)}
    sent = IOPAINT | both | {"sd_steps": 30, "sd_sampler": "ddim"}
    plain = live.post("/api/v1/inpaint", json=both | {"sd_seed": 42})
    for body in (sent, sent | {"sd_sampler": "DPM++ 2M", "sd_steps": 2}):
        answer = live.post("/api/v1/inpaint", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.content == plain.content
    one = live.post("/api/v1/inpaint", json=sent | {"sd_steps": 1})
    assert one.content != plain.content
    assert live.client.get("/api/v1/samplers").json() == ["lcm"]
    gimp = {"image_png_b64": b64(picture), "mask_png_b64": b64(mask), "cfg": 7.5, "num_steps": 30, "seed": 42}
    assert live.post("/inpaint", json=gimp).status_code == 200


def adjusted(live, values, operate, size):
    image = Image.fromarray(values)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    body = {"mask": b64(buffer.getvalue()), "operate": operate, "kernel_size": size}
    answer = live.post("/api/v1/adjust_mask", json=body)
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_adjust_mask(live):
    """By loops over the pixels of a point: a kernel of 21 reaches 10 pixels."""
    values = np.zeros((80, 90), np.uint8)
    values[40, 50] = 255
    expected = np.zeros_like(values)
    expected[30:51, 40:61] = 255
    assert np.array_equal(adjusted(live, values, "expand", 21), expected)
    assert np.array_equal(adjusted(live, expected, "shrink", 21), values)
    assert np.array_equal(adjusted(live, values, "reverse", 1), 255 - values)
    for change in ({"kernel_size": 0}, {"kernel_size": True}, {"operate": "spin"}, {"kernel_size": 10**6}):
        body = {"mask": "x", "operate": "expand", "kernel_size": 3} | change
        refused(live.post("/api/v1/adjust_mask", json=body), 400, next(iter(change)))


def alpha_mask(mask: bytes) -> bytes:
    """OpenAI's convention: what is white becomes transparent."""
    grey = np.asarray(Image.open(io.BytesIO(mask)))
    rgba = np.full((*grey.shape, 4), 255, np.uint8)
    rgba[grey > 127, 3] = 0
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG")
    return buffer.getvalue()


def test_openai_client(live, picture, mask, filled_by_command):
    openai = pytest.importorskip("openai", reason="pip install openai")
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    found = client.images.edit(
        image=("a.png", picture), mask=("m.png", alpha_mask(mask)), prompt="no more dog", n=2, model="any"
    )
    assert found.created > 1.6e9
    for seed, one in enumerate(found.data):
        assert base64.b64decode(one.b64_json) == filled_by_command(picture, mask, ".png", "--seed", seed)
    with pytest.raises(openai.BadRequestError, match="no transparency"):
        client.images.edit(image=("a.png", picture), mask=("m.png", mask), prompt="")
    with pytest.raises(openai.BadRequestError, match="b64_json"):
        client.images.edit(image=("a.png", picture), mask=("m.png", mask), prompt="", response_format="url")
    for n in (0, 5):
        with pytest.raises(openai.BadRequestError, match="1 to 4"):
            client.images.edit(image=("a.png", picture), mask=("m.png", mask), prompt="", n=n)


def test_openai_without_a_mask_takes_the_pictures_own_alpha(live, draw):
    rgba = np.dstack([draw.colours(), 255 - draw.mask()])
    answer = live.post("/v1/images/edits", files={"image": ("a.png", draw.png(rgba))}, data={"prompt": "x"})
    assert answer.status_code == 200, answer.text
    result = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))
    assert result.shape == rgba.shape
    assert np.array_equal(result[:, :, 3], rgba[:, :, 3])


def test_moebius_gimp(live, picture, mask, filled_by_command):
    body = {
        "image_png_b64": b64(picture),
        "mask_png_b64": b64(mask),
        "cfg": 2.0,
        "num_steps": 4,
        "seed": 9,
        "compensate": True,
    }
    answer = live.post("/inpaint", json=body).json()
    assert answer["device"]
    assert answer["seed"] == 9
    options = ["--guidance-scale", 2, "--steps", 4, "--seed", 9, "--compensate-colour"]
    assert base64.b64decode(answer["image_png_b64"]) == filled_by_command(picture, mask, ".png", *options)
    refused(live.post("/inpaint", json=body | {"cfg": "x"}), 400, "guidance_scale")
    refused(live.post("/inpaint", json={}), 400, "image_png_b64 is missing")
    health = live.client.get("/health").json()
    assert (health["status"], health["waiting"], health["running"]) == ("ok", 0, 0)
    assert live.client.get("/models").json() == {"models": [health["model"]], "current": health["model"]}


def test_the_api_page_needs_no_other_host(live):
    page = live.client.get("/docs").text
    assert "//" not in page.replace("<!doctype html>", "")
    paths = live.client.get("/openapi.json").json()["paths"]
    assert {"/api/v1/jobs", "/api/v1/inpaint", "/v1/images/edits", "/inpaint", "/api/v1/run_plugin_gen_mask"} <= {
        *paths
    }
