"""Opens each site in a browser of its own, loads one graph there, and runs the graphs in turn."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from moebius_bench.measure.results import Summary
from moebius_bench.measure.stats import summary
from moebius_runtime.errors import InputError, MoebiusError

_WORKER = Path(__file__).with_name("worker.js")
_MINUTES = 30  # for loading a graph, and for one run of it

Provider = Literal["wasm", "webgpu"]


class BrowserError(MoebiusError):
    """The browser, the server or the graph in it failed."""


class TimedSite(BaseModel):
    """One graph of one site.

    Attributes:
        nodes: of the graph.
        bytes: of its files; `largest_file` of the largest.
        load_seconds: from the files in memory to a session.
        run_seconds: of the timed runs, one a round; the first run, which `error` comes from, is not among them.
        error: relative error of the first run against PyTorch's output; None for a site without check values.
        peak_bytes: of the tab's process, its whole life long (VmHWM); None where the system does not tell.
    """

    model_config = ConfigDict(frozen=True)

    site: str
    precision: str
    nodes: int
    bytes: int
    largest_file: int
    threads: int
    onnxruntime_web: str
    load_seconds: float
    run_seconds: Summary
    error: float | None
    peak_bytes: int | None


class BrowserTimes(BaseModel):
    """Times of the same graph in several sites, interleaved.

    Attributes:
        ratios: the first site's median over each site's.
    """

    model_config = ConfigDict(frozen=True)

    graph: str
    provider: Provider
    browser: str
    rounds: int
    sites: list[TimedSite]
    ratios: list[float]


def measure(
    sites: Sequence[Path],
    graph: str,
    *,
    provider: Provider = "wasm",
    threads: int,
    rounds: int,
    chromium: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> BrowserTimes:
    """Times one run of `graph` in each site, in turn, `rounds` times.

    Args:
        sites: folders of `moebius-export web`.
        graph: its name, such as `unet`.
        provider: what onnxruntime-web computes with.
        threads: of WebAssembly.
        rounds: at least 1; each runs every site once.
        chromium: the browser's program; None searches for it.
        progress: called with what is done next.

    Raises:
        InputError: a site lacks the graph, playwright is not installed, or there is no Chromium.
        BrowserError: a graph cannot be loaded or run there.
    """
    described = [_described(site, graph) for site in sites]
    program = chromium or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        raise InputError("no Chromium was found; install it, or name its program with --chromium PATH")
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise InputError("this needs playwright, which drives the browser: pip install playwright") from error
    plan = {"graph": graph, "provider": provider, "threads": threads}
    with ExitStack() as stack:
        try:
            playwright = stack.enter_context(sync_playwright())
            tabs, loads = [], []
            for site in sites:
                progress(f"{site}: loading {graph}")
                browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
                stack.callback(browser.close)
                tab = _Tab(browser, stack.enter_context(_served(site)))
                loads.append(tab.call(plan | {"root": tab.root}))
                tabs.append(tab)
            seconds: list[list[float]] = [[] for _ in sites]
            for number in range(rounds):
                for site, tab, mine in zip(sites, tabs, seconds, strict=True):
                    progress(f"{site}: run {number + 1} of {rounds}")
                    mine.append(tab.call(None))
            peaks = [tab.peak_bytes() for tab in tabs]
            version = browser.version
        except Error as error:
            raise BrowserError(f"the browser failed: {error.message.splitlines()[0]}") from error
    timed = [
        TimedSite(
            site=site.resolve().name,
            **facts,
            threads=load["threads"],
            onnxruntime_web=load["version"],
            load_seconds=load["load_seconds"],
            run_seconds=summary(mine),
            error=load["error"],
            peak_bytes=peak,
        )
        for site, facts, load, mine, peak in zip(sites, described, loads, seconds, peaks, strict=True)
    ]
    first = timed[0].run_seconds.median
    return BrowserTimes(
        graph=graph,
        provider=provider,
        browser=f"Chromium {version}",
        rounds=rounds,
        sites=timed,
        ratios=[first / one.run_seconds.median for one in timed],
    )


def _described(site: Path, graph: str) -> dict[str, Any]:
    """What `site.json` says of the graph."""
    file = site / "site.json"
    try:
        content = json.loads(file.read_bytes())
        graphs, precision = content["graphs"], content["precision"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: {error}; expected the folder of `moebius-export web BUNDLE --out SITE`") from error
    if graph not in graphs:
        raise InputError(f"{site} has no graph {graph}; it has {', '.join(sorted(graphs))}")
    files = graphs[graph]
    sizes = [shard["size"] for shards in (files["model"], *files["data"].values()) for shard in shards]
    return {"precision": precision, "nodes": files["nodes"], "bytes": sum(sizes), "largest_file": max(sizes)}


@contextmanager
def _served(site: Path) -> Iterator[str]:
    """`moebius-serve --site`, and the address that it printed."""
    command = [sys.executable, "-m", "moebius_serve.cli", "--site", str(site), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stderr is not None
        line = server.stdout.readline()
        if "http" not in line:
            raise BrowserError(f"moebius-serve --site {site} did not start: {server.stderr.read().strip()}")
        yield "http" + line.split("http", 1)[1].split()[0].split("#")[0]
    finally:
        server.terminate()
        server.communicate()


class _Tab:
    """A page of the site with a worker of ours."""

    def __init__(self, browser: Any, root: str) -> None:
        self.root = root
        self._browser = browser
        self._page = browser.new_page()
        self._page.set_default_timeout(_MINUTES * 60_000)
        self._page.goto(f"{root.rstrip('/')}/site.json")  # with the site's headers; index.html would start its engine
        self._page.evaluate(
            """(text) => {
              const address = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
              globalThis.timed = new Worker(address, { type: "module" });
            }""",
            _WORKER.read_text(encoding="utf-8"),
        )

    def call(self, message: dict[str, Any] | None) -> Any:
        """What the worker answers."""
        answer = self._page.evaluate(
            """(message) => new Promise((resolve) => {
              globalThis.timed.onmessage = ({ data }) => resolve(data);
              globalThis.timed.onerror = ({ message }) => resolve({ failed: message || "its worker did not start" });
              globalThis.timed.postMessage(message);
            })""",
            message,
        )
        if "failed" in answer:
            raise BrowserError(f"{self.root}: {answer['failed']}")
        return answer["done"]

    def peak_bytes(self) -> int | None:
        """The largest resident size that a renderer of this browser had."""
        processes = self._browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
        peaks = []
        for process in processes:
            status = Path(f"/proc/{process['id']}/status")
            if process["type"] == "renderer" and os.access(status, os.R_OK):
                peaks += [int(line.split()[1]) << 10 for line in status.read_text().splitlines() if "VmHWM" in line]
        return max(peaks, default=None)
