"""Guidance distillation and latent consistency distillation: losses, targets, settings, and what a run writes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import moebius
from moebius import Moebius, Teacher, preset
from moebius.data.encoded import LatentBatch
from moebius.distill.loop.assembly import build_stream, build_task
from moebius.distill.loop.context import TrainContext
from moebius.distill.loop.trainer import Trainer
from moebius.distill.objectives.consistency import grid_places, grid_timesteps
from moebius.distill.objectives.timesteps import snr_weights
from moebius.distill.outputs.samples import fill_latents
from moebius.distill.settings import changed, load_settings, parse_settings
from moebius.errors import CheckpointError, TrainingError
from moebius.network.lambda_layers import InteractiveLambda
from moebius.weights.load import load_student
from moebius.weights.sampling_record import SamplingRecord, read_sampling_record
from moebius_runtime.sampling import lcm

SCENES = {"pictures": [{"source": "scenes:50"}], "threads": 0}


def content(out="unused", **changes):
    base = {
        "train": "student",
        "objective": "guidance",
        "out": str(out),
        "steps": 2,
        "batch": 2,
        "network": {"preset": "tiny"},
        "teacher": "stand-in:1",
        "guidance_scale": 2.5,
        "vae": "stand-in",
        "data": SCENES,
        "schedule": {"milestones": []},
        "save_every": 1,
        "log_every": 1,
        "tensorboard": False,
    }
    return base | changes


def settings_of(out="unused", **changes):
    return parse_settings(content(out, **changes), "test")


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def batch_of(count=3, dtype=torch.float64, side=16):
    draws = torch.Generator().manual_seed(5)
    clean, masked = (torch.randn(count, 4, side, side, generator=draws, dtype=dtype) for _ in range(2))
    mask = (torch.rand(count, 1, side, side, generator=draws) < 0.3).to(dtype)
    return LatentBatch(clean, masked, mask, torch.full((count, 6), 11))  # ids that neither branch uses


def task_of(**changes):
    """A task in float64 whose student, average and teacher are different networks."""
    settings = settings_of(**{"data": {"latents": "unused"}} | changes)
    task = build_task(settings)
    student = load_student("stand-in:2", preset("tiny").student)[0]
    task.network.load_state_dict(student.state_dict())
    task.average = load_student("stand-in:3", preset("tiny").student)[0].double()
    for network in (task.network, *task.frozen):
        network.double().eval()
    return task


PREDICTS = ["epsilon", "v_prediction"]


@pytest.mark.parametrize(("predicts", "weight"), [("epsilon", 1), ("v_prediction", 7.0)])
def test_guidance_learns_the_papers_target(predicts, weight):
    """Meng et al. 2023, section 3.1: (1 + w) c - w u, one sample and one pixel at a time."""
    task = task_of(network={"preset": "tiny", "prediction_type": predicts}, hole_weight=weight, guidance_scale=2.5)
    batch = batch_of()
    context = TrainContext(torch.device("cpu"), torch.Generator().manual_seed(1))
    teacher, student = task.frozen[0].network, task.network
    with torch.no_grad():
        got = task.outcome(task.module, batch, context).total
        draws = torch.Generator().manual_seed(1)
        timesteps = torch.randint(1000, (3,), generator=draws)
        noise = torch.randn(batch.latents.shape, generator=draws)
        noise = noise + 0.0357 * torch.randn(3, 4, 1, 1, generator=draws)
        total = 0.0
        for row in range(3):
            bar = float(task._bars[timesteps[row]])
            noisy = bar**0.5 * batch.latents[row] + (1 - bar) ** 0.5 * noise[row].double()
            seen = torch.cat([noisy, batch.mask[row], batch.masked[row]])[None]
            time = timesteps[row : row + 1]
            ids = torch.arange(6)[None]
            ours = student(seen, time, ids)[0].numpy()
            c, u = teacher(seen, time, ids)[0].numpy(), teacher(seen, time, ids + 6)[0].numpy()
            wanted = (1 + 1.5) * c - 1.5 * u
            mask = batch.mask[row, 0].numpy()
            counts = 1 + (weight - 1) * mask
            total += float((((ours - wanted) ** 2) * counts).sum() / counts.mean())
    assert float(got) == pytest.approx(total / batch.latents.numel(), rel=1e-10)


@pytest.mark.parametrize(("predicts", "weight"), [("epsilon", 1), ("v_prediction", 7.0)])
def test_consistency_learns_the_papers_target(predicts, weight):
    """Luo et al. 2023, algorithm 1 with equations 9 and 15, in NumPy and one sample at a time."""
    network = {"preset": "tiny", "prediction_type": predicts}
    task = task_of(objective="consistency", network=network, hole_weight=weight, guidance_scale=3.0)
    batch = batch_of(4)
    context = TrainContext(torch.device("cpu"), torch.Generator().manual_seed(2))
    bars = task._bars.double().numpy()

    def x0_and_noise(x, predicted, t):
        signal, spread = np.sqrt(bars[t]), np.sqrt(1 - bars[t])
        if predicts == "v_prediction":
            return signal * x - spread * predicted, signal * predicted + spread * x
        return (x - spread * predicted) / signal, predicted

    def f(x, predicted, t):
        skip = 0.5**2 / ((t / 0.1) ** 2 + 0.5**2)  # the paper's appendix: t / 0.1
        out = (t / 0.1) / np.sqrt((t / 0.1) ** 2 + 0.5**2)
        return skip * x + out * x0_and_noise(x, predicted, t)[0]

    def call(network, x, row, t, ids):
        seen = torch.cat([torch.from_numpy(x), batch.mask[row], batch.masked[row]])[None]
        return network(seen, torch.tensor([t]), ids)[0].numpy()

    conditional, unconditional = torch.arange(6)[None], torch.arange(6, 12)[None]
    with torch.no_grad():
        got = task.outcome(task.module, batch, context).total
        draws = torch.Generator().manual_seed(2)
        places = torch.randint(50, (4,), generator=draws)
        noise = torch.randn(batch.latents.shape, generator=draws)
        noise = noise + 0.0357 * torch.randn(4, 4, 1, 1, generator=draws)
        total = 0.0
        for row in range(4):
            t = 20 * (int(places[row]) + 1) - 1
            s = max(t - 20, 0)
            x = np.sqrt(bars[t]) * batch.latents[row].numpy() + np.sqrt(1 - bars[t]) * noise[row].double().numpy()
            omega = 3.0 - 1
            steps = {}
            for name, ids in (("c", conditional), ("u", unconditional)):
                x0, eps = x0_and_noise(x, call(task.frozen[0].network, x, row, t, ids), t)
                steps[name] = np.sqrt(bars[s]) * x0 + np.sqrt(1 - bars[s]) * eps - x  # Psi
            earlier = x + (1 + omega) * steps["c"] - omega * steps["u"]
            wanted = f(earlier, call(task.average, earlier, row, s, conditional), s)
            ours = f(x, call(task.network, x, row, t, conditional), t)
            counts = 1 + (weight - 1) * batch.mask[row, 0].numpy()
            total += float(((np.sqrt((ours - wanted) ** 2 + 0.001**2) - 0.001) * counts).sum() / counts.mean())
    assert float(got) == pytest.approx(total / batch.latents.numel(), rel=1e-10)


@pytest.mark.parametrize(("least", "most", "expected"), [(0, 999, (0, 49)), (19, 19, (0, 0)), (20, 60, (1, 2))])
def test_places_of_the_grid_have_timesteps_between_the_bounds(least, most, expected):
    assert grid_places(least, most) == expected
    inside = [place for place in range(50) if least <= int(grid_timesteps(torch.tensor(place))) <= most]
    assert inside == list(range(expected[0], expected[1] + 1))


@pytest.mark.parametrize("objective", ["guidance", pytest.param("consistency", marks=pytest.mark.slow)])
def test_samples_may_be_noised_from_the_start(objective):
    """The target stays the teacher's, at what is noised; consistency draws timesteps of its grid."""
    options = {"share": 0.5, "least": 120, "most": 250}
    task = task_of(objective=objective, start=options, timesteps={"noise_offset": 0.0})
    batch = batch_of(64)
    batch = batch._replace(start=batch.latents.flip(-1))
    context = TrainContext(torch.device("cpu"), torch.Generator().manual_seed(1))
    sample, noisy = task._noised(task.network, batch, context)
    a = task._bars.double()[noisy.timesteps][:, None, None, None]
    from_start = ((noisy.latents - a.sqrt() * sample.start) / (1 - a).sqrt()).square().mean((1, 2, 3)) < 1.3
    from_truth = ((noisy.latents - a.sqrt() * sample.latents) / (1 - a).sqrt()).square().mean((1, 2, 3)) < 1.3
    assert bool((from_start | from_truth).all())
    from_start &= ~from_truth  # late timesteps look like both
    assert 16 < int(from_start.sum()) < 48
    found = set(noisy.timesteps[from_start].tolist())
    assert min(found) >= 120
    assert max(found) <= 250
    if objective == "consistency":
        assert found <= set(range(19, 1000, 20))
        assert len(found) == 6, "139, 159, ..., 239"
    task.average.requires_grad_(False)
    task.outcome(task.module, batch, context).total.backward()
    assert task.network.diff_model.conv_out.conv_pw.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_consistency_counts_the_distance_of_clean_latents_by_their_snr(predicts):
    network = {"preset": "tiny", "prediction_type": predicts}
    task = task_of(objective="consistency", network=network, snr={"least": 1, "most": 5}, hole_weight=7.0)
    sample, timesteps = batch_of(), torch.tensor([19, 279, 999])
    got = task._weight(sample, timesteps)
    for row, t in enumerate(timesteps.tolist()):
        snr = float(task._bars[t]) / (1 - float(task._bars[t]))
        counts = 1 + 6 * sample.mask[row]
        torch.testing.assert_close(got[row], min(max(snr, 1.0), 5.0) * counts / counts.mean(), rtol=1e-6, atol=0)
    learns = task_of(objective="guidance", network=network, snr={"least": 1, "most": 5})
    assert torch.equal(learns._weight(sample, timesteps), snr_weights(timesteps, task._bars, 1, 5, predicts))


@pytest.mark.parametrize("objective", ["guidance", "consistency"])
def test_crops_come_from_one_place_for_student_teacher_and_average(objective):
    """The three networks see the same crops; with equal weights, the guidance loss is then 0."""
    task = task_of(objective=objective, guidance_scale=1.0, data={"latents": "unused", "latent_crop": 8})
    state = task.frozen[0].network.state_dict()
    task.network.load_state_dict(state)
    task.average.load_state_dict(state)
    context = TrainContext(torch.device("cpu"), torch.Generator().manual_seed(3))
    seen = {}
    for name, network in (("student", task.network), ("teacher", task.frozen[0].network), ("average", task.average)):
        layers = [layer for layer in network.modules() if isinstance(layer, InteractiveLambda)]
        network.register_forward_pre_hook(
            lambda module, args, name=name, layers=layers: seen.update({name: {layer.place for layer in layers}})
        )
    outcome = task.outcome(task.module, batch_of(), context)
    places = [place for found in seen.values() for place in found]
    assert len(set(places)) == 1
    assert places[0] is not None
    if objective == "guidance":
        assert outcome.total.item() < 1e-20
    else:
        assert set(seen) == {"teacher", "average"}  # the student is called by its features
        assert all(layer.place is None for layer in task.average.modules() if isinstance(layer, InteractiveLambda))


def test_no_gradient_reaches_the_teacher_or_the_average():
    task = task_of(objective="consistency")
    context = TrainContext(torch.device("cpu"), torch.Generator().manual_seed(2))
    task.average.requires_grad_(False)
    task.outcome(task.module, batch_of(), context).total.backward()
    assert all(p.grad is None for network in (*task.frozen, task.average) for p in network.parameters())
    assert task.network.diff_model.conv_out.conv_pw.weight.grad.abs().sum() > 0


def test_where_the_trajectory_ends_f_is_the_identity():
    assert lcm.boundary(0) == (1.0, 0.0)
    skip, out = lcm.boundary(999)
    assert skip == pytest.approx(0.25 / (9990.0**2 + 0.25), rel=1e-12)
    assert out == pytest.approx(9990.0 / (9990.0**2 + 0.25) ** 0.5, rel=1e-12)


def trained(out, resume=False, **changes):
    trainer = Trainer(settings_of(out, **changes))
    reports = []
    trainer.on_step = reports.append
    if resume:
        trainer.resume()
    trainer.run()
    return trainer, reports


def weights(out):
    return load_file(out / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("objective", ["guidance", "consistency"])
def test_a_run_records_what_the_runtime_must_know(tmp_path, objective):
    trainer, reports = trained(tmp_path, objective=objective, batch_norm="frozen")
    assert all(report.values[f"loss/{objective}"] > 0 for report in reports)
    assert all(report.values["gradient_norm"] > 0 for report in reports)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["guidance"] == {"distilled": 2.5}
    known = read_sampling_record(str(tmp_path))
    assert known[:3] == ((2.5, "lcm", 4) if objective == "consistency" else (2.5, None, None))
    assert known.vae_sha256 == trainer.task.vae_sha256
    load_student(str(tmp_path), preset("tiny").student)


def test_the_student_starts_from_its_teacher():
    task = build_task(settings_of())
    teacher = load_student("stand-in:1", preset("tiny").student)[0]
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(task.network.parameters(), teacher.parameters(), strict=True)
    )
    other = build_task(settings_of(init="stand-in:4"))
    assert not torch.equal(next(other.network.parameters()), next(teacher.parameters()))


@pytest.mark.slow
def test_four_steps_are_two_and_two(tmp_path):
    """With the averaged network as the target, whose update count must survive as well."""
    changes = {"objective": "consistency", "ema": {"decay": 0.9}}
    trained(tmp_path / "whole", steps=4, **changes)
    trained(tmp_path / "parts", steps=2, **changes)
    _, reports = trained(tmp_path / "parts", resume=True, steps=4, **changes)
    assert [report.step for report in reports] == [3, 4]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_run_keeps_its_objective():
    now = settings_of()
    assert changed(now.identity(), now) == []
    assert changed(now.identity(), settings_of(guidance_scale=2.0)) == ["guidance_scale"]
    assert changed(now.identity(), settings_of(objective="consistency")) == ["objective"]


def test_sample_pictures_of_a_consistency_run(tmp_path):
    from moebius.distill.commands.train import _Samples

    settings = settings_of(tmp_path, objective="consistency", samples={"every": 1, "count": 2})
    trainer, shown = Trainer(settings), []
    trainer.on_samples = lambda step, task, network: shown.append(_Samples(settings)(task, network))
    trainer.run()
    assert [picture.shape for picture in shown] == [(256, 384, 3)] * 2
    assert shown[0].std() > 1


@pytest.mark.parametrize("predicts", PREDICTS)
def test_sample_pictures_are_those_of_the_runtimes_sampler(predicts):
    """diffusers' LCMScheduler as the samples call it, against the runtime's own sampler with the same noise."""
    from moebius_runtime.sampling.schedule import NoiseSchedule

    student = load_student("stand-in", preset("tiny").student)[0]
    batch = batch_of(2, torch.float32)
    generator = torch.Generator().manual_seed(1)
    got = fill_latents(
        *(student, batch),
        steps=3,
        guidance_scale=1.0,
        generator=generator,
        prediction_type=predicts,
        sampler="lcm",
    )
    again = torch.Generator().manual_seed(1)
    noises = [torch.randn(2, 4, 16, 16, generator=again).numpy() for _ in range(3)]

    def denoise(x, timestep):
        seen = torch.cat([torch.from_numpy(x), batch.mask, batch.masked], dim=1)
        with torch.no_grad():
            return student(seen, torch.full((2,), timestep), student.conditional_ids[None].expand(2, -1)).numpy()

    schedule = NoiseSchedule(prediction_type=predicts)
    ours = lcm.lcm(denoise, noises[0], schedule, lcm.lcm_timesteps(schedule, 3), noises=iter(noises[1:]))
    np.testing.assert_allclose(got.numpy(), ours, rtol=1e-3, atol=1e-3 * np.abs(ours).max())


def checkpoint(folder, network, **config):
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def student(tmp_path):
    return lambda **config: checkpoint(
        tmp_path / "student", load_student("stand-in", preset("tiny").student)[0], **config
    )


def test_the_released_teacher_teaches_a_student_of_its_own(tmp_path):
    """A teacher network; the student needs weights of its own to start from."""
    torch.manual_seed(0)
    source = checkpoint(tmp_path / "teacher", Teacher(preset("tiny").teacher))
    task = build_task(settings_of(teacher=source, init="stand-in:4"))
    assert isinstance(task.frozen[0].network, Teacher)
    with pytest.raises(TrainingError, match=r"starts from trained weights, and .* name a trained student as `init`"):
        build_task(settings_of(teacher=source))


def test_a_teacher_whose_guidance_is_distilled_runs_one_branch(student):
    source = student(guidance={"distilled": 2.5})
    assert build_task(settings_of(teacher=source, objective="consistency")).frozen[0].scale == 1.0
    assert build_task(settings_of(objective="consistency")).frozen[0].scale == 2.5


@pytest.mark.parametrize("objective", ["guidance", "consistency"])
def test_teachers_that_do_not_fit_are_refused(tmp_path, student, objective):
    other = checkpoint(tmp_path / "other", Moebius(preset("small").student))
    cases = {
        student(prediction_type="v_prediction"): "says prediction_type = 'v_prediction', expected 'epsilon'",
        other: r"fits neither the student nor the teacher of `network: \{preset: tiny\}`; choose the preset",
    }
    for source, words in cases.items():
        with pytest.raises(CheckpointError, match=words):
            build_task(settings_of(teacher=source, objective=objective))
    with pytest.raises(TrainingError, match=r"`guidance_scale: 2.5`, and .* was distilled at 2; write 2, or name"):
        build_task(settings_of(teacher=student(guidance={"distilled": 2.0}), objective=objective))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"guidance": 2.5}, "guidance = 2.5; expected"),
        ({"guidance": {"distilled": True}}, "guidance = "),
        ({"guidance": {"distilled": 1e9}}, "guidance = "),
        ({"guidance": {"distilled": float("nan")}}, "guidance = "),
        ({"sampler": "euler"}, "sampler = 'euler'; expected \"lcm\""),
        ({"sampler": "lcm"}, "expected it beside guidance and num_inference_steps"),
        ({"num_inference_steps": 0}, "num_inference_steps = 0; expected a whole number from 1 to 1000"),
        ({"modes": ["best"]}, "modes = .*; expected defaults by mode, of best, balanced, fast"),
        ({"modes": {"reference": {"steps": 4}}}, "modes = .*; expected defaults by mode, of best, balanced, fast"),
        ({"modes": {"best": {"steps": 0}}}, "wrong defaults of mode best: .*steps"),
        ({"modes": {"best": {"seed": 1}}}, "wrong defaults of mode best: .*seed"),
        ({"modes": {"fast": {"sampler": "euler"}}}, "modes.fast.sampler = 'euler'; expected ddim"),
    ],
)
def test_records_by_other_hands_are_refused(student, entry, words):
    with pytest.raises(CheckpointError, match=words):
        read_sampling_record(student(**entry))


def test_weights_without_a_record_have_none(student):
    assert (
        read_sampling_record("stand-in") == SamplingRecord() == read_sampling_record(student(prediction_type="epsilon"))
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": "teacher", "teacher": None}, "`objective: guidance` trains a student"),
        ({"teacher": None}, "learns from a teacher and `teacher` is null"),
        ({"guidance_scale": None}, "needs `guidance_scale`, the scale that is distilled"),
        ({"guidance_scale": -1}, "guidance_scale: Input should be greater than or equal to 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale: Input should be"),
        ({"losses": {"coarse": 0}}, "leave out `losses`, `balance` and `perceptual`"),
        ({"balance": {"exponent": 1}}, "leave out `losses`, `balance` and `perceptual`"),
        ({"objective": "consistency", "ema": None}, "learns from the averaged network; `ema` must not be null"),
        ({"objective": "consistency", "consistency": {"steps": 0}}, "the recommended steps are 0; expected 1 to 50"),
        ({"objective": "consistency", "consistency": {"huber": 0}}, "pseudo-Huber loss's c is 0"),
        ({"consistency": {"steps": 2}}, "`consistency` has options of `objective: consistency`"),
        ({"samples": {"every": 1, "guidance_scale": 2}}, "the guidance is inside the network; leave it out"),
        ({"objective": "diffusion", "losses": {"perceptual": 0}}, "`guidance_scale: 2.5` is for `objective: guidance`"),
        ({"pixels": {"crop": 8}}, "`pixels` is for `objective: diffusion`, not for guidance"),
        (
            {"objective": "consistency", "data": {"latents": "a"}, "start": {"share": 1, "least": 40, "most": 58}},
            "`start: {least: 40, most: 58}` holds no timestep of `objective: consistency`",
        ),
        ({"start": {"share": 0.5}}, "`start` needs latents that `moebius-distill encode --starts` wrote"),
        ({"objective": "magic"}, "objective: Input should be 'diffusion', 'guidance' or 'consistency'"),
    ],
)
def test_settings_that_do_not_fit_the_objective_are_refused(change, words):
    with pytest.raises(TrainingError, match=re.escape(words)):
        settings_of(**change)


def test_timesteps_are_uniform_unless_the_file_says_otherwise():
    assert settings_of().timesteps.sampling == "uniform"
    assert settings_of(timesteps={"noise_offset": 0.0}).timesteps.sampling == "uniform"
    assert settings_of(timesteps={"sampling": "lognorm"}).timesteps.sampling == "lognorm"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Latents of scenes by the random test VAE of seed 0."""
    from moebius.data.datasets import SampleStream
    from moebius.data.encoding import Autoencoder, EncodeOptions, encode_samples
    from moebius.data.opening import open_source
    from moebius.network.vae import VaeEncoder
    from moebius.weights.load import load_vae

    folder, sizes = tmp_path_factory.mktemp("latents") / "set", preset("tiny")
    network, loaded = load_vae("stand-in", sizes.vae)
    stream = SampleStream(open_source("scenes:2", 128), 128, threads=0)
    vae = Autoencoder(VaeEncoder(network.requires_grad_(False)), sizes.vae, loaded.sha256, True)
    encode_samples(stream, vae, folder, EncodeOptions(2, num_categories=sizes.student.num_categories))
    return folder, loaded.sha256


def test_latents_of_another_vae_are_refused(tmp_path, student, encoded):
    folder, sha256 = encoded
    data = {"latents": str(folder)}
    build_stream(settings_of(data=data)).close()
    build_stream(settings_of(data=data, vae=None, teacher=student(trained={"vae_sha256": sha256}))).close()
    for changes, name in (
        ({"vae": "stand-in:1"}, "vae"),
        ({"teacher": student(trained={"vae_sha256": "0" * 64})}, "teacher"),
        ({"init": student(trained={"vae_sha256": "0" * 64})}, "init"),
    ):
        with pytest.raises(TrainingError, match=rf"latents of another VAE .* than `{name}` .*; encode the pictures"):
            build_stream(settings_of(data=data, **changes))
    with pytest.raises(TrainingError, match=r"was encoded by another VAE: 4 channels, 1/8 .* factor 0.13025"):
        build_stream(settings_of(data=data, network={"preset": "tiny", "vae": {"scaling_factor": 0.5}}))
    with pytest.raises(TrainingError, match=r"`vae: stand-in` has latents of another VAE .* than `teacher`"):
        Trainer(settings_of(tmp_path / "out", teacher=student(trained={"vae_sha256": "0" * 64})))
    assert not (tmp_path / "out").exists()


RECIPES = sorted(Path(moebius.__file__).parent.glob("*/recipe/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_the_settings_that_come_with_the_package_are_valid(path):
    settings = load_settings(path)
    if path.stem in ("guidance", "consistency"):
        assert settings.objective == path.stem
        assert settings.batch_norm == "frozen"


def test_both_objectives_come_for_both_networks():
    ours = [path for path in RECIPES if path.stem in ("guidance", "consistency")]
    found = {(load_settings(path).network.preset, path.stem) for path in ours}
    assert found == {(preset, name) for preset in ("full", "small") for name in ("consistency", "guidance")}
