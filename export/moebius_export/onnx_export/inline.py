"""A bundle of standard operators alone, made of a finished bundle: `moebius-export inline`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx

from moebius_export.errors import ExportError
from moebius_export.graph.cost import node_costs, total_macs
from moebius_export.graph.opened import Weights
from moebius_export.graph.sessions import session_of_functions
from moebius_export.graph.standard import INLINE_RULE, standard_only
from moebius_export.graph.webgpu import Read, for_webgpu
from moebius_export.onnx_export.parity import RELATIVE_BUDGET
from moebius_export.trajectories.scenes import seeded_inputs
from moebius_runtime.backends.ort import UNREAD
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.graph_files import function_domains
from moebius_runtime.bundle.manifest import (
    FileInfo,
    GraphName,
    Manifest,
    Parity,
    Precision,
    Rewrite,
    write_manifest,
)
from moebius_runtime.files import atomic_write, placed_whole, sha256_file

_SEED = 11


def standard_form(
    graph: GraphName, model: onnx.ModelProto, *, for_gpu: bool = False, read: Read | None = None
) -> tuple[onnx.ModelProto, list[Rewrite]]:
    """Returns a graph of standard operators, and its rewrites for the manifest.

    Args:
        graph: its name.
        model: its weights are not read.
        for_gpu: also apply the rules of `moebius_export.graph.webgpu`.
        read: see there.

    Raises:
        ExportError: see `standard_only` and `for_webgpu`.
    """
    result, calls = standard_only(model)
    rewrites = [Rewrite(graph=graph, name=INLINE_RULE, count=calls)] if calls else []
    if for_gpu:
        before = total_macs(node_costs(result))
        result, counts = for_webgpu(result, read)
        after = total_macs(node_costs(result))
        for name, count in counts.items():
            padded = {"macs_before": before, "macs_after": after} if name == "pad_conv_channels" else {}
            if count:
                rewrites.append(Rewrite(graph=graph, name=name, count=count, **padded))
    return result, rewrites


def inline_bundle(
    path: str | Path,
    out: Path,
    progress: Callable[[str], None] = lambda text: None,
    *,
    for_gpu: bool = False,
) -> Manifest:
    """Writes a bundle to `out` whose graphs have standard ONNX operators only, and returns its manifest.

    Every file with functions is written again and compared with the old one on seeded inputs. Weights files are
    copied. Engines stay behind, because they were built from the old files. The recorded distance from PyTorch grows
    by the measured one, which bounds it (triangle inequality).

    Args:
        path: of a bundle.
        out: a new folder.
        progress: called with each file.
        for_gpu: also lower Local-λ for the target `webgpu` and apply the rules of `moebius_export.graph.webgpu`, to
            the files in fp32 and fp16.

    Raises:
        BundleError: the bundle is damaged.
        ExportError: `out` exists, no file has functions, a file has an operator that is neither standard nor a
            function, or a new file does not give the old one's result.
        OutputError: the folder cannot be written.
    """
    bundle = Bundle.open(path)
    if out.exists():
        raise ExportError(f"--out {out} exists; name a new folder for the inlined bundle")
    made: dict[tuple[GraphName, Precision], Parity] = {}
    files = dict(bundle.manifest.files)
    rewrites = list(bundle.manifest.rewrites)
    with placed_whole(out) as folder:
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copyfile(bundle.path / name, folder / name)  # onnx.checker refuses weights with several hard links
        for graph, info in bundle.manifest.every_graph.items():
            for precision, file in info.files.items():
                old = bundle.model_file(graph, precision)
                for_this = for_gpu and precision in ("fp32", "fp16")
                if not function_domains(old) and not for_this:
                    continue
                progress(f"{graph} {precision}")
                model = onnx.load(str(old), load_external_data=False)
                if for_this:
                    model = _lowered(model)
                model, more = standard_form(graph, model, for_gpu=for_this, read=Weights(old.parent).array)
                new = folder / file.model
                with atomic_write(new) as stream:
                    stream.write(model.SerializeToString(deterministic=True))
                onnx.checker.check_model(str(new), full_check=True)
                files[file.model] = FileInfo(size=new.stat().st_size, sha256=sha256_file(new))
                made[graph, precision] = _compared(bundle, graph, precision, old, new)
                if precision == "fp32":
                    rewrites += more
        if not made:
            raise ExportError(f"{path}: no graph has functions, so all its operators are standard already")
        added: dict[str, Parity] = {graph: parity for (graph, precision), parity in made.items() if precision == "fp32"}
        parity = {name: _sum(old, added.get(name)) for name, old in bundle.manifest.parity.items()}
        update = {"files": files, "rewrites": rewrites, "parity": parity}
        manifest = Manifest.model_validate(bundle.manifest.model_copy(update=update).model_dump())
        write_manifest(manifest, folder)
    return manifest


def _lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with Local-λ as the target `webgpu` has it, where it is one node."""
    from moebius_export.lowering.lowering import shipped
    from moebius_export.lowering.relower import local_lambdas, relowered

    return relowered(model, shipped()["webgpu"]) if local_lambdas(model) else model


def _compared(bundle: Bundle, graph: GraphName, precision: Precision, old: Path, new: Path) -> Parity:
    """The difference of two files' outputs on seeded inputs. Precisions that no runtime here reads are not compared."""
    if precision in UNREAD:
        return Parity(relative_error=0.0, max_error=0.0)
    inputs = seeded_inputs(graph, bundle.manifest, _SEED)
    before, after = (_run(file, inputs) for file in (old, new))
    difference = after.astype(np.float64) - before
    error = float(np.linalg.norm(difference) / np.linalg.norm(before.astype(np.float64)))
    if not error <= RELATIVE_BUDGET:  # also catches NaN
        raise ExportError(
            f"{graph} {precision}: the inlined file differs from the one with functions by {error:.2e} (relative L2), "
            f"at most {RELATIVE_BUDGET:.0e} is allowed; nothing was written"
        )
    return Parity(relative_error=error, max_error=float(np.abs(difference).max()))


def _run(file: Path, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    output: np.ndarray = session_of_functions(file).run(None, dict(inputs))[0]
    return output


def _sum(old: Parity, more: Parity | None) -> Parity:
    if more is None:
        return old
    return Parity(relative_error=old.relative_error + more.relative_error, max_error=old.max_error + more.max_error)
