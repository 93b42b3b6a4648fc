"""A batch, a student and a teacher's answer, small enough for float64."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from moebius import Moebius, preset
from moebius.distill.losses import LossOptions, Prediction, Tap, distillation_losses
from moebius.distill.timesteps import Noised, add_noise, alphas_cumprod, sample_noise, sample_timesteps
from moebius.load import load_student

sys.path.insert(0, str(Path(__file__).parent))  # for distill_worker, which its processes import by name


class ToyDistance(torch.nn.Module):
    """A perceptual distance: squared differences after a fixed convolution and a nonlinearity."""

    def __init__(self, dtype):
        super().__init__()
        kernel = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
        self.register_buffer("kernel", kernel.to(dtype))

    def forward(self, x, y):
        seen = [torch.tanh(torch.nn.functional.conv2d(value, self.kernel, padding=1)) for value in (x, y)]
        return (seen[0] - seen[1]).square().mean(dim=(1, 2, 3))


@dataclass
class Scene:
    """What a training step has, and its losses."""

    student: Moebius
    sample: torch.Tensor
    ids: torch.Tensor
    batch: Noised
    teacher: Prediction
    distance: ToyDistance
    bars: torch.Tensor = field(default_factory=alphas_cumprod)
    options: LossOptions = field(default_factory=lambda: LossOptions(taps=(Tap(1, 2),)))

    def predict(self, rows=slice(None)) -> Prediction:
        return Prediction(*self.student.forward_features(self.sample[rows], self.batch.timesteps[rows], self.ids[rows]))

    def losses(self, options=None, rows=slice(None), student=None):
        batch = Noised(*(value[rows] for value in self.batch[:3]), self.batch.prediction_type)
        teacher = Prediction(self.teacher.output[rows], [feature[rows] for feature in self.teacher.features])
        student = student or self.predict(rows)
        return distillation_losses(
            options or self.options, student, batch, self.bars, teacher=teacher, perceptual=self.distance
        )


def make_scene(dtype=torch.float64, batch=3) -> Scene:
    config = preset("tiny").student
    student = load_student("stand-in:0", config)[0].to(dtype).train()
    student.set_lambda_form("fast")  # batch norms as written have wrong gradients on a CPU
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    shape = (batch, 4, config.sample_size, config.sample_size)
    clean, masked = normal(*shape), normal(*shape)
    mask = (normal(batch, 1, *shape[2:]) > 0).to(dtype)
    timesteps = sample_timesteps(batch, generator)
    noise = sample_noise(shape, generator).to(dtype)
    noisy = add_noise(clean, noise, timesteps, alphas_cumprod())
    teacher = Prediction(0.7 * noise + 0.3 * normal(*shape), [normal(batch, 32, 8, 8) for _ in range(3)])
    ids = torch.stack([(student.unconditional_ids, student.conditional_ids)[row % 2] for row in range(batch)])
    return Scene(
        student=student,
        sample=torch.cat([noisy, mask, masked], dim=1),
        ids=ids,
        batch=Noised(noisy, noise, timesteps),
        teacher=teacher,
        distance=ToyDistance(dtype),
    )


@pytest.fixture
def scene() -> Scene:
    """A step in float64."""
    return make_scene()


@pytest.fixture(scope="session")
def scene_of():
    """The function that makes steps of other types."""
    return make_scene
