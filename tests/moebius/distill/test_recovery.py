"""Float16 steps that overflow, killed saves, sample sheets of frozen networks, and what a resumed run may change."""

import math
import os
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from moebius.data.datasets import Batch
from moebius.distill import checkpoints, trainer
from moebius.distill.finishing import WEIGHTS
from moebius.distill.logs import Log
from moebius.distill.optimizers import ScheduleOptions
from moebius.distill.samples import sheet
from moebius.distill.settings import changed, parse_settings
from moebius.distill.tasks import Outcome, VaeTask, freeze_statistics, statistics
from moebius.distill.trainer import DivergedError, Report, Trainer
from moebius.errors import TrainingError

ALONE = {
    "train": "student",
    "steps": 4,
    "batch": 2,
    "network": {"preset": "tiny"},
    "vae": "stand-in",
    "data": {"pictures": [{"source": "scenes:50"}], "threads": 0},
    "losses": {"perceptual": 0, "coarse": 0, "fine": 0},
    "schedule": {"warm_up": 4, "milestones": [100]},
    "save_every": 1,
    "log_every": 1,
    "tensorboard": False,
}


def trainer_of(out, **changes):
    return Trainer(parse_settings(ALONE | {"out": str(out)} | changes, "test"))


class ScalingAccelerator(Accelerator):
    """fp16 on a CPU: the gradient scaler that accelerate makes for GPUs."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scaler = torch.amp.GradScaler("cpu")


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps the first precision of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def scaled(monkeypatch):
    monkeypatch.setattr(trainer, "Accelerator", ScalingAccelerator)


def overflow_in(run, steps, monkeypatch):
    """In these steps the forward pass overflows: the loss is infinite, and so are the batch norms' statistics."""
    outcome = run.task.outcome

    def overflowing(module, batch, context):
        overflows = run.step + 1 in steps
        for value in statistics(run.task.network):
            if overflows and value.is_floating_point():
                value.fill_(math.inf)
        total, values = outcome(module, batch, context)
        if overflows:
            return Outcome(total * math.inf, {name: value * math.inf for name, value in values.items()})
        return Outcome(total, values)

    monkeypatch.setattr(run.task, "outcome", overflowing)


def test_a_step_that_overflows_is_skipped_and_leaves_nothing(tmp_path, scaled, monkeypatch):
    run = trainer_of(tmp_path, precision="fp16")
    overflow_in(run, {2}, monkeypatch)
    reports, states = [], []

    def keep(report):
        reports.append(report.values)
        states.append({name: value.clone() for name, value in run.task.network.state_dict().items()})

    run.on_step = keep
    run.run()
    assert [values["skipped"] for values in reports] == [0, 1, 0, 0]
    assert [values["loss_scale"] for values in reports] == [65536, 32768, 32768, 32768]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]), "weights and statistics"
    assert any(not torch.equal(states[1][name], states[2][name]) for name in states[0])
    assert all(bool(value.isfinite().all()) for value in states[-1].values())
    assert [values["learning_rate"] for values in reports] == pytest.approx([5e-5, 1e-4, 1e-4, 1.5e-4])
    assert checkpoints.latest(tmp_path).name == "step-00000004"


def test_a_run_whose_every_step_overflows_ends_and_goes_on_in_another_precision(tmp_path, scaled, monkeypatch):
    """By the advice of the message; the scaler starts at 2^-12, so that the least factor is near."""
    run = trainer_of(tmp_path, precision="fp16", steps=20)
    run._accelerator.scaler.load_state_dict(run._accelerator.scaler.state_dict() | {"scale": 2.0**-12})
    overflow_in(run, set(range(2, 100)), monkeypatch)
    with pytest.raises(
        DivergedError, match=r"factor is 6.1e-05 after step 3; .*step-00000002. Write `precision: bf16`"
    ):
        run.run()
    AcceleratorState._reset_state(reset_partial_state=True)
    again = trainer_of(tmp_path, steps=3)
    assert again.resume() == 2
    assert again.run() == tmp_path


def test_fp16_without_a_gradient_scaler_is_refused(tmp_path):
    """accelerate would train in float32 on a CPU and not report it."""
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(TrainingError, match="precision: fp16 needs a GPU, and this run is on cpu; write `bf16`"):
        trainer_of(tmp_path, precision="fp16")


def test_the_log_leaves_out_what_overflowed(tmp_path):
    log = Log(tmp_path, 3, 0, tensorboard=False)
    for step, loss in enumerate([1.0, math.inf, 3.0], 1):
        means = log.step(Report(step, {"loss": loss, "skipped": float(loss == math.inf)}))
    assert means == {"loss": 2.0, "skipped": pytest.approx(1 / 3)}


@pytest.mark.parametrize("kind", ["checkpoints", "weights"])
def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path, kind):
    """And nothing else: a folder of another name, and a link, stay."""
    folder = tmp_path / "checkpoints"
    for name in (".part-0123456789abcdef", ".part-mine"):
        (folder / name).mkdir(parents=True)
        (folder / name / "network.safetensors").write_bytes(b"gigabytes")
    (tmp_path / "elsewhere").mkdir()
    (folder / ".part-0000000000000000").symlink_to(tmp_path / "elsewhere")
    left = tmp_path / f".{WEIGHTS}.0123456789abcdef.part"
    left.write_bytes(b"gigabytes")
    trainer_of(tmp_path, steps=1).run()
    if kind == "weights":
        assert not left.exists()
    else:
        names = sorted(path.name for path in folder.iterdir())
        assert names == [".part-0000000000000000", ".part-mine", "step-00000001"]


def test_a_checkpoint_whose_removal_was_killed_is_none(tmp_path, monkeypatch):
    """It has a temporary name before its first file goes."""
    folder = checkpoints.folder_of(tmp_path, 1)
    folder.mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **named: None)
    checkpoints.remove(folder)
    assert checkpoints.latest(tmp_path) is None
    assert len(os.listdir(tmp_path / "checkpoints")) == 1


def modes(network):
    return [module.training for module in network.modules()]


def test_a_sample_sheet_leaves_every_module_in_its_mode(tmp_path):
    """Frozen batch norms stay frozen, others stay in training; also where the sheet fails."""
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.ReLU()))
    network.train()
    freeze_statistics(network)
    network[1][0].eval()
    before = modes(network)
    batch = Batch(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 1))
    task = VaeTask.__new__(VaeTask)
    with pytest.raises((StopIteration, AttributeError)):  # what it gives is no autoencoder's output
        sheet(task, network, batch, None, steps=1, guidance_scale=1.0)
    assert modes(network) == before


def test_a_run_with_samples_keeps_frozen_statistics(tmp_path):
    from moebius.distill.cli import _Samples

    changes = {"batch_norm": "frozen", "ema": None, "steps": 2, "samples": {"every": 1, "count": 1, "steps": 1}}
    run = trainer_of(tmp_path, **changes)
    shower, before = _Samples(run.settings), [value.clone() for value in statistics(run.task.network)]
    run.on_samples = lambda step, task, network: shower(task, network)
    run.run()
    assert all(torch.equal(*pair) for pair in zip(before, statistics(run.task.network), strict=True))


def test_frozen_statistics_are_not_measured_either():
    with pytest.raises(TrainingError, match=r"`average_statistics: 3` measures .*`batch_norm: frozen` keeps"):
        parse_settings(ALONE | {"out": "run", "batch_norm": "frozen", "average_statistics": 3}, "test")


@pytest.mark.parametrize(
    ("before", "now", "names"),
    [
        ({"data": {"latents": "a", "threads": 0}}, {"data": {"latents": "./a/../a", "threads": 5}}, []),
        ({"data": {"latents": "a"}}, {"data": {"latents": "b"}}, ["data"]),
        ({"data": {"latents": "a"}}, {"data": {"latents": "a", "broken": "refuse"}}, []),
        ({"init": "./w"}, {"init": "w/"}, []),
        ({"init": "w"}, {"init": "HERE/w"}, []),
        ({"init": "link"}, {"init": "w"}, []),
        ({"init": "w"}, {"init": "v"}, ["init"]),
        ({"init": "hub:a/b/c"}, {"init": "hub:a/b/d"}, ["init"]),
        ({"init": "stand-in"}, {"init": "./stand-in"}, ["init"]),
        ({"data": {"pictures": [{"source": "./p"}]}}, {"data": {"pictures": [{"source": "p/"}]}}, []),
        ({"data": {"pictures": [{"source": "p"}]}}, {"data": {"pictures": [{"source": "p", "times": 2}]}}, ["data"]),
        (
            {"data": {"pictures": [{"source": "scenes:3"}]}},
            {"data": {"pictures": [{"source": "./scenes:3"}]}},
            ["data"],
        ),
        ({"optimizer": {"learning_rate": 1e-3}}, {"optimizer": {"learning_rate": 1e-4}}, []),
        ({"optimizer": {"momentum": 0.9}}, {"optimizer": {"momentum": 0.8}}, ["optimizer"]),
        ({"precision": "fp16"}, {"precision": "bf16"}, []),
    ],
)
def test_what_a_resumed_run_may_change(tmp_path, monkeypatch, before, now, names):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w").mkdir()
    (tmp_path / "link").symlink_to("w")
    now = {
        name: value.replace("HERE", str(tmp_path)) if isinstance(value, str) else value for name, value in now.items()
    }
    then, settings = (parse_settings(ALONE | {"out": "run"} | change, "test") for change in (before, now))
    assert changed(then.identity(), settings) == names
    everything = then.model_dump(mode="json", exclude={"out", "steps"})  # as earlier versions wrote it: all of `data`
    assert changed(everything, settings) == names


def test_the_first_resumed_step_has_the_schedule_and_learning_rate_of_now(tmp_path):
    trainer_of(tmp_path, steps=2).run()
    now = {"schedule": {"warm_up": 0, "milestones": [2], "decay": 0.25}, "optimizer": {"learning_rate": 1e-3}}
    run, reports = trainer_of(tmp_path, **now), []
    run.on_step = reports.append
    run.resume()
    assert [group["lr"] for group in run.optimizer.param_groups] == [2.5e-4, 2.5e-4]
    before = [value.detach().clone() for value in run.task.network.parameters()]
    run._one_step(iter(run.stream))
    moved = max(
        float((value.detach() - old).abs().max())
        for old, value in zip(before, run.task.network.parameters(), strict=True)
        if value.ndim < 2
    )
    assert 1.5e-4 < moved < 3.5e-4, "AdamW moves by about the learning rate of now"
    assert run._schedule.get_last_lr() == [1e-3 * ScheduleOptions(0, [2], 0.25).factor(3)] * 2
