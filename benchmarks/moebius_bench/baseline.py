"""The network as written, in eager PyTorch, behind the same interface as a runtime: the baseline of `--baseline torch`.

torch and the packages that hold the network are imported here, and only when this baseline is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moebius_runtime.backends.base import Array, Backend
from moebius_runtime.bundle import Bundle
from moebius_runtime.errors import InputError, RuntimeUnavailableError
from moebius_runtime.manifest import GraphName, WeightsInfo


def import_torch() -> Any:
    """The module `torch`.

    Raises:
        RuntimeUnavailableError: it or the network's package is not installed.
    """
    try:
        import torch

        import moebius.load  # noqa: F401
        import moebius_export.wrappers  # noqa: F401
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"the torch baseline needs PyTorch and the network, which cannot be imported ({error}). "
            'Install them with `pip install "moebius-edge[export]"`.'
        ) from error
    return torch


class TorchBackend(Backend):
    """Eager PyTorch on the CPU, with the weights that the bundle was exported from."""

    name = "torch"

    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, weights: str | None = None, vae: str | None = None
    ) -> None:
        from moebius_runtime.backends.ort import physical_cores

        super().__init__(bundle, threads=threads or physical_cores())
        self._torch = import_torch()
        self._torch.set_num_threads(self.threads)
        model = bundle.manifest.model
        self._sources = {
            "unet": _source(weights, model.unet, "--weights"),
            "vae": _source(vae, model.vae, "--vae"),
        }
        self._modules: dict[str, Any] = {}

    def _load(self, graph: GraphName) -> Any:
        from moebius import VaeDecoder, VaeEncoder
        from moebius_export.wrappers import ConditionalUNet, GuidedUNet

        wrappers = {
            "unet": GuidedUNet,
            "unet_conditional": ConditionalUNet,
            "vae_encoder": VaeEncoder,
            "vae_decoder": VaeDecoder,
        }
        network = self._network("unet" if graph.startswith("unet") else "vae")
        return wrappers[graph](network).eval()

    def _network(self, part: str) -> Any:
        """The student or the VAE, read once for the graphs that share it."""
        if part in self._modules:
            return self._modules[part]
        from moebius import preset
        from moebius.errors import CheckpointError
        from moebius.load import load_student, load_vae

        manifest = self.bundle.manifest
        try:
            sizes = preset(manifest.model.preset)
            if part == "unet":
                network, checkpoint = load_student(self._sources[part], sizes.student)
                expected = manifest.model.unet.sha256
            else:
                network, checkpoint = load_vae(self._sources[part], sizes.vae)
                expected = manifest.model.vae.sha256
        except CheckpointError as error:
            raise InputError(f"torch baseline: {error}") from error
        if checkpoint.sha256 != expected:
            raise InputError(
                f"torch baseline: {self._sources[part]} holds other {part} weights than the bundle was exported from "
                f"(SHA-256 {checkpoint.sha256[:12]}, the manifest says {expected[:12]}); name the source of the export"
            )
        self._modules[part] = network
        return network

    def _run(self, handle: Any, inputs: Mapping[str, Array]) -> Array:
        torch = self._torch
        with torch.inference_mode():
            output: Array = handle(*(torch.from_numpy(array) for array in inputs.values())).numpy()
        return output

    def describe(self) -> dict[str, str]:
        """Version and threads, read back from torch."""
        return {
            "runtime": self.name,
            "torch": str(self._torch.__version__),
            "providers": "eager, cpu",
            "threads": str(self._torch.get_num_threads()),
        }


def _source(given: str | None, weights: WeightsInfo, option: str) -> str:
    if given is not None:
        return given
    if weights.stand_in:
        return weights.origin
    raise InputError(
        f"the torch baseline needs the weights that the bundle was exported from ({weights.origin}); name them with "
        f"{option} hub:OWNER/REPO/FOLDER, a file or a folder"
    )
