"""The four losses against their formulas, and what is refused."""

import math

import pytest
import torch

from moebius.distill.objectives.losses import RELEASED_LOSSES, LossOptions, Prediction, Tap, distillation_losses
from moebius.distill.objectives.timesteps import Noised, alphas_cumprod
from moebius.errors import TrainingError


def test_each_loss_is_its_formula(scene):
    student, losses = scene.predict(), scene.losses()
    noise, true = student.output, scene.batch.target
    assert list(losses) == ["coarse", "task", "fine", "perceptual"]
    assert all(loss.dtype == torch.float64 and loss.shape == () for loss in losses.values())
    a = scene.bars.double()[scene.batch.timesteps][:, None, None, None]
    x0 = (scene.batch.latents - (1 - a).sqrt() * noise) / a.sqrt()
    x0_true = (scene.batch.latents - (1 - a).sqrt() * true) / a.sqrt()
    expected = {
        "coarse": ((student.features[1] - scene.teacher.features[2]) ** 2).sum() / student.features[1].numel(),
        "task": ((noise - true) ** 2).sum() / true.numel(),
        "fine": ((noise - scene.teacher.output) ** 2).sum() / true.numel(),
        "perceptual": scene.distance(x0, x0_true).sum() / len(true),
    }
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-12, atol=0, msg=name)


def test_a_velocity_leads_to_the_same_clean_latents(scene):
    """The perceptual loss of a network that predicts velocity, against the one of the noise that it means."""
    a = scene.bars.double()[scene.batch.timesteps][:, None, None, None]
    seen = scene.batch.latents

    def as_velocity(noise):
        return (noise - (1 - a).sqrt() * seen) / a.sqrt()  # v from eps: both are linear in the noisy latents

    options = LossOptions(coarse=0.0, task=0.0, fine=0.0)
    noise = scene.predict()
    moved = scene.batch._replace(target=as_velocity(scene.batch.target), prediction_type="v_prediction")
    got = distillation_losses(
        options, Prediction(as_velocity(noise.output), []), moved, scene.bars, perceptual=scene.distance
    )
    torch.testing.assert_close(got["perceptual"], scene.losses()["perceptual"], rtol=1e-9, atol=0)


def test_several_taps_add_up(scene):
    both = scene.losses(LossOptions(taps=(Tap(1, 2, 0.5), Tap(1, 0, 2.0))))["coarse"]
    one, other = (scene.losses(LossOptions(taps=(Tap(1, index),)))["coarse"] for index in (2, 0))
    torch.testing.assert_close(both, 0.5 * one + 2.0 * other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("names", [("coarse",), ("task",), ("fine", "perceptual"), ("coarse", "fine", "task")])
def test_a_loss_that_is_off_is_not_computed(scene, names):
    options = LossOptions(**{n: float(n in names) for n in ("coarse", "task", "fine", "perceptual")}, taps=(Tap(1, 2),))
    assert set(scene.losses(options)) == set(names) == set(options.active)


def test_without_a_teacher_the_other_losses_stand(scene):
    options = LossOptions(coarse=0.0, fine=0.0, perceptual=0.0, taps=())
    assert not options.needs_teacher
    losses = distillation_losses(options, scene.predict(), scene.batch, scene.bars)
    assert torch.equal(losses["task"], scene.losses()["task"])


def test_no_gradient_goes_into_the_teacher(scene):
    noise = scene.teacher.output.clone().requires_grad_()
    features = [feature.clone().requires_grad_() for feature in scene.teacher.features]
    losses = distillation_losses(
        scene.options,
        scene.predict(),
        scene.batch,
        scene.bars,
        teacher=Prediction(noise, features),
        perceptual=scene.distance,
    )
    sum(losses.values()).backward()
    assert noise.grad is None
    assert features[2].grad is None


def test_half_precision_answers_are_compared_in_float32(scene):
    """A difference whose square is below bfloat16's and float16's reach still counts."""
    for dtype in (torch.bfloat16, torch.float16):
        noise = torch.zeros(1, 4, 2, 2, dtype=dtype, requires_grad=True)
        batch = Noised(torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), 1e-5), torch.tensor([3]))
        options = LossOptions(coarse=0.0, fine=0.0, perceptual=0.0)
        loss = distillation_losses(options, Prediction(noise, []), batch, alphas_cumprod())["task"]
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(1e-10, rel=1e-4)


def test_the_released_multipliers():
    assert [RELEASED_LOSSES.multiplier(name) for name in RELEASED_LOSSES.active] == [0.01, 0.5, 0.01, 0.5]
    assert RELEASED_LOSSES.taps == (Tap(2, 5),)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coarse": -1.0}, "multiplier of coarse is -1.0"),
        ({"task": math.nan}, "multiplier of task is nan"),
        ({"taps": (Tap(2, 5, math.inf),)}, "tap 2:5 is inf"),
        ({"coarse": 0.0, "task": 0.0, "fine": 0.0, "perceptual": 0.0}, "all losses are off"),
        ({"taps": ()}, "compares no features"),
        ({"taps": (Tap(2, 5, 0.0),)}, "compares no features"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(TrainingError, match=words):
        LossOptions(**options)


def test_what_is_missing_is_named(scene):
    with pytest.raises(TrainingError, match="coarse and fine compare with a teacher"):
        distillation_losses(scene.options, scene.predict(), scene.batch, scene.bars, perceptual=scene.distance)
    with pytest.raises(TrainingError, match="multiplier 0 to train without it"):
        distillation_losses(scene.options, scene.predict(), scene.batch, scene.bars, teacher=scene.teacher)


@pytest.mark.parametrize(
    ("tap", "words"),
    [
        (Tap(9, 2), "no student feature 9; the student has 0 to 3"),
        (Tap(1, -1), "no teacher feature -1; the teacher has 0 to 2"),
        (Tap(0, 2), r"shape \[3, 32, 8, 8\] and the student's \[3, 16, 8, 8\]"),
    ],
)
def test_taps_that_do_not_fit_are_refused(scene, tap, words):
    with pytest.raises(TrainingError, match=words):
        scene.losses(LossOptions(taps=(tap,)))
