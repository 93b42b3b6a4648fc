"""Gathers parameters that FSDP shards over processes, and shards them again; checks accelerate's setup.

accelerate with `fsdp_version: 2` calls torch's `fully_shard`: a parameter becomes a DTensor of which each process holds
some rows, and is gathered for forward and backward passes. Momenta are sharded like their parameters. Checkpoints,
averages and final weights hold whole tensors, so their files do not depend on FSDP.

`whole` and its callers gather, so every process must call them, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from moebius.errors import TrainingError


def whole(value: Tensor) -> Tensor:
    """Gathers a sharded tensor; any other is returned unchanged."""
    if not isinstance(value, DTensor):
        return value
    gathered: Tensor = value.detach().full_tensor()  # type: ignore[attr-defined]  # `detach` is typed as Tensor's
    return gathered


def spread_as(value: Tensor, like: Tensor) -> Tensor:
    """Shards a whole tensor that all processes have like `like`, without communication."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """A state dict of whole tensors that share no memory, as safetensors requires."""
    return {name: whole(value.detach()).clone() for name, value in network.state_dict().items()}


def load_whole_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state of `whole_state`, strictly, into a sharded or unsharded network."""
    ours = network.state_dict()
    cut = {name: spread_as(value, ours[name]) if name in ours else value for name, value in state.items()}
    network.load_state_dict(cut, strict=True)


class _Whole:
    """Whole parameters and buffers of a network, the interface that `AveragedModel` uses."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def parameters(self) -> Iterator[Tensor]:
        return (whole(parameter.detach()) for parameter in self._network.parameters())

    def buffers(self) -> Iterator[Tensor]:
        return self._network.buffers()


def to_average(network: nn.Module) -> nn.Module:
    """Wraps a sharded network so that an average of whole tensors can be updated from it."""
    return cast(nn.Module, _Whole(network)) if is_spread(network) else network


def is_spread(network: nn.Module) -> bool:
    """Whether FSDP shards the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def gathered_by_forward(parameter: nn.Parameter, name: str) -> nn.Parameter:
    """Checks that a parameter is still gathered after the forward pass; returns it.

    Raises:
        TrainingError: FSDP has resharded it, so no gradient can be taken with respect to it.
    """
    if isinstance(parameter, DTensor):
        raise TrainingError(
            f"losses are balanced at {name}, which FSDP resharded after the forward pass; write "
            "`fsdp_reshard_after_forward: false` in accelerate's configuration, or `balance: {enabled: false}`"
        )
    return parameter


def check_environment() -> None:
    """Checks that the setup of `accelerate launch` is supported, with a clearer message than accelerate's.

    Raises:
        TrainingError: FSDP of version 1, or without an accelerator.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return
    _check_version(os.environ.get("FSDP_VERSION", "1"))
    if not torch.accelerator.is_available():
        raise TrainingError(
            "FSDP is requested and there is no accelerator to shard parameters over; run without it "
            "(`accelerate launch --cpu`, or `torchrun`)"
        )


def check_distribution(accelerator: Accelerator, *, samples_need_average: bool = False) -> None:
    """Checks that accelerate distributes the run as requested.

    Raises:
        TrainingError: an unsupported kind of FSDP, or processes that accelerate did not join.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_plugin(accelerator.state.fsdp_plugin)
        if samples_need_average:
            raise TrainingError("sample pictures with FSDP are made by the averaged network; switch `ema` on")
    asked = os.environ.get("WORLD_SIZE", "1")
    if asked != str(accelerator.num_processes):
        raise TrainingError(
            f"WORLD_SIZE is {asked} and accelerate joined {accelerator.num_processes}; start with `accelerate launch` "
            "or `torchrun`"
        )


def check_precision(accelerator: Accelerator) -> None:
    """Checks that fp16 has a gradient scaler; without one accelerate would silently train in float32.

    Raises:
        TrainingError: fp16 is requested on a CPU.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise TrainingError(
            f"precision: fp16 needs a GPU, and this run is on {accelerator.device.type}; write `bf16` or `fp32`"
        )


def before_prepare(accelerator: Accelerator, module: nn.Module) -> None:
    """Gives a module that FSDP will shard the forward pass of accelerate: under autocast, with float32 outputs.

    Call it before `prepare`. Without FSDP, or in float32, it changes nothing.

    Raises:
        TrainingError: the configuration names layers to shard that the module does not have.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    there = {type(part).__name__ for part in module.modules() if next(part.children(), None) is not None}
    if strange := set(accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap or ()) - there:
        raise TrainingError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(sorted(strange))}, which is no layer of "
            f"{type(module).__name__}; it has {', '.join(sorted(there - {type(module).__name__}))}"
        )
    if accelerator.native_amp:
        forward = module.forward

        def under_autocast(*inputs: Any, **named: Any) -> Any:
            with accelerator.autocast():
                return forward(*inputs, **named)

        module.forward = convert_outputs_to_fp32(under_autocast)


def _check_plugin(plugin: Any) -> None:
    _check_version(str(plugin.fsdp_version))
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise TrainingError(
            "fsdp_offload_params: true keeps parameters on the CPU, where averaged weights and checkpoints cannot be "
            "gathered; write `fsdp_offload_params: false`, and `ema: null` or more processes to save memory"
        )
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        raise TrainingError(
            "fsdp_auto_wrap_policy: SIZE_BASED_WRAP spreads whatever is large by itself, also layers whose weights "
            "their parents use; write `TRANSFORMER_BASED_WRAP` with `fsdp_transformer_layer_cls_to_wrap`, or `NO_WRAP`"
        )
    if plugin.activation_checkpointing:
        raise TrainingError(
            "accelerate's activation checkpointing renames layers; switch it off and write "
            "`gradient_checkpointing: true` in the settings"
        )
    # On by default, it hands out weights that one process has read, and fails on buffers, which batch norms have (it
    # looks for a buffer's mesh). Here each process reads the weights itself.
    plugin.cpu_ram_efficient_loading = False
    # For bf16 and fp16 accelerate has FSDP cast parameters and inputs. A batch norm whose statistics are float32 then
    # refuses its input, and norms, sums and losses lose bits. `before_prepare` puts autocast in its place.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def _check_version(version: str) -> None:
    if version != "2":
        raise TrainingError(
            f"FSDP version {version} flattens parameters, and Muon needs matrices; write `fsdp_version: 2` in "
            "accelerate's configuration"
        )
