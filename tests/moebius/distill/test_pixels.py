"""The loss on decoded pixels: values and gradients against a slow computation, its part of a task, and its settings."""

import math

import numpy as np
import pytest
import torch

from moebius.data.encoded import LatentBatch
from moebius.distill.loop.assembly import build_task
from moebius.distill.loop.context import TrainContext
from moebius.distill.loop.crops import squares_on_mask
from moebius.distill.objectives.pixels import PixelOptions, inner_region, pixel_loss
from moebius.distill.objectives.timesteps import alphas_cumprod, predict_clean
from moebius.distill.settings import parse_settings
from moebius.errors import TrainingError

CONTENT = {
    "train": "student",
    "out": "unused",
    "steps": 1,
    "batch": 4,
    "network": {"preset": "tiny", "prediction_type": "v_prediction"},
    "vae": "stand-in",
    "data": {"latents": "unused"},
    "losses": {"coarse": 0, "fine": 0, "perceptual": 0},
    "timesteps": {"sampling": "uniform", "noise_offset": 0.0},
    "pixels": {"weight": 3.0, "crop": 8, "margin": 1, "gradient": 0.5, "most": 600},
}


def slow_loss(decoded, wanted, region, gradient):
    """The definition for one sample, pixel by pixel. [3, H, W], [3, H, W], [H, W] -> float."""
    channels, height, width = decoded.shape
    error = np.zeros_like(decoded)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                error[c, y, x] = (decoded[c, y, x] - wanted[c, y, x]) * region[y, x]
    values = channels * region.sum()
    if not values:
        return 0.0
    total = float(np.abs(error).sum() / values)
    for scale in range(3):
        block = 2**scale
        small = [
            [
                [error[c, y : y + block, x : x + block].mean() for x in range(0, width, block)]
                for y in range(0, height, block)
            ]
            for c in range(channels)
        ]
        steps = 0.0
        for plane in small:
            for y in range(height // block):
                for x in range(width // block):
                    steps += abs(plane[y + 1][x] - plane[y][x]) if y + 1 < height // block else 0.0
                    steps += abs(plane[y][x + 1] - plane[y][x]) if x + 1 < width // block else 0.0
        total += gradient * steps / (2 * values / block**2) / 3
    return total


def pictures(count=3, side=12):
    draws = torch.Generator().manual_seed(0)
    decoded, wanted = (torch.randn(count, 3, side, side, generator=draws, dtype=torch.float64) for _ in range(2))
    region = (torch.rand(count, 1, side, side, generator=draws) < 0.3).double()
    region[-1] = 0
    return decoded, wanted, region


@pytest.mark.parametrize("gradient", [0.0, 0.7])
def test_the_loss_is_its_definition(gradient):
    decoded, wanted, region = pictures()
    got = pixel_loss(decoded, wanted, region, gradient)
    slow = [
        slow_loss(*(value[row].numpy() for value in (decoded, wanted)), region[row, 0].numpy(), gradient)
        for row in range(3)
    ]
    np.testing.assert_allclose(got.numpy(), slow, rtol=1e-12, atol=0)
    assert got[2] == 0


def test_gradients_are_those_of_the_definition():
    decoded, wanted, region = pictures(2, 8)
    decoded.requires_grad_(True)
    (found,) = torch.autograd.grad(pixel_loss(decoded, wanted, region, 0.7).sum(), decoded)
    assert torch.equal(found * (1 - region), torch.zeros_like(found)), "known pixels are pasted and have no error"
    step, base = 1e-6, decoded.detach().numpy()
    for place in [(0, c, y, x) for c in range(3) for y in range(0, 8, 3) for x in range(0, 8, 2)]:
        moved = [base.copy(), base.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        up, down = (slow_loss(value[0], wanted[0].numpy(), region[0, 0].numpy(), 0.7) for value in moved)
        assert float(found[place]) == pytest.approx((up - down) / (2 * step), abs=1e-8)


def test_a_visible_border_costs_and_shapes_must_fit():
    """A constant error in 2 x 2 of 8 x 8 pixels: a channel has 8 differences, 4 at half size, 2 of 1/4 at a quarter."""
    wanted = torch.zeros(1, 3, 8, 8)
    region = torch.zeros(1, 1, 8, 8)
    region[..., 2:4, 2:4] = 1
    decoded = torch.full_like(wanted, 0.5)
    edges = (8 / 8 + 4 / 2 + 2 * 0.25 / 0.5) / 3  # of one channel: sums over 2 n / 4^s with n = 4
    assert float(pixel_loss(decoded, wanted, region, 1.0)) == pytest.approx(0.5 + 0.5 * edges)
    with pytest.raises(TrainingError, match=r"decoded pictures \[1, 3, 8, 8\].*expected equal shapes"):
        pixel_loss(decoded, wanted, region.expand(-1, 3, -1, -1))
    with pytest.raises(TrainingError, match="expected equal shapes"):
        pixel_loss(decoded, wanted[..., :4], region)


def test_the_margin_is_left_out_except_at_the_edge():
    for top, left, rows, columns in ((0, 3, (0, 5), (2, 5)), (9, 0, (2, 7), (0, 5)), (4, 4, (2, 5), (2, 5))):
        expected = torch.zeros(7, 7)
        expected[slice(*rows), slice(*columns)] = 1
        assert torch.equal(inner_region(7, 2, top, left, 16)[0, 0], expected), (top, left)


def test_squares_hold_masked_latents_inside_of_their_margin():
    draws = torch.Generator().manual_seed(3)
    mask = torch.zeros(1, 1, 16, 16)
    seen = set()
    for _ in range(200):
        y, x = torch.randint(16, (2,), generator=draws).tolist()
        mask.zero_()[0, 0, y, x] = 1
        ((top, left),) = squares_on_mask(mask, 8, torch.rand(1, 3, generator=draws), margin=2)
        assert 0 <= top <= 8
        assert 0 <= left <= 8
        assert inner_region(8, 2, top, left, 16)[0, 0, y - top, x - left] == 1
        seen.add(y - top)
    assert seen == set(range(8)), "everywhere in the square, at edges of the picture too"


def batch_of(task, count=4):
    draws = torch.Generator().manual_seed(7)
    clean, masked = (torch.randn(count, 4, 16, 16, generator=draws) for _ in range(2))
    mask = torch.zeros(count, 1, 16, 16)
    mask[:, :, 5:11, 3:9] = 1
    return LatentBatch(clean, masked, mask, task.network.conditional_ids[None].expand(count, -1))


@pytest.mark.parametrize("log", [None, 0.5])
def test_a_task_adds_the_decoded_error_of_early_timesteps(log):
    """One batch, its draws repeated: predict, decode one square after the other, and compare."""
    task = build_task(parse_settings(CONTENT | {"pixels": CONTENT["pixels"] | {"log": log}}, "test"))
    plain = build_task(parse_settings(CONTENT | {"pixels": None}, "test"))
    plain.network.load_state_dict(task.network.state_dict())
    task.network.eval()
    plain.network.eval()
    batch = batch_of(task)
    decoder = task.frozen[0]
    assert not any(value.requires_grad for value in decoder.parameters())
    got = task.outcome(task.module, batch, TrainContext(torch.device("cpu"), torch.Generator().manual_seed(2)))
    without = plain.outcome(plain.module, batch, TrainContext(torch.device("cpu"), torch.Generator().manual_seed(2)))
    assert set(got.values) == {"loss/task", "loss/pixels"}
    with torch.no_grad():
        draws = torch.Generator().manual_seed(2)
        timesteps = torch.randint(1000, (4,), generator=draws)
        assert 0 < int((timesteps <= 600).sum()) < 4, "the seed gives samples of both kinds"
        noise = torch.randn(batch.latents.shape, generator=draws)
        places = torch.rand(4, 3, generator=draws)
        a = alphas_cumprod()[timesteps][:, None, None, None]
        noisy = a.sqrt() * batch.latents + (1 - a).sqrt() * noise
        predicted = task.network(torch.cat([noisy, batch.mask, batch.masked], 1), timesteps, batch.categories)
        clean = predict_clean(noisy, predicted, timesteps, alphas_cumprod(), "v_prediction")
        total = 0.0
        for row, (top, left) in enumerate(squares_on_mask(batch.mask, 8, places, 1)):
            if timesteps[row] > 600:
                continue
            square = (slice(row, row + 1), slice(None), slice(top, top + 8), slice(left, left + 8))
            ours, theirs = (decoder(value[square])[0].double().numpy() for value in (clean, batch.latents))
            region = (batch.mask[square] * inner_region(8, 1, top, left, 16))[0, 0].numpy().repeat(8, 0).repeat(8, 1)
            value = slow_loss(ours, theirs, region, 0.5)
            total += value if log is None else math.log(1 + value / log)
    assert float(got.values["loss/pixels"]) == pytest.approx(total / 4, rel=1e-4)  # float32 through the networks
    assert got.total.item() == pytest.approx(without.total.item() + 3.0 * total / 4, rel=1e-4)
    got.total.backward()
    pixels = task.network.diff_model.conv_out.conv_pw.weight.grad.clone()
    without.total.backward()
    assert not torch.allclose(pixels, plain.network.diff_model.conv_out.conv_pw.weight.grad, rtol=1e-2)
    assert all(value.grad is None for value in decoder.parameters())


def test_late_timesteps_have_no_pixels():
    task = build_task(parse_settings(CONTENT | {"pixels": {"crop": 8, "most": 0}}, "test"))
    got = task.outcome(task.module, batch_of(task), TrainContext(torch.device("cpu"), torch.Generator().manual_seed(2)))
    assert float(got.values["loss/pixels"]) == 0
    assert got.total.item() == float(got.values["loss/task"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vae": None}, "needs the `vae` that encoded them"),
        ({"pixels": {"crop": 4, "margin": 2}}, "crop is 4 with a margin of 2; expected a margin of 0 or more"),
        ({"pixels": {"weight": 0}}, "weight is 0"),
        ({"pixels": {"gradient": float("nan")}}, "gradient is nan"),
        ({"pixels": {"log": 0}}, "log is 0.*; expected a number above 0"),
        ({"pixels": {"most": 1000}}, "`most`.* is 1000; expected 0 to 999"),
        ({"pixels": {"size": 8}}, "no size here; expected some of weight, crop, margin, gradient, log, most"),
        (
            {"train": "vae", "losses": {}, "data": {"pictures": [{"source": "scenes:4"}]}},
            "with `train: vae` leave it out",
        ),
        (
            {"objective": "guidance", "teacher": "stand-in", "guidance_scale": 2.0, "losses": {}},
            "`pixels` is for `objective: diffusion`",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, words):
    with pytest.raises(TrainingError, match=words):
        parse_settings(CONTENT | change, "test")


def test_options_have_the_documented_defaults():
    assert PixelOptions() == parse_settings(CONTENT | {"pixels": {}}, "test").pixels
