"""Many clients at once, and many hostile requests. MOEBIUS_LOAD_SECONDS and MOEBIUS_FUZZ_CASES make both longer.

MOEBIUS_LOAD_BUNDLE names another bundle than the toy.
"""

from __future__ import annotations

import base64
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np

SECONDS = float(os.environ.get("MOEBIUS_LOAD_SECONDS", "2"))
CASES = int(os.environ.get("MOEBIUS_FUZZ_CASES", "300"))


def resident() -> int:
    """MiB of this process, which the server is in; 0 on Windows, where nothing reads them."""
    status = Path("/proc/self/status")
    if sys.platform == "win32":
        return 0
    if not status.exists():
        import resource  # noqa: TID251

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return int(status.read_text().split("VmRSS:")[1].split()[0]) >> 10


def test_32_clients(serve, draw, record_property):
    """None lost or mixed up: each answer keeps its own picture's unmasked pixels."""
    live = serve(os.environ.get("MOEBIUS_LOAD_BUNDLE"), limits={"queue": 16})
    mask = draw.png(draw.mask())
    ends = [float("inf")]
    waits: list[float] = []
    refused: list[int] = []
    wrong: list[str] = []

    def client(number: int) -> None:
        rgb = draw.colours(number)
        fields = {"image": draw.png(rgb), "mask": mask}
        body = {name: base64.b64encode(data).decode() for name, data in fields.items()}
        with httpx.Client(base_url=live.url, timeout=60) as http:
            answered = False
            while not answered or time.monotonic() < ends[0]:
                started = time.monotonic()
                answer = http.post("/inpaint", json={"image_png_b64": body["image"], "mask_png_b64": body["mask"]})
                if answer.status_code == 429:
                    refused.append(int(answer.headers["retry-after"]))
                    time.sleep(0.05)
                    continue
                waits.append(time.monotonic() - started)
                answered = True
                if answer.status_code != 200:
                    wrong.append(answer.text)
                    continue
                result = draw.read(base64.b64decode(answer.json()["image_png_b64"]))
                if not np.array_equal(result[:30], rgb[:30]) or np.array_equal(result[50:70, 55:75], rgb[50:70, 55:75]):
                    wrong.append(f"client {number} got another picture")

    client_zero = threading.Thread(target=client, args=(99,))
    client_zero.start()
    while not waits:  # the graphs are loaded then
        time.sleep(0.01)
    before = resident()
    ends[0] = time.monotonic() + SECONDS
    threads = [threading.Thread(target=client, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    time.sleep(SECONDS / 2)
    middle = resident()
    for thread in [client_zero, *threads]:
        thread.join()
    after = resident()
    assert not wrong, wrong[:3]
    assert len(waits) >= 33  # every client at least once
    assert live.jobs.facts() == {"waiting": 0, "running": 0, "kept": 0}
    p50, p95, p99 = (round(1000 * float(np.percentile(waits, share))) for share in (50, 95, 99))
    figures = {"answers": len(waits), "429": len(refused), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}
    figures |= {"rss_mib_start": before, "rss_mib_middle": middle, "rss_mib_end": after}
    record_property("load", figures)
    print(json.dumps(figures))
    # What 16 pictures and 32 clients hold, not what thousands would; and what is held does not grow.
    assert after - before < 300, figures
    assert after - middle < 100, figures


POSTED = ["/api/v1/jobs", "/api/v1/inpaint", "/inpaint", "/v1/images/edits", "/api/v1/adjust_mask", "/api/v1/preview"]
POSTED += ["/api/v1/select", "/api/v1/run_plugin_gen_mask"]
OTHERS = ["/api/v1/jobs/x/result", "/api/v1/defaults", "/", "/page/", "/page/../cli.py", "/openapi.json", "/%00"]
VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    10**50,
    "",
    "a",
    "\x00",
    "\ud800",
    "../../etc",
    [],
    {},
    [[1, 2, 1]],
    {"a": {"b": []}},
]
NAMES = ["image", "mask", "options", "clicks", "n", "prompt", "image_png_b64", "mask_png_b64", "kernel_size", "operate"]
NAMES += ["sd_steps", "sd_seed", "cfg", "num_steps", "seed", "compensate", "sd_sampler", "response_format", "name"]


def hostile(rng: random.Random, picture: bytes, mask: bytes) -> dict:
    """One request, mostly of the right kind and wrong somewhere."""

    def damaged(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(rng.choice([0, 0, 1, 5, 50])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed[: rng.choice([len(changed), len(changed), rng.randrange(len(changed))])])

    if rng.random() < 0.1:
        return {"method": rng.choice(["GET", "DELETE", "PUT", "OPTIONS"]), "url": rng.choice(OTHERS + POSTED)}
    request = {"method": "POST", "url": rng.choice(POSTED)}
    kind = rng.choice(["json", "form", "form", "raw"])
    if kind == "raw":
        content = rng.choice([b"", b"{", b"[" * 3000, rng.randbytes(rng.randrange(300)), b"--x\r\n\r\n", b'"\\ud800"'])
        types = ["application/json", "multipart/form-data", "multipart/form-data; boundary=x", "text/plain", ""]
        request |= {"content": content, "headers": {"content-type": rng.choice(types)}}
    elif kind == "json":
        body = {name: rng.choice(VALUES) for name in rng.sample(NAMES, rng.randrange(8))}
        for name, data in (("image", picture), ("mask", mask)):
            if rng.random() < 0.7:
                body |= {key: base64.b64encode(damaged(data)).decode() for key in (name, f"{name}_png_b64")}
        content = json.dumps(body).encode()
        request |= {"content": content, "headers": {"content-type": "application/json"}}
    else:
        options = {rng.choice(["steps", "seed", "mode", "mask_dilate", "quality", "x"]): rng.choice(VALUES)}
        files = {name: (rng.choice(["a.png", "", "\u202e", "a" * 300]), damaged(data)) for name, data in
                 (("image", picture), ("mask", mask)) if rng.random() < 0.9}  # fmt: skip
        request |= {"files": files, "data": {"options": rng.choice([json.dumps(options), "{", "[]", '{"steps": 1}'])}}
    return request


def test_hostile_requests(serve, picture, mask):
    """Every one gets an answer in words, no traceback, and the server goes on with its memory as it was."""
    live = serve(limits={"queue": 64})
    rng = random.Random(os.environ.get("MOEBIUS_FUZZ_SEED", "7"))
    counts: dict[int, int] = {}
    threads = threading.active_count()
    before = None
    for number in range(CASES):
        request = hostile(rng, picture, mask)
        answer = live.client.request(**request)
        counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, (number, request, answer.text)
        assert "Traceback" not in answer.text
        if answer.status_code >= 400 and request["method"] != "OPTIONS":
            assert answer.json()["detail"], request
        if number == CASES // 3:
            before = resident()
    after = resident()
    print(counts, "MiB:", before, "->", after)
    assert {400, 404, 405} <= counts.keys()
    assert after - before < 150
    assert threading.active_count() - threads < 60  # the framework's own pool
    ok = live.client.post("/inpaint", json={"image_png_b64": base64.b64encode(picture).decode(),
                                             "mask_png_b64": base64.b64encode(mask).decode()})  # fmt: skip
    assert ok.status_code == 200
