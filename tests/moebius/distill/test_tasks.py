"""What a batch is made into, and the losses that are not the distillation's."""

import pytest
import torch

from moebius import preset
from moebius.data.datasets import Batch
from moebius.data.encoded import LatentBatch
from moebius.distill.loop.assembly import build_task
from moebius.distill.loop.context import TrainContext
from moebius.distill.loop.tasks import (
    crop_place,
    crop_to_hole,
    edge_loss,
    encoding,
    freeze_statistics,
    halves,
    hole_weights,
)
from moebius.distill.objectives.losses import LossOptions, Prediction, distillation_losses
from moebius.distill.objectives.timesteps import Noised, alphas_cumprod, predict_clean, snr_weights
from moebius.distill.settings import parse_settings
from moebius.errors import CheckpointError, TrainingError
from moebius.network.lambda_layers import InteractiveLambda
from moebius.weights.load import check_prediction_type, load_vae


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
    clean, masked, mask, *_ = numbered()
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


LATENTS_ONLY = {
    "train": "student",
    "out": "unused",
    "steps": 1,
    "batch": 3,
    "network": {"preset": "tiny", "prediction_type": "v_prediction"},
    "data": {"latents": "unused"},
    "losses": {"coarse": 0, "fine": 0, "perceptual": 0},
    "timesteps": {"sampling": "uniform"},
}


def test_a_student_is_told_where_its_crops_are_from():
    """The place is a whole position at every level, all places come, and the loss is that of the cropped network."""
    content = LATENTS_ONLY | {"data": {"latents": "unused", "latent_crop": 8}}
    task = build_task(parse_settings(content, "test"))
    layers = [layer for layer in task.network.modules() if isinstance(layer, InteractiveLambda)]
    places = [crop_place(task.network, 8, torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert {(top * 16, left * 16) for top, left in places} == {(y, x) for y in range(0, 9, 2) for x in range(0, 9, 2)}
    clean, masked, mask, *_ = numbered()
    batch = LatentBatch(clean, masked, mask, task.network.conditional_ids[None].expand(3, -1))
    task.network.eval()
    context = TrainContext(torch.device("cpu"), torch.Generator().manual_seed(1))
    got = task.outcome(task.module, batch, context)
    assert len({layer.place for layer in layers}) == 1
    assert layers[0].place is not None
    got.total.backward()
    for layer in layers:
        side = int(len(layer.rel_pos_emb) ** 0.5)
        top, left = (round(share * side) for share in layer.place)
        used = torch.zeros(side, side, dtype=torch.bool)
        used[top : top + side // 2, left : left + side // 2] = True
        trained = layer.rel_pos_emb.grad.abs().sum((1, 2, 3)).reshape(side, side) > 0
        assert torch.equal(trained, used)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_snr_weights_count_the_error_of_the_clean_latents(predicts):
    """The weighted loss against clamp(SNR, least, most) times the squared error of the clean latents, written out."""
    generator = torch.Generator().manual_seed(0)
    noisy, predicted, target = (torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    timesteps, bars = torch.tensor([0, 200, 500, 800, 999]), alphas_cumprod().double()
    weights = snr_weights(timesteps, bars, 1.0, 5.0, predicts)
    assert weights.shape == (5, 1, 1, 1)
    ours, wanted = (predict_clean(noisy, value, timesteps, bars, predicts) for value in (predicted, target))
    for row, t in enumerate(timesteps.tolist()):
        snr = float(bars[t]) / (1 - float(bars[t]))
        expected = min(max(snr, 1.0), 5.0) * (ours[row] - wanted[row]).square().mean()
        got = (weights[row] * (predicted[row] - target[row]).square()).mean()
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


def test_the_weights_of_time_and_region_multiply():
    task = build_task(parse_settings(LATENTS_ONLY | {"hole_weight": 20, "snr": {"least": 1, "most": 5}}, "test"))
    sample, timesteps = numbered(), torch.tensor([0, 500, 999])
    expected = hole_weights(sample.mask, 20) * snr_weights(timesteps, alphas_cumprod(), 1, 5, "v_prediction")
    assert torch.equal(task._weight(sample, timesteps), expected)
    uniform = build_task(parse_settings(LATENTS_ONLY, "test"))
    assert uniform._weight(sample, timesteps) is None


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_samples_that_are_noised_from_the_start_are_asked_for_the_truth(predicts):
    network = {"preset": "tiny", "prediction_type": predicts}
    content = LATENTS_ONLY | {"network": network, "start": {"share": 0.5, "least": 300, "most": 310}}
    task = build_task(parse_settings(content, "test"))
    generator = torch.Generator().manual_seed(0)
    clean, start = (torch.randn(64, 4, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = task.network.conditional_ids[None].expand(64, -1)
    batch = LatentBatch(clean, clean, torch.ones(64, 1, 16, 16), ids, start)
    context = TrainContext(torch.device("cpu"), torch.Generator().manual_seed(1))
    sample, noisy = task._noised(task.network, batch, context)
    bars = alphas_cumprod()
    # The target leads to the truth from wherever the noise was laid on. Levels are rounded to float32 in `bars`.
    reached = predict_clean(noisy.latents, noisy.target, noisy.timesteps, bars, predicts)
    torch.testing.assert_close(reached, sample.latents, rtol=0, atol=1e-9)
    a = bars[noisy.timesteps].double()[:, None, None, None]
    distances = [
        ((noisy.latents - a.sqrt() * base) / (1 - a).sqrt()).square().mean((1, 2, 3)) for base in (clean, start)
    ]
    from_truth, from_start = ((distance - 1).abs() < 0.3 for distance in distances)  # unit noise, 1,024 values
    inside = (noisy.timesteps >= 300) & (noisy.timesteps <= 310)
    assert 16 < int((from_start & inside).sum()) < 48
    assert bool((from_start | from_truth).all())
    assert bool((inside | from_truth).all())


def test_settings_of_starts_and_crops_that_do_not_fit_are_refused(tmp_path):
    for change, words in (
        ({"start": {"share": 0.5}, "data": {"pictures": [{"source": "scenes:4"}]}, "vae": "stand-in"}, "--starts"),
        ({"start": {"share": 0.5, "least": 9, "most": 8}}, "least. 9 is above .most. 8"),
        ({"snr": {"least": 6, "most": 5}}, "least 6 is above most 5"),
    ):
        with pytest.raises(TrainingError, match=words):
            parse_settings(LATENTS_ONLY | change, "test")
