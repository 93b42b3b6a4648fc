"""The command `moebius-export inline`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebius_runtime import console
from moebius_runtime.errors import InputError


def inline(
    bundle: Annotated[Path, typer.Argument(help="Folder that `moebius-export onnx` wrote.")],
    out: Annotated[Path, typer.Option(help="New folder for the bundle of standard operators.")],
    target: Annotated[
        str | None,
        typer.Option(help="webgpu: also apply the rewrites for ONNX Runtime's WebGPU provider. Default: none."),
    ] = None,
) -> None:
    """Writes a copy of a bundle with standard ONNX operators only, for OpenVINO, ncnn, TVM and other readers.

    Each new file is compared with the old one. Engines are not copied. The compiled kernels of ort-cpu need the
    functions of the original bundle: keep it for that runtime.
    """
    if target not in (None, "webgpu"):
        raise InputError(f"--target {target}: expected webgpu, or leave it out")
    from moebius_export.graph.standard import INLINE_RULE
    from moebius_export.graph.webgpu import RULES
    from moebius_export.onnx_export.inline import inline_bundle

    with console.err.status("inline") as status:
        manifest = inline_bundle(
            bundle, out, lambda text: status.update(console.one_line(text)), for_gpu=target == "webgpu"
        )
    for rewrite in manifest.rewrites:
        if rewrite.name in (INLINE_RULE, *RULES):
            console.out.print(f"{rewrite.graph:<17} {rewrite.name} {rewrite.count}")
