"""What a batch is made into, and the losses that are not the distillation's."""

import pytest
import torch

from moebius import preset
from moebius.data.datasets import Batch
from moebius.data.encoded import LatentBatch
from moebius.distill.assembly import build_task
from moebius.distill.context import TrainContext
from moebius.distill.losses import LossOptions, Prediction, distillation_losses
from moebius.distill.settings import parse_settings
from moebius.distill.tasks import (
    crop_to_hole,
    edge_loss,
    encoding,
    freeze_statistics,
    halves,
    hole_weights,
)
from moebius.distill.timesteps import Noised, alphas_cumprod
from moebius.errors import CheckpointError, TrainingError
from moebius.load import check_prediction_type, load_vae


def numbered(batch=3, side=16):
    """Latents that say where they are: row in channel 0, column in channel 1."""
    rows = torch.arange(side).float()[:, None].expand(side, side)
    place = torch.stack([rows, rows.T, rows * 0, rows * 0]).expand(batch, 4, side, side).clone()
    mask = torch.zeros(batch, 1, side, side)
    mask[0, 0, 2:4, 3:5] = 1
    mask[1, 0, 15, 15] = 1  # in a corner; the third has none
    return LatentBatch(place, place * 2, mask, torch.zeros(batch, 10, dtype=torch.long))


def test_a_crop_is_the_same_square_of_all_and_holds_some_of_the_hole():
    batch = numbered()
    for seed in range(20):
        places = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed))
        cut = crop_to_hole(batch, 8, places)
        assert cut.latents.shape == (3, 4, 8, 8)
        assert torch.equal(cut.masked, cut.latents * 2)
        for index in range(3):
            top, left = (int(value) for value in cut.latents[index, :2, 0, 0])
            assert torch.equal(cut.mask[index], batch.mask[index, :, top : top + 8, left : left + 8])
        assert bool(cut.mask[0].any())
        assert bool(cut.mask[1].any())
    whole = crop_to_hole(batch, 16, torch.full((3, 3), 0.99))
    assert torch.equal(whole.latents, batch.latents)
    with pytest.raises(TrainingError, match="a crop of 17 from latents of 16x16"):
        crop_to_hole(batch, 17, torch.zeros(3, 3))


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_the_network_is_asked_for_what_the_settings_say(predicts):
    """One batch, its draws repeated here, against the definition of the target."""
    content = {
        "train": "student",
        "out": "unused",
        "steps": 1,
        "batch": 3,
        "network": {"preset": "tiny", "prediction_type": predicts},
        "data": {"latents": "unused"},
        "losses": {"coarse": 0, "fine": 0, "perceptual": 0},
        "timesteps": {"sampling": "uniform", "noise_offset": 0.0},
    }
    task = build_task(parse_settings(content, "test"))
    task.network.eval()
    clean, masked, mask, _ = numbered()
    ids = task.network.conditional_ids[None].expand(3, -1)
    context = TrainContext(torch.device("cpu"), torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = task.outcome(task.module, LatentBatch(clean, masked, mask, ids), context)
        draws = torch.Generator().manual_seed(1)
        timesteps = torch.randint(1000, (3,), generator=draws)
        noise = torch.randn(clean.shape, generator=draws)
        a = alphas_cumprod()[timesteps][:, None, None, None]
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        wanted = noise if predicts == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * clean
        answer = task.network(torch.cat([noisy, mask, masked], dim=1), timesteps, ids)
    torch.testing.assert_close(got.total, (answer - wanted).square().mean(), rtol=1e-5, atol=0)


def test_weights_that_predict_something_else_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"prediction_type": "v_prediction"}')
    check_prediction_type(f"{tmp_path}", "v_prediction")
    check_prediction_type("stand-in", "epsilon")  # says nothing
    with pytest.raises(CheckpointError, match="says prediction_type = 'v_prediction', expected 'epsilon'"):
        check_prediction_type(f"{tmp_path}", "epsilon")
    content = {"train": "student", "out": "unused", "steps": 1, "batch": 1, "data": {"latents": "unused"}}
    settings = content | {"network": {"preset": "tiny"}, "losses": {"perceptual": 0}, "teacher": str(tmp_path)}
    with pytest.raises(CheckpointError, match="prediction_type"):
        build_task(parse_settings(settings, "test"))


def test_processes_share_what_is_drawn():
    drawn = torch.arange(6)
    own = [TrainContext(torch.device("cpu"), torch.Generator(), rank, 2).own(drawn).tolist() for rank in range(2)]
    assert own == [[0, 2, 4], [1, 3, 5]]


def test_edges_cost_and_a_shift_of_all_pixels_does_not():
    torch.manual_seed(0)
    image = torch.rand(2, 3, 16, 16)
    assert float(edge_loss(image + 0.3, image)) == pytest.approx(0, abs=1e-6)
    step = torch.zeros(1, 1, 16, 16)
    step[..., 8:] = 1
    # One of 15 columns of differences at full size, one of 7 at half, one of 3 at a quarter; rows have none.
    assert float(edge_loss(step, torch.zeros_like(step))) == pytest.approx((1 / 15 + 1 / 7 + 1 / 3) / 6)


def test_encoding_is_that_of_the_pipeline():
    sizes = preset("tiny")
    encoder, _ = halves(load_vae("stand-in", sizes.vae)[0])
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 128, 128, generator=generator) * 2 - 1
    mask = (torch.rand(2, 1, 128, 128, generator=generator) < 0.5).float()
    got = encoding(encoder, sizes.vae)(Batch(image, mask, torch.zeros(2, 6, dtype=torch.long)))
    with torch.no_grad():
        torch.testing.assert_close(got.latents, encoder(image), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.masked, encoder(image * (1 - mask)), rtol=1e-5, atol=1e-5)
    assert torch.equal(got.mask, mask[:, :, ::8, ::8])


def test_the_hole_counts_more_and_the_mean_stays():
    mask = numbered().mask
    weights = hole_weights(mask, 20.0)
    assert float(weights[0].mean()) == pytest.approx(1)
    assert float(weights[0, 0, 2, 3] / weights[0, 0, 0, 0]) == pytest.approx(20)
    assert torch.equal(weights[2], torch.ones_like(weights[2])), "without a hole all count alike"
    ours, theirs = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    noised = Noised(theirs, theirs, torch.zeros(3, dtype=torch.long))
    options = LossOptions(coarse=0, fine=0, perceptual=0)
    values = distillation_losses(options, Prediction(ours, []), noised, alphas_cumprod(), weight=weights)
    slow = sum(
        float(weights[b, 0, y, x]) * float((ours[b, :, y, x] - theirs[b, :, y, x]).square().sum())
        for b in range(3)
        for y in range(16)
        for x in range(16)
    )
    assert float(values["task"]) == pytest.approx(slow / ours.numel(), rel=1e-5)


def test_frozen_statistics_stay():
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 3, 1)).train()
    freeze_statistics(network)
    before = network[0].running_mean.clone()
    network(torch.randn(4, 3, 5, 5) + 7).sum().backward()
    assert torch.equal(network[0].running_mean, before)
    assert network[0].weight.grad is not None
