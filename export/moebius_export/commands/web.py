"""The command `moebius-export web`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebius_runtime import console


def web(
    bundle: Annotated[Path, typer.Argument(help="Folder that `moebius-export onnx` wrote.")],
    out: Annotated[Path, typer.Option(help="New folder for the site, or an older site, which is replaced.")],
    fp16: Annotated[
        bool,
        typer.Option(
            "--fp16",
            help="Half the download: the bundle's mixed-precision files, or new ones by a plan of "
            "`moebius-export precision` where it has none.",
        ),
    ] = False,
    onnxruntime_web: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the npm package onnxruntime-web. Default: it is downloaded from the npm registry "
            "(npm_config_registry) once."
        ),
    ] = None,
) -> None:
    """Writes a static site that runs the bundle in a browser, on WebGPU or WebAssembly: the page of moebius-serve.

    Any static web server can serve it, `moebius-serve --site SITE` too. Nothing is loaded from another host.
    """
    from moebius_export.web.site import export_site, shard_sizes

    with console.err.status("web") as status:
        site = export_site(
            bundle,
            out,
            fp16=fp16,
            onnxruntime_web=onnxruntime_web,
            progress=lambda text: status.update(console.one_line(text)),
            note=console.warn,
        )
    sizes = shard_sizes(site["graphs"])
    for name, graph in site["graphs"].items():
        console.out.print(f"{name:<17} {graph['nodes']:,} nodes")
    console.out.print(
        f"{out}: {site['precision']}, {site['size'] / 1e6:,.0f} MB in {len(sizes)} shards of at most "
        f"{max(sizes.values()) / 1e6:,.0f} MB. Serve it: moebius-serve --site {out}"
    )
    if site["test_weights"]:
        console.warn("this bundle has stand-in weights (random numbers): the picture inside the mask is noise")
