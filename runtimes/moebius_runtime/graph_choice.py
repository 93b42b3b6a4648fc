"""Which graphs of a bundle a run takes, by its settings and by what the runtime has."""

from __future__ import annotations

from collections.abc import Iterable

from moebius_runtime.backends.base import Backend
from moebius_runtime.bundle.manifest import GraphName
from moebius_runtime.decoding import MASKED
from moebius_runtime.errors import InputError
from moebius_runtime.settings.modes import Settings
from moebius_runtime.settings.options import InpaintOptions

TINY: tuple[GraphName, ...] = ("vae_decoder_tiny",)
FULL: tuple[GraphName, ...] = ("vae_decoder",)


def branches(backend: Backend, settings: Settings, timestep: int) -> tuple[GraphName, float]:
    """The U-Net's graph for a step, and its guidance scale: 1 outside of the guidance interval.

    At scale 1 the guidance cancels out, so that the conditional branch alone gives the same at half the cost.
    """
    low, high = settings.guidance_interval or (timestep, timestep)
    scale = settings.guidance_scale if low <= timestep <= high else 1.0
    alone = scale == 1 and backend.has("unet_conditional")
    return "unet_conditional" if alone else "unet", scale


def unets(backend: Backend, settings: Settings, timesteps: Iterable[int]) -> tuple[GraphName, ...]:
    """The U-Net's graphs that the steps at `timesteps` take, each once."""
    return tuple(dict.fromkeys(branches(backend, settings, timestep)[0] for timestep in timesteps))


def decoders(backend: Backend, settings: Settings, options: InpaintOptions) -> tuple[GraphName, ...]:
    """The graphs that decode: `TINY`, `MASKED` or `FULL`.

    A mode's default that the bundle or the runtime cannot serve gives `FULL`; `decoder_note` names it.

    Raises:
        InputError: an explicit option cannot be served.
    """
    for wanted, explicit, graphs, option, how in (
        (settings.vae_decoder == "tiny", options.vae_decoder, TINY, "vae-decoder", " --tiny-decoder FILE"),
        (settings.decode == "masked", options.decode, MASKED, "decode", ""),
    ):
        if wanted and all(map(backend.has, graphs)):
            return graphs
        if wanted and explicit:
            raise InputError(
                f"{option} {explicit!r}: {_missing(backend, graphs)}. Use {option} full, or export the bundle again "
                f"(moebius-export onnx{how}) and run it with ort-cpu, openvino or torch"
            )
    return FULL


def decoder_note(backend: Backend, settings: Settings, options: InpaintOptions) -> str | None:
    """A note where the mode's own decoder is not there and the whole square is decoded in its place."""
    wanted = TINY if settings.vae_decoder == "tiny" else MASKED if settings.decode == "masked" else FULL
    if decoders(backend, settings, options) == wanted:
        return None
    return (
        f"mode {options.mode} would decode faster, but {_missing(backend, wanted)}: the whole square is decoded in full"
    )


def _missing(backend: Backend, graphs: tuple[GraphName, ...]) -> str:
    absent = [graph for graph in graphs if graph not in backend.bundle.manifest.every_graph]
    if absent:
        return f"{backend.bundle.path} has no graph {', '.join(absent)}"
    return f"runtime {backend.name} has no {', '.join(graph for graph in graphs if not backend.has(graph))}"
