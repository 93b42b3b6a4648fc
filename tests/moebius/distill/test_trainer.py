"""The loop: bit-exact resuming, several processes, NaN, what is written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import distill_worker as worker
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from moebius.distill.loop import checkpoints
from moebius.distill.loop.trainer import DivergedError, Trainer
from moebius.distill.settings import parse_settings
from moebius.errors import TrainingError
from moebius.weights.load import load_student, load_teacher, load_vae

SCENES = {"pictures": [{"source": "scenes:50"}], "threads": 0}


def content(out, **changes):
    base = {
        "train": "student",
        "out": str(out),
        "steps": 2,
        "batch": 2,
        "network": {"preset": "tiny"},
        "teacher": "stand-in",
        "vae": "stand-in",
        "data": SCENES,
        "losses": {"perceptual": 0},
        "schedule": {"warm_up": 2, "milestones": [4]},
        "save_every": 1,
        "log_every": 1,
        "tensorboard": False,
    }
    return base | changes


def trained(out, resume=False, **changes):
    trainer = Trainer(parse_settings(content(out, **changes), "test"))
    reports = []
    trainer.on_step = reports.append
    if resume:
        trainer.resume()
    trainer.run()
    return trainer, reports


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    """The folder of a finished run of two steps; copy it before anything is changed."""
    out = tmp_path_factory.mktemp("run")
    trained(out)
    return out


def weights(out):
    return load_file(out / "diffusion_pytorch_model.safetensors")


def flat(tensors):
    """All trained numbers in a row: no statistics of batch norms, no counts."""
    kept = [name for name in sorted(tensors) if "running_" not in name and "num_batches" not in name]
    return torch.cat([tensors[name].double().flatten() for name in kept])


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["student", "fine-tuned", "teacher", "vae"])
def test_each_kind_trains_and_is_read_by_the_loader(tmp_path, kind):
    changes = {
        "student": {},
        "fine-tuned": {
            "teacher": None,
            "init": "stand-in:3",
            "losses": {"perceptual": 0, "coarse": 0, "fine": 0},
            "batch_norm": "frozen",
        },
        "teacher": {"train": "teacher", "teacher": None},
        "vae": {"train": "vae", "teacher": None, "vae": None},
    }[kind]
    trainer, reports = trained(tmp_path, **changes)
    sizes = trainer.settings.network.build()
    load = {"teacher": load_teacher, "vae": load_vae}.get(kind, load_student)
    load(str(tmp_path), getattr(sizes, trainer.settings.train))
    assert [report.step for report in reports] == [1, 2]
    assert reports[0].values["learning_rate"] < reports[1].values["learning_rate"]
    assert all(report.values["gradient_norm"] > 0 for report in reports)
    if kind == "student":
        assert {"loss/coarse", "loss/task", "loss/fine", "weight/fine", "weight/out"} <= reports[0].values.keys()


@pytest.mark.slow
def test_training_lowers_the_loss(tmp_path):
    _, reports = trained(
        tmp_path,
        train="vae",
        teacher=None,
        vae=None,
        steps=30,
        save_every=30,
        optimizer={"learning_rate": 5e-3},
        schedule={},
    )
    losses = [report.values["loss/pixels"] for report in reports]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_six_steps_are_three_and_three(tmp_path, accumulate):
    trained(tmp_path / "whole", steps=6, accumulate=accumulate)
    trained(tmp_path / "parts", steps=3, accumulate=accumulate)
    trainer, reports = trained(tmp_path / "parts", resume=True, steps=6, accumulate=accumulate)
    assert [report.step for report in reports] == [4, 5, 6]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert trainer.step == 6


@pytest.fixture
def command(tmp_path):
    """Starts `moebius-distill`, in processes of its own, on settings."""
    started = []

    def start(*options, world=1, alter=(), **changes):
        path = tmp_path / f"config-{len(started)}.yaml"
        path.write_text(yaml.safe_dump(content(**changes)))
        started.append(worker.Run(path.with_suffix(".log"), [path, *options], world, alter))
        return started[-1]

    yield start
    for run in started:
        run.kill()


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_resuming_after_kill_9_gives_the_same_bits(tmp_path, command):
    """Killed while it trains: what a checkpoint left half done must not count, and nothing may be lost but time."""
    plain = command(out=str(tmp_path / "whole"), steps=6)
    killed = command(out=str(tmp_path / "killed"), steps=6)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        found = checkpoints.latest(tmp_path / "killed")
        if found is not None and found.name >= "step-00000003":
            break
        time.sleep(0.01)
    killed.kill()
    assert not (tmp_path / "killed" / "config.json").exists(), "it had ended before it was killed"
    assert plain.wait() == [0], plain.output
    resumed = command("--resume", out=str(tmp_path / "killed"), steps=6)
    assert resumed.wait() == [0], resumed.output
    assert "resuming from step" in resumed.output
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert [line["step"] for line in lines(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]


def test_the_command_refuses_in_one_line(tmp_path, command):
    process = command(out=str(tmp_path / "run"), steps=0)
    assert process.wait() == [2]
    assert "Traceback" not in process.output
    assert "steps" in process.output
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    process = command(out=str(tmp_path / "run"))
    assert process.wait() == [2]
    assert "add --resume" in process.output


def test_the_module_starts_as_a_command():
    """As `accelerate launch -m moebius.distill.cli` starts it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "moebius.distill.cli", "missing.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "cannot read missing.yaml" in done.stderr


def test_other_settings_do_not_go_on(tmp_path, run_of_two):
    shutil.copytree(run_of_two, tmp_path, dirs_exist_ok=True)
    with pytest.raises(TrainingError, match=r"other settings \(seed\)"):
        trained(tmp_path, resume=True, seed=1)


def test_a_checkpoint_that_was_cut_short_is_refused(tmp_path, run_of_two):
    shutil.copytree(run_of_two, tmp_path, dirs_exist_ok=True)
    newest = checkpoints.latest(tmp_path)
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TrainingError, match="is damaged"):
        trained(tmp_path, resume=True, steps=3)


def test_only_the_last_checkpoints_stay(tmp_path):
    trained(tmp_path, steps=4, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize(("every", "words"), [(1, "sum of .* is nan in step 2"), (5, "loss is nan in step 3")])
def test_nan_stops_and_the_last_good_state_is_kept(tmp_path, run_of_two, every, words):
    """Found before a checkpoint is written, or in the next step's loss."""
    shutil.copytree(run_of_two, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(checkpoints.folder_of(tmp_path, 2))
    trainer = Trainer(parse_settings(content(tmp_path, steps=5, save_every=every), "test"))
    trainer.resume()

    def spoil(report):
        with torch.no_grad():
            next(trainer.task.network.parameters()).fill_(float("nan"))

    trainer.on_step = spoil
    with pytest.raises(DivergedError, match=f"{words}; the last good state is .*step-00000001"):
        trainer.run()
    assert checkpoints.latest(tmp_path).name == "step-00000001"


def test_stopping_leaves_a_checkpoint(tmp_path):
    trainer = Trainer(parse_settings(content(tmp_path, steps=5, save_every=100), "test"))
    assert trainer.run(lambda: trainer.step == 2) is None
    assert checkpoints.latest(tmp_path).name == "step-00000002"


def test_gradient_checkpointing_changes_no_step(tmp_path, run_of_two):
    trained(tmp_path, gradient_checkpointing=True)
    first, second = weights(run_of_two), weights(tmp_path)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-6)


def test_sample_pictures(tmp_path):
    from moebius.distill.commands.train import _Samples

    changes = {"samples": {"every": 1, "count": 2, "steps": 2, "guidance_scale": 2.0}}
    settings = parse_settings(content(tmp_path, **changes), "test")
    trainer = Trainer(settings)
    picture = _Samples(settings)(trainer.task, trainer.weights)
    assert picture.shape == (2 * 128, 3 * 128, 3)
    truth, filled = picture[:, :128], picture[:, 256:]
    assert (truth != filled).any()


def test_what_is_not_served_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="batch_norm: sync needs CUDA"):
        Trainer(parse_settings(content(tmp_path, batch_norm="sync"), "test"))


def checkpoint(out, step, file="network"):
    return load_file(checkpoints.folder_of(out, step) / f"{file}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alter", "first", "later", "way"),
    [
        pytest.param((), 1e-5, 1e-2, 0.1, id="float32"),
        pytest.param(("float64",), 1e-6, 1e-6, 1e-9, id="float64"),
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"train": "teacher", "teacher": None}, id="teacher"),
        pytest.param({"batch_norm": "frozen"}, id="student"),
        pytest.param(
            {"batch_norm": "frozen", "accumulate": 2, "gradient_checkpointing": True},
            id="accumulated",
        ),
        pytest.param(
            {"batch_norm": "frozen", "objective": "consistency", "guidance_scale": 2.0, "losses": {}},
            id="consistency",
        ),
    ],
)
def test_two_processes_are_one_on_the_same_global_batch(tmp_path, command, changes, alter, first, later, way):
    """gloo, two processes of 2 samples against one of 4: losses, balance, gradients, and how far weights move.

    In float64, Muon's orthogonal step included, only the order of sums differs: weights agree to 1e-9 of the way that
    they went; what is logged is reduced in float32, whose rounding is 6e-8: 1e-6. In float32 that holds to
    1e-5 in the first step. Muon's steps, in bfloat16, enlarge rounding in directions that the gradient hardly has:
    later values agree to 1e-2 (1.6e-3 seen), weights to a tenth of the way (0.036 seen).
    """
    steps = 3 if alter else 2
    options = {"alter": alter, "steps": steps, "save_every": 1, "keep": 3, **changes}
    runs = [command(out=str(tmp_path / "one"), batch=4, **options)]
    runs.append(command(out=str(tmp_path / "two"), batch=2, world=2, **options))
    for run in runs:
        assert set(run.wait()) == {0}, run.output
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=first if one["step"] == 1 else later), (one["step"], name)
    ours, theirs = (flat(checkpoint(tmp_path / name, steps)) for name in ("one", "two"))
    moved = float((ours - flat(checkpoint(tmp_path / "one", 1))).norm())
    assert moved > 0
    assert float((ours - theirs).norm()) < way * moved, float((ours - theirs).norm()) / moved


@pytest.mark.slow
def test_a_signal_in_one_process_stops_all_with_a_checkpoint(tmp_path, command):
    """A process that stopped alone would save alone, and both would wait for ever."""
    run = command(out=str(tmp_path), world=2, steps=4, save_every=100, alter=["stop in process 1"], batch_norm="frozen")
    assert run.wait(120) == [2, 2], run.output
    assert run.output.count("stopped at step 2, a checkpoint is in") == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.slow
@pytest.mark.parametrize("at", ["sum of", "write_rank"])
def test_what_fails_in_one_process_fails_in_all(tmp_path, command, at):
    """Statistics that are NaN, or a full disk: the others must not wait in a collective, and no part is left."""
    run = command(out=str(tmp_path), world=2, steps=2, save_every=1, alter=[f"fail in process 1: {at}"])
    codes = run.wait(120)
    assert codes == ([2, 1] if at == "sum of" else [2, 2]), run.output
    assert "another process failed" in run.output
    assert list((tmp_path / "checkpoints").glob("*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_second_signal_still_saves(tmp_path, number):
    """Ctrl-C under torchrun comes twice: from the terminal and from torchrun."""
    from moebius.distill.commands.train import _train

    class Interrupted(Trainer):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            step = self._one_step

            def one_step(batches):
                report = step(batches)
                if report.step == 2:
                    signal.raise_signal(number)
                    signal.raise_signal(number)
                return report

            self._one_step = one_step

    with pytest.raises(TrainingError, match="stopped at step 2, a checkpoint is in"):
        _train(parse_settings(content(tmp_path, steps=5, save_every=100), "test"), False, Interrupted)
    assert checkpoints.latest(tmp_path).name == "step-00000002"


def test_the_averages_batch_norms_are_measured(tmp_path):
    """Against the statistics of what reaches one batch norm, gathered by a hook over the same batches."""
    trainer, _ = trained(tmp_path / "run", steps=2, average_statistics=3, ema={"decay": 0.9})
    name, norm = next((n, m) for n, m in trainer.average.module.named_modules() if isinstance(m, nn.BatchNorm2d))
    plain, _ = trained(tmp_path / "plain", steps=2, ema={"decay": 0.9})
    other = plain.average.module.get_submodule(name)
    assert torch.equal(other.weight, norm.weight), "weights stay as they were averaged"
    assert not torch.equal(other.running_mean, norm.running_mean)
    seen = []
    other.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    plain.average.module.train()
    batches = iter(plain.stream)
    with torch.no_grad():
        for _ in range(3):
            plain.task.forward(plain.average.module, next(batches), plain._context)
    mean = torch.stack([value.mean(dim=(0, 2, 3)) for value in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-6)
    written = weights(tmp_path / "run")
    torch.testing.assert_close(written[f"{name}.running_mean"], norm.running_mean)
