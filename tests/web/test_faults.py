"""What goes wrong in a browser: words on the page, nothing kept half, and another try without a reload."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

pytestmark = pytest.mark.xdist_group("site")

KEPT = "async () => (await (await caches.open('moebius-shards')).keys()).map((one) => one.url)"
KEEP_DEVICES = """
if (self.GPUAdapter) {
  const make = GPUAdapter.prototype.requestDevice;
  self.devices = [];
  GPUAdapter.prototype.requestDevice = async function (...given) {
    const device = await make.apply(this, given);
    self.devices.push(device);
    return device;
  };
}
"""


def shards(site) -> dict[str, int]:
    from moebius_export.web.site import shard_sizes

    return shard_sizes(json.loads((site / "site.json").read_text())["graphs"])


def fast(page) -> None:
    """Chooses the mode with the fewest steps."""
    page.page.locator("summary", has_text="Settings").click()
    page["mode"].select_option("fast")


class Cut:
    """Around a server: ends the connection after half of one shard's answer, while `cutting`."""

    def __init__(self, sha256: str) -> None:
        self.path, self.cutting = f"/shards/{sha256}.bin", True
        # The byte from which each request wants the shard; not a repetition at once, as a browser asks again by itself
        # where a connection that it kept open has been closed.
        self.starts: list[int] = []

    def __call__(self, app):
        async def cut(scope, receive, send):
            if scope["type"] != "http" or scope["path"] != self.path:
                await app(scope, receive, send)
                return
            asked = dict(scope["headers"]).get(b"range", b"bytes=0-")
            start = int(asked.removeprefix(b"bytes=").split(b"-")[0])
            self.starts += [start] if self.starts[-1:] != [start] else []
            left = 0

            async def send_half(message):
                nonlocal left
                if message["type"] == "http.response.start":
                    left = int(dict(message["headers"])[b"content-length"]) // 2
                elif left < len(message["body"]):
                    await send({**message, "body": message["body"][:left], "more_body": True})
                    raise ConnectionAbortedError  # the server closes a connection whose answer has begun
                else:
                    left -= len(message["body"])
                await send(message)

            await app(scope, receive, send_half if self.cutting else send)

        return cut


def test_a_download_that_is_cut_goes_on_later(site, visit, serve_site):
    """Four tries, each cut after half of what is left; then the person tries again and the rest comes alone."""
    sizes = shards(site)
    largest = max(sizes, key=sizes.__getitem__)
    cut = Cut(largest)
    page = visit(serve_site(site, wrap=cut).url)
    page["model-download"].click()
    page.state("error")
    assert "was cut" in page.words()
    assert "try again to go on from there" in page.words()
    assert not any(largest in url for url in page.page.evaluate(KEPT))
    assert len(cut.starts) == 4
    cut.cutting = False
    page["model-download"].click()
    page.page.wait_for_selector("#status:has-text('works offline now')")
    assert len(cut.starts) == 5
    assert cut.starts[0] == 0
    for before, start in pairwise(cut.starts):  # what was on its way when the connection closed may be lost
        assert before < start <= before + (sizes[largest] - before) // 2
    assert len(page.page.evaluate(KEPT)) == len(sizes)


@pytest.mark.slow
def test_a_connection_that_is_gone_in_a_run(site, paint, visit, serve_site):
    """The server is away at the first run. The picture and the mask are still there when it is back."""
    page = visit(serve_site(site).url)
    mask = paint(page)
    fast(page)
    page.page.context.set_offline(True)
    page["run"].click()
    page.state("running")
    page.state("error")
    assert "download" in page.words() or "loaded" in page.words()
    page.page.context.set_offline(False)
    assert page.saved("mask-save") == mask
    page.run()


@pytest.mark.slow
def test_a_full_disk(site, paint, visit, serve_site):
    """The browser's quota is less than the model."""
    server = serve_site(site)
    page = visit(server.url)
    paint(page)
    fast(page)
    session = page.page.context.new_cdp_session(page.page)
    used = session.send("Storage.getUsageAndQuota", {"origin": server.url})["usage"]
    quota = {"origin": server.url, "quotaSize": used + 500_000}
    session.send("Storage.overrideQuotaForOrigin", quota)
    page["run"].click()
    page.state("running")
    page.state("error")
    assert "no room for the model" in page.words()
    assert len(page.page.evaluate(KEPT)) < len(shards(site))
    session.send("Storage.overrideQuotaForOrigin", {"origin": server.url})
    page.run()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("delete Navigator.prototype.gpu", "this browser has no WebGPU"),
        (
            "Object.defineProperty(Navigator.prototype, 'gpu', {value: {requestAdapter: async () => null}})",
            "WebGPU has no adapter here",
        ),
        (
            "Object.defineProperty(Navigator.prototype, 'gpu', {value: {requestAdapter: async () => { throw 1 }}})",
            "WebGPU has no adapter here",
        ),
    ],
)
def test_without_a_gpu_the_page_names_the_reason(site, visit, serve_site, script, words):
    page = visit(serve_site(site).url, script)
    page.page.locator("#about-open").click()
    facts = page.page.locator("#facts").inner_text()
    assert f"threads: {words}" in facts or f"thread: {words}" in facts
    assert "No real GPU" in facts


def plain(app):
    """Around a server: without the headers that threads need."""

    async def without(scope, receive, send):
        async def bare(message):
            if message["type"] == "http.response.start":
                kept = [one for one in message["headers"] if not one[0].lower().startswith(b"cross-origin")]
                message = {**message, "headers": kept}
            await send(message)

        await app(scope, receive, bare)

    return without


def test_without_threads(site, paint, visit, serve_site):
    """A host that cannot send the headers: one thread at the first visit; later the service worker adds them."""
    page = visit(serve_site(site, wrap=plain).url)
    assert "one thread (the host sends no COOP and COEP headers)" in page.page.locator("#facts").text_content()
    paint(page)
    fast(page)
    page.run()
    page.page.wait_for_selector("body[data-kept=yes]")
    page.page.reload()
    page.page.wait_for_selector("#facts:has-text('threads: ')", state="attached")
    assert page.page.evaluate("crossOriginIsolated")


@pytest.mark.slow
def test_a_worker_that_cannot_be_loaded(site, paint, visit, serve_site):
    """The engine's own file is missing at first, as in an upload that is not complete."""

    class Missing:
        gone = True

        def __call__(self, app):
            async def answer(scope, receive, send):
                if self.gone and scope.get("path", "").endswith("/worker.js"):
                    await send({"type": "http.response.start", "status": 404, "headers": []})
                    await send({"type": "http.response.body", "body": b""})
                else:
                    await app(scope, receive, send)

            return answer

    missing = Missing()
    page = visit(serve_site(site, wrap=missing).url)
    assert page.page.locator("body").get_attribute("data-offline") == "no"
    paint(page)
    fast(page)
    page["run"].click()
    page.state("running")
    page.state("error")
    assert "The engine ended" in page.words()
    missing.gone = False
    page.run()


@pytest.mark.slow
def test_a_lost_gpu(site, paint, visit, on_swiftshader, serve_site):
    """The device is destroyed while a graph runs. The next run gets another worker and another device."""

    def with_devices(app):
        async def answer(scope, receive, send):
            async def prepended(message):
                if message["type"] == "http.response.start":
                    kept = [one for one in message["headers"] if one[0] != b"content-length"]
                    message = {**message, "headers": kept}
                elif message["type"] == "http.response.body" and message["body"]:
                    message = {**message, "body": KEEP_DEVICES.encode() + message["body"]}
                await send(message)

            worker = scope.get("path", "").endswith("/site/worker.js")
            await app(scope, receive, prepended if worker else send)

        return answer

    page = visit(serve_site(site, wrap=with_devices).url, browser=on_swiftshader)
    page.page.set_default_timeout(400_000)
    mask = paint(page)
    fast(page)
    page["run"].click()
    page.page.wait_for_selector("#status:has-text('Checking this device')")
    worker = next(one for one in page.page.workers if one.url.endswith("/site/worker.js"))  # others: its threads
    assert worker.evaluate("() => { self.devices.at(-1).destroy(); return self.devices.length; }") >= 1
    page.state("error")
    assert "The GPU was lost in the middle of the work" in page.words()
    assert page.saved("mask-save") == mask
    page.run()
