"""FSDP: a run whose parameters are spread over two processes against one whose are not, and what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import distill_worker as worker
import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn

from moebius import Moebius, preset
from moebius.distill import sharding
from moebius.distill.settings import parse_settings
from moebius.distill.sharding import before_prepare, check_distribution, gathered_by_forward
from moebius.distill.trainer import Trainer
from moebius.errors import TrainingError

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SETTINGS = {
    "train": "student",
    "batch": 2,
    "network": {"preset": "tiny"},
    "teacher": "stand-in",
    "vae": "stand-in",
    "data": {"pictures": [{"source": "scenes:50"}], "threads": 0},
    "losses": {"perceptual": 0},
    "batch_norm": "frozen",
    "save_every": 2,
    "log_every": 1,
    "tensorboard": False,
}


def documented_configuration():
    """accelerate's configuration as docs/distill.md shows it."""
    text = (ROOT / "docs" / "distill.md").read_text("utf-8")
    (found,) = re.findall(r"```yaml\n(compute_environment.*?)```", text, flags=re.DOTALL)
    return found


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The variables that `accelerate launch` sets from the documented configuration, and what its run logged."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "fsdp.yaml").write_text(documented_configuration())
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS | {"out": str(folder / "run"), "steps": 1}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["RECORD_ENVIRONMENT"] = str(folder / "variables.json")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "fsdp.yaml")]
    done = subprocess.run(
        [*command, str(HERE / "distill_worker.py"), str(folder / "run.yaml")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "variables.json").read_text()), lines(folder / "run")


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path, launched):
    """Two gloo processes of `moebius-distill`, spread or not, to `steps`; returns the log's lines."""

    def start(name, steps, spread, *options, alter=(), **settings):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(SETTINGS | {"out": str(tmp_path / name), "steps": steps} | settings))
        changes, variables = (["shard", *alter], launched[0]) if spread else (list(alter), {})
        process = worker.Run(path.with_suffix(".log"), [path, *options], 2, changes, variables)
        assert process.wait() == [0, 0], process.output
        return lines(tmp_path / name)

    return start


def test_spread_is_as_whole_and_each_goes_on_from_the_others_checkpoint(tmp_path, run):
    """Losses, balance, gradients, momenta and averages; accelerate's own FSDP 2, on CPUs (see distill_worker.py).

    In float64, Muon's orthogonal step included, only the order of sums differs: tensors agree to 1e-9 of their norm and
    of the way that weights went. What is logged is reduced in float32, whose rounding is 6e-8: 1e-6.
    """
    exact = {"alter": ["float64"]}
    spread, plain = run("spread", 2, True, **exact), run("plain", 2, False, **exact)
    for one, other in zip(spread, plain, strict=True):
        assert one.keys() == other.keys()
        assert {"weight/fine", "weight/out", "gradient_norm"} <= one.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=1e-6), (one["step"], name)
    for file in ("network", "average", "optimizer"):
        path = Path("checkpoints", "step-00000002", f"{file}.safetensors")
        ours, theirs = load_file(tmp_path / "spread" / path), load_file(tmp_path / "plain" / path)
        assert {n: (v.shape, v.dtype) for n, v in ours.items()} == {n: (v.shape, v.dtype) for n, v in theirs.items()}
        momenta = [name for name in ours if name.endswith("/momentum_buffer")]
        assert bool(momenta) == (file == "optimizer")
        for names in (momenta, [name for name in ours if name not in momenta]):
            if names:
                one, other = (torch.cat([v[name].double().flatten() for name in names]) for v in (ours, theirs))
                assert float((one - other).norm()) < 1e-9 * float(other.norm()), (file, names[0])
    # Each of the two checkpoints, gone on from in the other way.
    now_plain, now_spread = run("spread", 3, False, "--resume", **exact), run("plain", 3, True, "--resume", **exact)
    assert [line["step"] for line in now_plain] == [1, 2, 3] == [line["step"] for line in now_spread]
    for name, value in now_plain[-1].items():
        assert now_spread[-1][name] == pytest.approx(value, rel=1e-6), name
    first, second, before = (
        torch.cat([value.double().flatten() for _, value in sorted(load_file(path).items()) if value.ndim > 1])
        for path in (
            tmp_path / name / "checkpoints" / f"step-{step:08d}" / "network.safetensors"
            for name, step in (("spread", 3), ("plain", 3), ("plain", 2))
        )
    )
    assert float((first - second).norm()) < 1e-9 * float((second - before).norm())


def test_float32_and_bf16_are_as_without_fsdp(run, launched):
    """The same step of two processes, spread or not: the same forward pass, so losses and weights agree to 1e-5.

    In bf16 gradients are summed in another order, some of them in bf16, whose numbers are 4e-3 apart: 1e-3 (2e-4 seen).
    Where bf16 were not on, the losses would be float32's, of which they are off by some 1e-3. accelerate's own casts
    of parameters fail in the first batch norm.
    """
    (spread,) = run("spread", 1, True, precision="bf16")
    (plain,) = run("plain", 1, False, precision="bf16")
    (wide,) = run("wide", 1, False)
    for name, value in plain.items():
        assert spread[name] == pytest.approx(value, rel=1e-3 if name == "gradient_norm" else 1e-5), name
    assert abs(plain["loss"] / wide["loss"] - 1) > 1e-4
    (by_launcher,) = launched[1]
    for name, value in wide.items():
        assert by_launcher[name] == pytest.approx(value, rel=1e-5), name


def accelerator(**plugin):
    return SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        num_processes=1,
        state=SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(**plugin)),
    )


def test_version_1_is_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(TrainingError, match=r"FSDP version 1 flattens parameters.*write `fsdp_version: 2`"):
        check_distribution(accelerator(fsdp_version=1))
    with pytest.raises(TrainingError, match="activation checkpointing renames layers"):
        check_distribution(accelerator(fsdp_version=2, activation_checkpointing=True))
    with pytest.raises(TrainingError, match="sample pictures with FSDP"):
        check_distribution(accelerator(fsdp_version=2), samples_need_average=True)
    with pytest.raises(TrainingError, match=r"fsdp_offload_params: true keeps.*write `fsdp_offload_params: false`"):
        check_distribution(accelerator(fsdp_version=2, cpu_offload=True))
    with pytest.raises(TrainingError, match=r"SIZE_BASED_WRAP spreads.*write `TRANSFORMER_BASED_WRAP`"):
        check_distribution(accelerator(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=100))
    good = accelerator(fsdp_version=2, cpu_ram_efficient_loading=True, mixed_precision_policy="bf16")
    assert good.state.fsdp_plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    check_distribution(good)
    assert not good.state.fsdp_plugin.cpu_ram_efficient_loading
    assert good.state.fsdp_plugin.mixed_precision_policy.param_dtype is None


def test_layers_that_the_network_has_not_are_refused():
    """And the names that it has are in the message."""
    layers = accelerator(fsdp_version=2, transformer_cls_names_to_wrap=["ResidualBlock", "BertLayer"])
    with pytest.raises(TrainingError, match=r"names BertLayer, which is no layer of Moebius; it has .*ResidualBlock"):
        before_prepare(layers, Moebius(preset("tiny").student))


def test_without_an_accelerator_it_is_refused(tmp_path, monkeypatch):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    settings = parse_settings(SETTINGS | {"out": str(tmp_path), "steps": 1}, "test")
    with pytest.raises(TrainingError, match="FSDP version 1 flattens parameters"):  # accelerate's default
        Trainer(settings)
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(TrainingError, match="no accelerator to spread parameters over"):
        Trainer(settings)


def test_a_parameter_that_was_given_away_is_no_place_to_balance(monkeypatch):
    parameter = nn.Parameter(torch.zeros(2, 2))
    assert gathered_by_forward(parameter, "θ_F") is parameter
    monkeypatch.setattr(sharding, "DTensor", nn.Parameter)  # what FSDP leaves there is a kind of tensor of its own
    with pytest.raises(TrainingError, match=r"balanced at θ_F.*fsdp_reshard_after_forward: false"):
        gathered_by_forward(parameter, "θ_F")
