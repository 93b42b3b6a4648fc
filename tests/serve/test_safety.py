"""Who may ask, and how much: Host, Origin, token, CORS, limits, slow and vanished clients, damaged bundles."""

from __future__ import annotations

import json
import shutil
import socket
import time

import numpy as np
import pytest

from moebius_serve.guard import Access


def create(live, image, mask, options=None, **more):
    files = {"image": ("a.png", image), "mask": ("m.png", mask)}
    return live.post("/api/v1/jobs", files=files, data={"options": json.dumps(options or {"steps": 2})}, **more)


def last_status(live, job):
    with live.client.stream("GET", f"/api/v1/jobs/{job}/events") as answer:
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")][-1]


def refused(answer, status, word):
    assert answer.status_code == status, answer.text
    assert word in answer.json()["detail"]
    assert "Traceback" not in answer.text


@pytest.fixture(scope="module")
def strict(serve):
    """A server with a token and one page elsewhere that may ask; small limits."""
    return serve(
        access=Access(frozenset({"127.0.0.1", "serve.example"}), frozenset({"https://paint.example"}), "s3cret"),
        limits={"body_bytes": 1 << 20, "pixels": 20_000, "queue": 2, "body_seconds": 0.4, "head_seconds": 0.4},
    )


TOKEN = {"authorization": "Bearer s3cret"}


def test_every_answer_has_the_headers(live):
    for path, status in (("/", 200), ("/page/js/main.js", 200), ("/api/v1/defaults", 200), ("/none", 404)):
        answer = live.client.get(path)
        assert answer.status_code == status
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
        assert "server" not in answer.headers


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.", "[::2]", "evil:80"])
def test_a_foreign_host_is_refused(live, host):
    refused(live.client.get("/api/v1/defaults", headers={"host": host}), 421, "host")


def test_known_hosts_are_accepted(live):
    for host in ("localhost", "LOCALHOST:1234", "127.0.0.1:9", "[::1]:8080"):
        assert live.client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "file://", "http://127.0.0.1"]
)
def test_a_foreign_origin_changes_nothing(live, picture, mask, origin):
    refused(create(live, picture, mask, headers={"origin": origin}), 403, "--allow-origin")
    refused(live.client.delete("/api/v1/jobs/x", headers={"origin": origin}), 403, "--allow-origin")
    assert "access-control-allow-origin" not in live.client.options("/api/v1/jobs", headers={"origin": origin}).headers


def test_the_own_origin_is_accepted(live, picture, mask):
    assert create(live, picture, mask, headers={"origin": live.url}).status_code == 202


def test_cors_is_for_named_pages_only(strict, picture, mask):
    here, there = {"origin": "https://paint.example"}, {"origin": "https://other.example"}
    before = strict.client.options("/api/v1/jobs", headers=here)
    assert before.status_code == 204
    assert before.headers["access-control-allow-origin"] == "https://paint.example"
    assert "access-control-allow-credentials" not in before.headers
    answer = create(strict, picture, mask, headers=here | TOKEN)
    assert answer.status_code == 202
    assert answer.headers["access-control-allow-origin"] == "https://paint.example"
    refused(create(strict, picture, mask, headers=there | TOKEN), 403, "other.example")
    last_status_with_token(strict, answer.json()["id"])


def last_status_with_token(live, job):
    while live.client.get(f"/api/v1/jobs/{job}", headers=TOKEN).json()["state"] in ("queued", "running"):
        time.sleep(0.01)


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", "Bearer", "s3cret", "Basic s3cret", "Bearer s3cret2", "Bearer é"]
)
def test_a_wrong_token_is_refused(strict, picture, mask, given):
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    for path in ("/api/v1/defaults", "/models", "/openapi.json"):
        answer = strict.client.get(path, headers=headers)
        refused(answer, 401, "token")
        assert answer.headers["www-authenticate"] == "Bearer"
    refused(create(strict, picture, mask, headers=headers), 401, "token")


def test_the_page_itself_needs_no_token(strict):
    for path in ("/", "/docs", "/page/style.css", "/health"):
        assert strict.client.get(path).status_code == 200
    for path in (
        "/page/../api/v1/defaults",
        "/page/%2e%2e/api/v1/defaults",
        "//api/v1/defaults",
        "/page/..%2f..%2fcli.py",
    ):
        assert strict.client.get(path).status_code in (401, 404)


def test_limits(strict, draw, picture, mask):
    refused(create(strict, draw.png(draw.colours(0, 150, 150)), mask, headers=TOKEN), 413, "0.02 megapixels")
    refused(strict.post("/api/v1/inpaint", content=b"x" * (1 << 20) + b"x", headers=TOKEN), 413, "1 MiB")

    def chunks():  # without a Content-Length
        for _ in range(40):
            yield b"x" * (1 << 15)

    refused(strict.post("/api/v1/inpaint", content=chunks(), headers=TOKEN), 413, "1 MiB")


def test_bodies_underway_are_bounded_together(serve, picture, mask):
    small = serve(limits={"receiving_bytes": 1000})
    answer = create(small, picture, mask)
    refused(answer, 429, "too many large requests")
    assert answer.headers["retry-after"] == "10"
    assert small.client.get("/health").status_code == 200  # what was refused is given back
    assert small.post("/api/v1/adjust_mask", json={"mask": "x"}).status_code == 400


def test_a_full_queue_is_429(strict, picture, mask):
    strict.held.hold()
    running = [create(strict, picture, mask, headers=TOKEN) for _ in range(2)]
    assert [one.status_code for one in running] == [202, 202]
    answer = create(strict, picture, mask, headers=TOKEN)
    refused(answer, 429, "2 jobs wait")
    assert int(answer.headers["retry-after"]) > 0
    strict.held.free.set()
    for one in running:
        last_status_with_token(strict, one.json()["id"])
    assert create(strict, picture, mask, headers=TOKEN).status_code == 202


def raw(live, text):
    connection = socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=10)
    connection.sendall(text)
    return connection


HEAD = b"POST /api/v1/inpaint HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer s3cret\r\n"


def test_a_slow_body_is_408_and_a_slow_head_is_closed(strict):
    with raw(strict, HEAD + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{") as slow:
        answer = slow.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"not complete" in answer + slow.recv(10_000)
    with raw(strict, HEAD) as slow:
        assert slow.recv(10) == b""
    assert strict.client.get("/health").status_code == 200


def test_a_vanished_client_cancels_its_job(serve, picture, mask):
    import base64

    live = serve()
    live.held.hold()
    fields = {"image": base64.b64encode(picture).decode(), "mask": base64.b64encode(mask).decode(), "sd_steps": 500}
    body = json.dumps(fields).encode()
    head = HEAD + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    connection = raw(live, head + body)
    assert live.held.inside.wait(10)
    connection.close()
    (job,) = live.jobs._jobs.values()
    assert job.cancel.wait(10)
    live.held.free.set()
    while live.jobs.facts()["running"]:
        time.sleep(0.01)
    assert live.held.steps <= 1
    end = time.monotonic() + 10  # the request's own task drops the job, a moment after the worker ended it
    while live.jobs.facts()["kept"] and time.monotonic() < end:
        time.sleep(0.01)
    assert live.jobs.facts()["kept"] == 0


def test_a_job_has_its_time(serve, picture, mask):
    live = serve(limits={"job_seconds": 0.05})
    live.held.hold()
    job = create(live, picture, mask, {"steps": 100}).json()["id"]
    assert live.held.inside.wait(10)
    time.sleep(0.06)
    live.held.free.set()
    assert "longer than" in last_status(live, job)["error"]
    refused(live.client.get(f"/api/v1/jobs/{job}/result"), 408, "limit of this server")


@pytest.mark.parametrize("limits", [{"kept_results": 1}, {"kept_pixels": 20_000}, {"kept_seconds": 0.05}])
def test_results_are_dropped(serve, picture, mask, limits):
    live = serve(limits=limits)
    first, second = (create(live, picture, mask).json()["id"] for _ in range(2))
    last_status(live, second)
    if "kept_seconds" in limits:
        time.sleep(0.06)
    refused(live.client.get(f"/api/v1/jobs/{first}/result"), 404, "dropped")
    assert len(live.jobs._jobs) <= 1


def test_a_finished_job_holds_neither_source_nor_mask(live, picture, mask):
    job = create(live, picture, mask).json()["id"]
    last_status(live, job)
    kept = live.jobs.get(job)
    assert (kept.picture, kept.mask) == (None, None)
    assert kept.file


@pytest.mark.parametrize("damage", ["removed", "damaged"])
def test_a_bundle_that_goes_while_serving(serve, toy_bundle, tmp_path, picture, mask, damage):
    """Graphs that are loaded go on; one that is not yet is an error in words, and the server stays."""
    folder = shutil.copytree(toy_bundle.path, tmp_path / "bundle")
    live = serve(folder)
    if damage == "removed":
        shutil.rmtree(folder)
    else:
        for path in folder.rglob("*.onnx"):
            path.write_bytes(path.read_bytes()[:-5])
    refused(create(live, picture, mask), 503, "onnx")
    assert live.client.get("/health").json()["status"] == "ok"


def test_a_network_that_yields_nan(serve, toy_bundle, picture, mask):
    live = serve()
    real = live.pipeline.backend.run
    live.pipeline.backend.run = lambda graph, inputs: real(graph, inputs) * (np.nan if graph == "vae_decoder" else 1)
    job = create(live, picture, mask).json()["id"]
    status = last_status(live, job)
    assert status["state"] == "failed"
    refused(live.client.get(f"/api/v1/jobs/{job}/result"), 500, "NaN")
    live.pipeline.backend.run = real
    assert last_status(live, create(live, picture, mask).json()["id"])["state"] == "done"


def test_a_bug_is_named_by_its_kind_only(serve, picture, mask, caplog):
    live = serve()

    def run(graph, inputs):
        raise ZeroDivisionError("secret detail")

    live.pipeline.backend.run = run
    job = create(live, picture, mask).json()["id"]
    error = last_status(live, job)["error"]
    assert "ZeroDivisionError" in error
    assert "secret" not in error
    assert "secret detail" in caplog.text


def test_results_are_saved_where_asked(serve, tmp_path, picture, mask):
    live = serve(save_dir=tmp_path)
    files = {"image": ("../a b\u202e.png", picture), "mask": ("m.png", mask)}
    job = live.post("/api/v1/jobs", files=files, data={"options": '{"steps": 2}'}).json()["id"]
    last_status(live, job)
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-filled.png")
    assert path.read_bytes() == live.client.get(f"/api/v1/jobs/{job}/result").content


def test_answers_are_sent_without_delay(serve, monkeypatch):
    """The socket of every connection has TCP_NODELAY, whatever the listening socket was made by."""
    import moebius_serve.server as module

    seen = []
    real = module._Protocol.connection_made

    def made(self, transport):
        real(self, transport)
        seen.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(module._Protocol, "connection_made", made)
    assert serve().client.get("/health").status_code == 200
    assert len(seen) == 1
    assert seen[0] != 0
