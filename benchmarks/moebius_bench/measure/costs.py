"""Multiply-accumulates of each graph: from the ONNX file, or, for the torch baseline, from the network itself."""

from __future__ import annotations

from typing import Any, cast

from moebius_bench.measure.worker_job import Job
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import Manifest, Precision
from moebius_runtime.errors import RuntimeUnavailableError

STAGE_GRAPHS = {"encode": ("vae_encoder",), "step": ("unet", "unet_conditional"), "decode": ("vae_decoder",)}


# Calls of the U-Net graphs hold this many guidance branches, each a sample of the paper's count.
BRANCHES = {"unet": 2, "unet_conditional": 1}


def branches_of(graph: str, manifest: Manifest) -> int:
    """Guidance branches in a call of a U-Net graph: `BRANCHES`, but one where guidance is distilled."""
    return BRANCHES[graph] if manifest.guidance is None else 1


def count_bundle(job: Job) -> dict[str, dict[str, int]]:
    """Graph -> `{"all": MACs, "convolutions": MACs, "bytes": MACs of two bytes}` for every graph of a bundle.

    Of a graph without a file of the precision the one that runs is counted: the autoencoder often has fp32 alone.

    Raises:
        RuntimeUnavailableError: counting needs the `onnx` package, which is not installed.
        MoebiusError: the bundle or a graph cannot be counted.
    """
    bundle = Bundle.open(job.bundle)
    if job.runtime == "torch" and job.baseline:
        from moebius_export.network.torch_runtime import import_torch

        import_torch()
        return count_torch(bundle.manifest.model.preset, distilled=bundle.manifest.guidance is not None)
    try:
        from moebius_export.graph import cost
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"the cost of a graph is counted with the onnx package, which cannot be imported ({error}); "
            'install it with `pip install "moebius-edge[export]"`, or do without'
        ) from error
    counted = {}
    for name in bundle.manifest.graphs:
        precision = bundle.precision_of(name, (cast(Precision, job.precision), "fp32"))
        costs = cost.node_costs(bundle.model_file(name, precision))
        counted[str(name)] = {
            "all": cost.total_macs(costs),
            "convolutions": cost.convolution_macs(costs),
            "bytes": cost.byte_macs(costs),
        }
    return counted


def count_torch(preset_name: str, parameters: bool = False, *, distilled: bool = False) -> dict[str, dict[str, int]]:
    """The same for the unfused network, by torch's operation counter on the meta device, without computation.

    With `parameters`, the entry `parameters` holds the number of the student's parameters under `all`. With
    `distilled`, the graph `unet` is one branch, as that of a network whose guidance is distilled.
    """
    import torch

    from moebius import Moebius, VaeDecoder, VaeEncoder, preset
    from moebius.network.vae import build_vae
    from moebius_export.network.module_cost import module_macs
    from moebius_export.network.wrappers import ConditionalUNet, unet_graphs

    sizes = preset(preset_name)
    side, channels = sizes.student.sample_size, sizes.vae.latent_channels
    pixels = side * sizes.vae.downscale
    with torch.device("meta"):
        student, vae = Moebius(sizes.student).eval(), build_vae(sizes.vae).eval()
        sample, timestep = torch.empty(1, sizes.student.in_channels, side, side), torch.empty(1, dtype=torch.int64)
        calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
            name: (module, (sample, timestep, *(() if isinstance(module, ConditionalUNet) else (torch.empty(1),))))
            for name, module in unet_graphs(student, distilled=distilled).items()
        }
        calls |= {
            "vae_encoder": (VaeEncoder(vae), (torch.empty(1, 3, pixels, pixels),)),
            "vae_decoder": (VaeDecoder(vae), (torch.empty(1, channels, side, side),)),
        }
        counted = {name: module_macs(module, inputs) for name, (module, inputs) in calls.items()}
    if parameters:
        counted["parameters"] = {"all": sum(p.numel() for p in student.parameters())}
    return counted
