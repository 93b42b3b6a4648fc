"""Stage `training`: a step of the distillation with the original λ layers and with the fast ones."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from moebius_bench.hardware.network import WEIGHTS, reduced
from moebius_bench.hardware.probe import limit_threads, strict_float32
from moebius_bench.hardware.recorder import Recorder, need
from moebius_bench.hardware.timing import interleaved, synchronizer

if TYPE_CHECKING:
    from moebius.network.lambda_layers import LambdaForm

_BATCHES = {"full": 8, "small": 16, "tiny": 2}
_ROUNDS = 10
# The same batch and draws in float32, original against fast layers: the loss, and all gradients as one vector.
# 1e-6 and 2.4e-6 with the tiny preset on a CPU. A GPU's backward convolutions add in an order that changes from run to
# run, and the balance weights hold ratios of norms squared.
LOSS_LIMIT, GRADIENT_LIMIT = 1e-4, 2e-3


def run(record: Recorder) -> None:
    """Forward, backward and optimizer step; checks in float32, then times in float32 and, under autocast, bf16."""
    need("torch", "safetensors", "yaml", "accelerate", "huggingface_hub")
    import torch

    limit_threads(record, torch)
    strict_float32(torch)
    reduced(record, lambda name: _measure(record, name))


class _Step:
    """One training step of the student on a fixed batch of random latents."""

    def __init__(self, preset_name: str, device: str, batch: int, teacher: bool) -> None:
        import torch

        from moebius.data.encoded import LatentBatch
        from moebius.distill.loop.assembly import build_task
        from moebius.distill.optimizers import MuonAdamW
        from moebius.distill.settings import parse_settings

        losses: dict[str, Any] = {"perceptual": 0} if teacher else {"coarse": 0, "fine": 0, "perceptual": 0}
        if teacher and preset_name == "tiny":
            losses["taps"] = ["1:4"]  # two levels: the default tap is that of three
        content = {
            "train": "student",
            "out": "unused",
            "steps": 1,
            "batch": batch,
            "network": {"preset": preset_name},
            "init": WEIGHTS,
            "teacher": WEIGHTS if teacher else None,
            "data": {"latents": "unused"},  # the batch below takes its place
            "losses": losses,
        }
        settings = parse_settings(content, "the training stage")
        self.task = build_task(settings)
        self.device = torch.device(device)
        self.task.module.to(self.device).train()
        for frozen in self.task.frozen:
            frozen.to(self.device)
        sizes = settings.network.build()
        side, channels = sizes.student.sample_size, sizes.vae.latent_channels
        random = torch.Generator().manual_seed(5)
        mask = torch.zeros(batch, 1, side, side)
        mask[:, :, side // 4 : side // 2, side // 4 : side // 2] = 1
        latents, masked = (torch.randn(batch, channels, side, side, generator=random) for _ in range(2))
        ids = torch.arange(sizes.student.tokens).expand(batch, -1)
        self.batch = LatentBatch(latents, masked, mask, ids)
        self.optimizer = MuonAdamW(self.task.module.parameters(), settings.optimizer)

    def loss(self, form: LambdaForm, precision: str) -> Any:
        """The loss of the batch, with the same draws of noise and timesteps every time."""
        import torch

        from moebius.distill.loop.context import TrainContext
        from moebius.network.lambda_layers import set_lambda_form

        set_lambda_form(self.task.network, form)
        context = TrainContext(self.device, torch.Generator().manual_seed(6))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return self.task.outcome(self.task.module, self.batch, context).total

    def step(self, form: LambdaForm, precision: str) -> None:
        """Forward, backward, optimizer."""
        self.loss(form, precision).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient(self, form: LambdaForm) -> tuple[float, Any]:
        """The loss in float32, and all gradients as one vector in float64 on the CPU; none are kept."""
        import torch

        loss = self.loss(form, "fp32")
        loss.backward()
        parts = [p.grad.detach().double().flatten().cpu() for p in self.task.module.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        return float(loss.detach()), torch.cat(parts)


def _measure(record: Recorder, preset_name: str) -> None:
    import torch

    from moebius.network.triton_lambda import unavailable

    batch = _BATCHES[preset_name]
    step, subject = _build(record, preset_name, batch)
    forms: list[LambdaForm] = ["reference", "fast"]
    if unavailable(torch.device(record.request.device)) is None:
        forms.append("triton")
    state = {name: value.clone() for name, value in step.task.module.state_dict().items()}
    expected, wanted = step.gradient("reference")
    sound: list[LambdaForm] = ["reference"]
    for form in forms[1:]:
        step.task.module.load_state_dict(state)  # a forward pass in training changes batch norms' statistics
        loss, got = step.gradient(form)
        name = f"{subject}, {form}, fp32"
        close = record.at_most(name, "loss, relative error", abs(loss - expected) / abs(expected), LOSS_LIMIT)
        error = float((got - wanted).norm() / wanted.norm())
        if record.at_most(name, "gradients, relative error", error, GRADIENT_LIMIT) and close:
            sound.append(form)
    del wanted, state
    wait = synchronizer(torch, record.request.device)
    precisions = ("bf16", "fp32")
    for number, precision in enumerate(precisions):
        times = interleaved(
            {form: partial(step.step, form, precision) for form in sound},
            wait,
            seconds=(record.left - 3) / (len(precisions) - number),
            most=2 if record.request.quick else _ROUNDS,
        )
        for label, values in times.items():
            record.timing(subject, label, precision, values)
        for form in sound[1:]:
            record.speedup(subject, precision, "reference", form, (times["reference"], times[form]))
    last = float(step.loss(sound[-1], "fp32").detach())
    record.check(subject, "the loss is finite after the timed steps", math.isfinite(last), f"{last:.4g}")


def _build(record: Recorder, preset_name: str, batch: int) -> tuple[_Step, str]:
    from importlib.util import find_spec

    teacher = find_spec("diffusers") is not None
    if not teacher:
        record.note("the student was trained on the true noise alone: diffusers, which holds the teacher, is missing")
    step = _Step(preset_name, record.request.device, batch, teacher)
    what = "distillation step with the teacher" if teacher else "training step without a teacher"
    return step, f"{what}, batch {batch}, preset {preset_name}"
