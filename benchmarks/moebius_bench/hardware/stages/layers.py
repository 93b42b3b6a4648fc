"""Stages `triton` and `layers`: the kernel and both λ layers against the original layers, then timed.

The reference is the original layer in float64 on the same device with the same inputs. Times count only for layers
that hold.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from moebius_bench.hardware.network import reduced
from moebius_bench.hardware.probe import limit_threads, strict_float32
from moebius_bench.hardware.recorder import NotRunError, Recorder, need
from moebius_bench.hardware.timing import TooSlowError, interleaved, synchronizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moebius.network.lambda_layers import LambdaForm
    from moebius_bench.paper.layers import LayerCase

# Relative L2 error of the kernel against float64 on the same rounded inputs: the limits of
# tests/moebius/test_triton_lambda.py, which name their sources.
KERNEL_LIMITS = {"fp32": 1e-6, "fp16": 6e-4, "bf16": 8e-3}
KERNEL_CASES = (((64, 64), 40), ((32, 32), 80), ((16, 16), 160), ((7, 9), 12))  # (H, W), depth; 8 heads, window 15
# The gradients are those of the fast layer. Four times (float32: ten times) what it gives on a CPU at 16x16 and depths
# 40 and 160: 3.0e-7, 3.6e-4 and 2.9e-3.
GRADIENT_LIMITS = {"fp32": 3e-6, "fp16": 1.5e-3, "bf16": 1.2e-2}
# A layer in float32 against float64. On a CPU every layer is within 2.2e-6 at full size; a GPU's convolutions may use
# Winograd's algorithm, which rounds some ten times more. One wrong tap of 225 makes 6e-2.
LAYER_LIMIT = 3e-5
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_ROUNDS = 20
_BATCH = 2


def run_triton(record: Recorder) -> None:
    """The Triton kernel on the GPU: outputs and gradients at the released sizes and an odd one, in three types."""
    if record.request.device != "cuda":
        raise NotRunError("the kernel runs on CUDA; its tests run it in Triton's interpreter on the CPU")
    need("torch", "triton")
    import torch

    from moebius.network.lambda_ops import local_lambda_reference
    from moebius.network.triton_lambda import local_lambda_triton, unavailable

    device = torch.device(record.request.device)
    if problem := unavailable(device):
        raise NotRunError(problem)
    strict_float32(torch)
    for size, depth in KERNEL_CASES:
        for precision, limit in KERNEL_LIMITS.items():
            subject = f"kernel at {size[0]}x{size[1]}, depth {depth}, {precision}"
            inputs, gradient = _kernel_inputs(size, depth, precision, device)
            expected = _with_gradients(local_lambda_reference, [t.double() for t in inputs], gradient.double(), size)
            got = _with_gradients(local_lambda_triton, inputs, gradient, size)
            record.at_most(subject, "output, relative error", _error(got[0], expected[0]), limit)
            worst = max(_error(a, b) for a, b in zip(got[1:], expected[1:], strict=True))
            record.at_most(subject, "gradients, largest relative error", worst, GRADIENT_LIMITS[precision])


def _kernel_inputs(
    size: tuple[int, int], depth: int, precision: str, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Query, values, summary and window of 2 pictures with 8 heads and a window of 15, and the output's gradient."""
    import torch

    generator = torch.Generator().manual_seed(depth)
    positions = size[0] * size[1]
    shapes = [(2, positions, 8 * depth), (2, positions, depth), (2, depth, depth), (depth, 15, 15)]
    tensors = [torch.randn(shape, generator=generator) for shape in (*shapes, shapes[0])]
    *inputs, gradient = (tensor.to(device, getattr(torch, _DTYPES[precision])) for tensor in tensors)
    return inputs, gradient


def _with_gradients(operator: object, inputs: list[Tensor], gradient: Tensor, size: tuple[int, int]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output: Tensor = operator(*leaves, size)  # type: ignore[operator]
    output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def run_layers(record: Recorder) -> None:
    """Both λ layers at every size: every implementation against float64, then all of them timed."""
    need("torch")
    import torch

    limit_threads(record, torch)
    strict_float32(torch)
    reduced(record, lambda name: _layers(record, name))


def _layers(record: Recorder, preset_name: str) -> None:
    import torch

    from moebius.network.triton_lambda import unavailable
    from moebius_bench.paper.layers import case_title, layer_cases

    device = record.request.device
    forms: list[LambdaForm] = ["reference", "fast"]
    if problem := unavailable(torch.device(device)):
        record.note(f"the implementation 'triton' was left out: {problem}")
    else:
        forms.append("triton")
    cases = list(layer_cases(preset_name, _BATCH, device))
    sound: dict[str, list[LambdaForm]] = {}
    for case in cases:
        subject = f"{case_title(case)}, preset {preset_name}"
        expected = _in_float64(case)
        for form in forms:
            if form == "triton" and not case.name.startswith("Local"):
                continue  # Interactive-λ has no kernel and runs the fast layer
            if _agrees(record, f"{subject}, {form}", case, form, expected):
                sound.setdefault(case.name + str(case.size), []).append(form)
    for number, case in enumerate(cases):
        share = (record.left - 2) / (2 * (len(cases) - number))
        for precision in ("fp32", "bf16"):
            _time(record, case, preset_name, precision, sound.get(case.name + str(case.size), []), share)


def _in_float64(case: LayerCase) -> dict[str, Tensor]:
    from moebius_bench.paper.layers import form_results

    layer = copy.deepcopy(case.layer).double()
    inputs = [tensor.detach().double().requires_grad_() for tensor in case.inputs]
    wide = replace(case, layer=layer, inputs=inputs, gradient=case.gradient.double())
    return form_results(wide, "reference", {name: value.clone() for name, value in layer.state_dict().items()})


def _agrees(record: Recorder, subject: str, case: LayerCase, form: LambdaForm, expected: dict[str, Tensor]) -> bool:
    """Checks outputs, gradients and statistics of an implementation against float64; two checks."""
    from moebius_bench.paper.layers import form_results

    before = {name: value.clone() for name, value in case.layer.state_dict().items()}
    got = form_results(case, form, before)
    case.layer.load_state_dict(before)
    errors = {name: _error(got[name], value) for name, value in expected.items()}
    gradients = {name: error for name, error in errors.items() if "gradient" in name}
    rest = {name: error for name, error in errors.items() if "gradient" not in name}
    held = True
    for name, group in (("outputs and statistics", rest), ("gradients", gradients)):
        worst = max(group, key=lambda key: group[key])
        held &= record.at_most(subject, f"{name}, largest relative error", group[worst], LAYER_LIMIT, worst)
    return held


def _time(
    record: Recorder, case: LayerCase, preset_name: str, precision: str, forms: list[LambdaForm], seconds: float
) -> None:
    """Forward in inference, and forward and backward in training, of the implementations that passed."""
    import torch

    from moebius.network.lambda_layers import set_lambda_form
    from moebius_bench.paper.layers import SizedLayer, case_title
    from moebius_export.network.module_cost import module_macs

    if len(forms) < 2:
        return
    dtype: torch.dtype = getattr(torch, _DTYPES[precision])
    layer = copy.deepcopy(case.layer).to(dtype)
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in case.inputs]
    typed = replace(case, layer=layer, inputs=inputs, gradient=case.gradient.to(dtype))
    set_lambda_form(layer, "fast")
    macs = module_macs(SizedLayer(typed).eval(), inputs)["all"]
    values = sum(p.numel() for p in layer.parameters()) + sum(t.numel() for t in inputs) + typed.gradient.numel()
    wait = synchronizer(torch, record.request.device)
    for passes, run in (("forward", typed.forward), ("forward and backward", typed.both)):
        layer.train(passes != "forward")

        def work(form: LambdaForm, run: object = run) -> None:
            set_lambda_form(layer, form)
            typed.clear()
            run()  # type: ignore[operator]

        subject = f"{case_title(case)}, batch {_BATCH}, {passes}, preset {preset_name}"
        try:
            times = interleaved(
                {form: lambda form=form: work(form) for form in forms},  # type: ignore[misc]
                wait,
                seconds=seconds / 2,
                most=2 if record.request.quick else _ROUNDS,
            )
        except TooSlowError as error:
            record.note(f"{subject}, {precision}: not timed, {error}")
            continue
        bound = record.bound(values * dtype.itemsize, macs, precision) if passes == "forward" else None
        for form in forms:
            record.timing(subject, form, precision, times[form], bound)
        for form in forms[1:]:
            record.speedup(subject, precision, "reference", form, (times["reference"], times[form]))
