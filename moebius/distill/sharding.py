"""Parameters that FSDP has spread over processes, as whole tensors and back.

accelerate with `fsdp_version: 2` calls torch's `fully_shard`: a parameter becomes a DTensor of which each process holds
some rows; for a forward and backward pass it is gathered. Momenta are spread as their parameters are. Checkpoints,
averages and finished weights are whole, so they are the same files with and without FSDP.

`whole` and what uses it gather, so every process must call them, in the same order.
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
    """The gathered tensor; one that is not spread is returned as it is."""
    if not isinstance(value, DTensor):
        return value
    gathered: Tensor = value.detach().full_tensor()  # type: ignore[attr-defined]  # `detach` is typed as Tensor's
    return gathered


def spread_as(value: Tensor, like: Tensor) -> Tensor:
    """This process' part of a whole tensor that all processes have, cut as `like` is; no process is asked for it."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """A state dict of whole tensors that share no memory, as safetensors asks."""
    return {name: whole(value.detach()).clone() for name, value in network.state_dict().items()}


def load_whole_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what `whole_state` gave, strictly, whatever the network is spread over now."""
    ours = network.state_dict()
    cut = {name: spread_as(value, ours[name]) if name in ours else value for name, value in state.items()}
    network.load_state_dict(cut, strict=True)


class _Whole:
    """Parameters and buffers of a network, whole: what `AveragedModel` asks a network for."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def parameters(self) -> Iterator[Tensor]:
        return (whole(parameter.detach()) for parameter in self._network.parameters())

    def buffers(self) -> Iterator[Tensor]:
        return self._network.buffers()


def to_average(network: nn.Module) -> nn.Module:
    """What an average of whole tensors is updated with. All of the network is gathered on the way."""
    return cast(nn.Module, _Whole(network)) if is_spread(network) else network


def is_spread(network: nn.Module) -> bool:
    """Whether FSDP holds the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def gathered_by_forward(parameter: nn.Parameter, name: str) -> nn.Parameter:
    """A parameter after the forward pass, as the losses' graph has it.

    Raises:
        TrainingError: FSDP has let go of it again, so no gradient can be taken by it.
    """
    if isinstance(parameter, DTensor):
        raise TrainingError(
            f"losses are balanced at {name}, which FSDP gave away again after the forward pass; write "
            "`fsdp_reshard_after_forward: false` in accelerate's configuration, or `balance: {enabled: false}`"
        )
    return parameter


def check_environment() -> None:
    """Refuses, before accelerate does so in its own words, what `accelerate launch` asks for and cannot be had.

    Raises:
        TrainingError: FSDP of version 1, or without an accelerator.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return
    _check_version(os.environ.get("FSDP_VERSION", "1"))
    if not torch.accelerator.is_available():
        raise TrainingError(
            "FSDP is asked for and there is no accelerator to spread parameters over; run without it "
            "(`accelerate launch --cpu`, or `torchrun`)"
        )


def check_distribution(accelerator: Accelerator, *, samples_need_average: bool = False) -> None:
    """Refuses what would train otherwise than it says.

    Raises:
        TrainingError: FSDP of a kind that is not served, or processes that accelerate does not join.
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
    """Refuses fp16 where accelerate has no gradient scaler: it would train in float32 and not report it.

    Raises:
        TrainingError: fp16 is asked for on a CPU.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise TrainingError(
            f"precision: fp16 needs a GPU, and this run is on {accelerator.device.type}; write `bf16` or `fp32`"
        )


def before_prepare(accelerator: Accelerator, module: nn.Module) -> None:
    """Gives a module that FSDP will spread the forward pass that accelerate gives all others: under autocast, with
    float32 outputs. Called before `prepare`; without FSDP, or in float32, it changes nothing.

    Raises:
        TrainingError: the configuration names layers to spread by themselves that the module has not.
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
