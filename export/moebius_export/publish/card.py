"""The model card of a bundle: what it is, whose weights it holds, under which licence, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moebius_export.errors import ExportError
from moebius_export.publish.figures import Table, export_tables
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.hub import HubName
from moebius_runtime.bundle.manifest import WeightsInfo
from moebius_runtime.console import one_line

MARKER = "<!-- Written by moebius-export push. Remove this line to keep your own text at the next push. -->"
OWN_LICENCE = "apache-2.0"  # of this project, and of the weights that it ships
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_TEMPLATES = Path(__file__).with_name("templates")
_HUB_ORIGIN = re.compile(r"hub:([^/@; ]+/[^/@; ]+)[^@; ]*(?:@([0-9a-f]{40}))?")


@dataclass(frozen=True)
class Licence:
    """A licence by its identifier on the hub, and a sentence on where that is known from."""

    identifier: str
    reason: str


def origin_repository(weights: WeightsInfo) -> tuple[str, str | None] | None:
    """The repository (OWNER/REPO) and commit that weights were downloaded from; None if they have another origin."""
    match = _HUB_ORIGIN.match(weights.origin)
    return (match[1], match[2]) if match and not weights.stand_in else None


def licence_of(bundle: Bundle, given: str | None, looked_up: dict[str, str | None]) -> Licence:
    """The licence of a bundle's weights.

    Args:
        bundle: the bundle.
        given: the identifier that the user gave; it is taken unconditionally.
        looked_up: the licence that each repository of `origin_repository` states for its weights, if any.

    Raises:
        ExportError: the identifier is malformed, or the licence is unknown or not the same for U-Net and VAE.
    """
    if given is not None:
        if not _LICENCE.fullmatch(given):
            raise ExportError(
                f"--license {given[:80]!r}: expected an identifier of the hub, such as apache-2.0 or other"
            )
        return Licence(given, "as stated by the publisher")
    found: dict[str, list[str]] = {}
    for part, weights in (("U-Net", bundle.manifest.model.unet), ("VAE", bundle.manifest.model.vae)):
        source, repository = weights.origin.partition("; ")[0], origin_repository(weights)
        if weights.stand_in:
            known, reason = OWN_LICENCE, f"the {part} holds random test weights made by moebius-edge"
        elif source.startswith("shipped:"):
            known, reason = OWN_LICENCE, f"the {part} comes with moebius-edge ({source})"
        elif repository is not None and (stated := looked_up.get(repository[0])) and _LICENCE.fullmatch(stated):
            known, reason = stated, f"the {part}'s weights are published under it as {repository[0]}"
        else:
            raise ExportError(
                f"{bundle.name}: the licence of the {part}'s weights ({source[:200]}) is not known; name it with "
                "--license, such as --license apache-2.0 (`other` where the hub has no identifier)"
            )
        found.setdefault(known, []).append(reason)
    if len(found) > 1:
        raise ExportError(
            f"{bundle.name}: its weights have the licences {' and '.join(sorted(found))}; name the one that holds for "
            "the whole bundle with --license"
        )
    ((identifier, reasons),) = found.items()
    return Licence(identifier, "; ".join(reasons))


def model_card(bundle: Bundle, target: HubName, licence: Licence, reports: Sequence[Table] = ()) -> str:
    """Returns the card as Markdown with the hub's metadata in front, ending in a newline.

    Args:
        bundle: the bundle; the plans in it are read.
        target: the repository that the card is for.
        licence: of the weights.
        reports: further measurements.

    Raises:
        ExportError: a plan in the bundle is damaged.
    """
    manifest = bundle.manifest
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = _cell
    precisions = list(manifest.graphs["unet"].files)
    random = " (random test weights)" if manifest.stand_in else ""
    text = environment.get_template("card.md.jinja").render(
        metadata=_metadata(bundle, licence),
        marker=MARKER,
        name=target.repo.partition("/")[2] + random,
        repo=target.repo,
        stand_in=manifest.stand_in,
        model=manifest.model,
        geometry=manifest.geometry,
        defaults=manifest.defaults,
        engine=next((one for one in ("fp16", "bf16", "fp32", "int8", "fp8") if one in precisions), None),
        licence=f"`{licence.identifier}`: {_cell(licence.reason)}.",
        sizes=[(precision, *_size(bundle, _needed(bundle, precision))) for precision in precisions],
        whole=_size(bundle, set(manifest.files)),
        tables=[*export_tables(bundle), *reports],
        created=manifest.created,
        tools=", ".join(f"{name} {version}" for name, version in manifest.tools.items()) or "unknown tools",
    )
    return text if text.endswith("\n") else text + "\n"


def _metadata(bundle: Bundle, licence: Licence) -> str:
    """The YAML block of the hub, written by huggingface_hub, which quotes what YAML would read otherwise."""
    from huggingface_hub import ModelCardData

    model = bundle.manifest.model
    bases = sorted({found[0] for one in (model.unet, model.vae) if (found := origin_repository(one)) is not None})
    tags = ["moebius-edge", "onnx", "inpainting", *(["random-test-weights"] if bundle.manifest.stand_in else [])]
    given: dict[str, Any] = {"license_name": "see-below"} if licence.identifier == "other" else {}
    data = ModelCardData(
        license=licence.identifier, pipeline_tag="image-to-image", tags=tags, base_model=bases or None, **given
    )
    return str(data.to_yaml()).strip()


def _needed(bundle: Bundle, precision: Any) -> set[str]:
    """The files that a runtime of a precision reads."""
    graphs = bundle.manifest.graphs
    files = [graph.files[bundle.precision_of(name, (precision, "fp32"))] for name, graph in graphs.items()]
    return {path for file in files for path in file.paths}


def _size(bundle: Bundle, names: set[str]) -> tuple[int, str]:
    return len(names), f"{sum(bundle.manifest.files[name].size for name in names) / 1e6:,.1f}"


def _cell(text: str) -> str:
    """Text that stays in one cell of a Markdown table: on one line, without markup of its own."""
    return re.sub(r"([\\|<>`*_\[\]])", r"\\\1", one_line(str(text)))
