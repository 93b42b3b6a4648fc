"""`moebius-bench browser`: the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebius_runtime import console
from moebius_runtime.errors import InputError
from moebius_runtime.files import atomic_write, check_writable


def browser(
    sites: Annotated[list[Path], typer.Argument(help="Folders of `moebius-export web`; the first is the baseline.")],
    graph: Annotated[str, typer.Option(help="Graph to run, such as unet, vae_encoder or vae_decoder.")] = "unet",
    provider: Annotated[str, typer.Option(help="wasm or webgpu.")] = "wasm",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of WebAssembly. Default: the physical cores.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; each runs the graph of every site once.")] = 3,
    chromium: Annotated[
        str | None, typer.Option(help="Chromium's program. Default: the one that is installed.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures, as JSON.")] = None,
) -> None:
    """Times one graph of sites in Chromium, headless and interleaved (needs playwright)."""
    from moebius_bench.browser.measure import measure
    from moebius_bench.browser.table import table
    from moebius_bench.report.text_report import wide
    from moebius_runtime.hardware.processors import physical_cores

    if provider not in ("wasm", "webgpu"):
        raise InputError(f"--provider {provider}: expected wasm or webgpu")
    if json_file is not None:
        check_writable(json_file)
    result = measure(
        sites,
        graph,
        provider="wasm" if provider == "wasm" else "webgpu",
        threads=threads or physical_cores(),
        rounds=rounds,
        chromium=chromium,
        progress=lambda text: console.err.print(text, style="dim", highlight=False),
    )
    wide(console.out).print(table(result), soft_wrap=False)
    if json_file is not None:
        with atomic_write(json_file) as stream:
            stream.write(result.model_dump_json(indent=1).encode())
