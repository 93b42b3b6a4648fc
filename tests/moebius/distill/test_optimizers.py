"""Muon with AdamW against `torch.optim` and a hand-written Newton-Schulz step; the learning rate; averaged weights."""

import copy
import math

import pytest
import torch
from torch import nn

from moebius import Moebius, preset
from moebius.distill.optimizers import (
    MuonAdamW,
    OptimizerOptions,
    ScheduleOptions,
    averaged,
    learning_rate_schedule,
    split_parameters,
)
from moebius.errors import TrainingError


class Network(nn.Module):
    """One of each kind: tall and wide matrices, kernels of rank 3 to 5, vectors."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "wide": (6, 20),
            "tall": (20, 6),
            "embedding": (9, 3, 4, 1),
            "kernel": (8, 5, 3, 3),
            "depthwise": (12, 1, 3, 3),
            "window": (4, 1, 1, 5, 5),
            "gain": (7,),
            "bias": (5,),
            "idle": (3, 3),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.register_buffer("statistics", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))


def give_gradients(network, seed):
    """A gradient for all but `idle`, which stays without, like a layer that a batch does not use."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        parameter.grad = None if name == "idle" else torch.randn(parameter.shape, generator=generator)


def newton_schulz(matrix, steps=5):
    """Jordan et al.'s quintic iteration, in float64: X <- aX + (bA + cA²)X with A = XXᵀ."""
    x = matrix.double()
    if x.shape[0] > x.shape[1]:
        return newton_schulz(matrix.T, steps).T
    x = x / x.norm()
    for _ in range(steps):
        product = x @ x.T
        x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
    return x


def test_muon_takes_matrices_and_kernels_and_adamw_the_rest():
    network = Network()
    network.tall.requires_grad_(False)
    matrices, vectors = split_parameters(network.parameters())
    assert [p.ndim for p in matrices] == [2, 4, 4, 4, 5, 2]
    assert [p.ndim for p in vectors] == [1, 1]
    with torch.device("meta"):
        student = Moebius(preset("full").student)
    matrices, vectors = split_parameters(student.parameters())
    assert sum(p.numel() for p in matrices) + sum(p.numel() for p in vectors) == 226_041_531
    assert sum(p.numel() for p in vectors) < 500_000
    assert all(p.is_contiguous() for p in matrices)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_update_is_a_hand_written_newton_schulz_step(steps):
    """Within 3 % of the update: torch runs the iteration in bfloat16."""
    options = OptimizerOptions(learning_rate=0.01)
    network = Network()
    optimizer = MuonAdamW(network.parameters(), options)
    names = ["wide", "tall", "embedding", "kernel", "depthwise", "window"]
    expected = {name: getattr(network, name).detach().double() for name in names}
    momenta = {name: torch.zeros(()) for name in names}
    for step in range(steps):
        give_gradients(network, step)
        for name in names:
            gradient = getattr(network, name).grad.double()
            gradient = gradient.reshape(gradient.shape[0], -1)
            momenta[name] = 0.95 * momenta[name] + 0.05 * gradient
            nesterov = 0.95 * momenta[name] + 0.05 * gradient
            update = 0.2 * math.sqrt(max(gradient.shape)) * newton_schulz(nesterov)
            expected[name] = expected[name] * (1 - 0.01 * 0.1) - 0.01 * update.reshape(expected[name].shape)
        optimizer.step()
    before = Network()
    for name in names:
        moved = (expected[name] - getattr(before, name)).norm()
        assert (getattr(network, name) - expected[name]).norm() < 0.03 * moved, name


def test_kernels_move_as_their_matrices_do_in_torchs_own_muon():
    network, options = Network(), OptimizerOptions(learning_rate=0.02)
    optimizer = MuonAdamW(network.parameters(), options)
    flat = [nn.Parameter(p.detach().clone().reshape(p.shape[0], -1)) for p in network.parameters() if p.ndim >= 2]
    vectors = [nn.Parameter(p.detach().clone()) for p in network.parameters() if p.ndim < 2]
    muon = torch.optim.Muon(flat, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(vectors, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(4):
        give_gradients(network, step)
        for copies, kind in ((flat, 2), (vectors, 1)):
            ours = [p for p in network.parameters() if (p.ndim >= 2) == (kind == 2)]
            for theirs, parameter in zip(copies, ours, strict=True):
                theirs.grad = None if parameter.grad is None else parameter.grad.clone().reshape(theirs.shape)
        optimizer.step(), muon.step(), adamw.step()
    ours = [p for p in network.parameters() if p.ndim >= 2], [p for p in network.parameters() if p.ndim < 2]
    for theirs, parameter in zip(flat + vectors, ours[0] + ours[1], strict=True):
        assert torch.equal(parameter.reshape(theirs.shape), theirs)
    assert torch.equal(network.idle, Network().idle)


def test_the_updates_entries_have_the_size_of_adamws():
    """0.2 sqrt(max(rows, columns)) on an orthogonal matrix: entries of about 0.2, whatever the shape."""
    network = Network()
    optimizer = MuonAdamW(network.parameters(), OptimizerOptions(learning_rate=1.0, weight_decay=0.0))
    give_gradients(network, 0)
    optimizer.step()
    for name in ("wide", "tall", "kernel", "embedding"):
        moved = getattr(network, name) - getattr(Network(), name)
        assert 0.12 < moved.square().mean().sqrt() < 0.28, name


def test_a_state_dict_continues_bit_for_bit():
    straight = Network()
    optimizer = MuonAdamW(straight.parameters())
    schedule = learning_rate_schedule(optimizer, ScheduleOptions(warm_up=3, milestones=(4,)))

    def go(network, optimizer, schedule, steps):
        for step in steps:
            give_gradients(network, step)
            optimizer.step()
            schedule.step()

    go(straight, optimizer, schedule, range(3))
    kept = copy.deepcopy((straight.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    go(straight, optimizer, schedule, range(3, 6))

    resumed = Network()
    resumed.load_state_dict(kept[0])
    again = MuonAdamW(resumed.parameters(), OptimizerOptions(learning_rate=7.0))  # the state's own rate holds
    plan = learning_rate_schedule(again, ScheduleOptions(warm_up=3, milestones=(4,)))
    again.load_state_dict(kept[1])
    plan.load_state_dict(kept[2])
    go(resumed, again, plan, range(3, 6))
    for (name, parameter), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in optimizer.param_groups]
    # Forgetting the momenta would have shown.
    forgetful = Network()
    forgetful.load_state_dict(kept[0])
    fresh = MuonAdamW(forgetful.parameters())
    go(forgetful, fresh, learning_rate_schedule(fresh, ScheduleOptions()), range(3, 6))
    assert not torch.equal(forgetful.kernel, straight.kernel)
    assert not torch.equal(forgetful.gain, straight.gain)


def test_the_state_is_tensors_by_parameter():
    network = Network()
    optimizer = MuonAdamW(network.parameters())
    give_gradients(network, 0)
    optimizer.step()
    state = optimizer.state_dict()
    assert [len(group["params"]) for group in state["param_groups"]] == [7, 2]
    assert state["state"][3]["momentum_buffer"].shape == (8, 45)
    assert set(state["state"][7]) == {"step", "exp_avg", "exp_avg_sq"}
    assert 6 not in state["state"]  # idle


def test_parameters_may_move_between_steps():
    """`.data` in other memory, as after `network.to(device)`: the step must not write to the old place."""
    network, still = Network(), Network()
    moved, stayed = MuonAdamW(network.parameters()), MuonAdamW(still.parameters())
    for step in range(2):
        give_gradients(network, step), give_gradients(still, step)
        moved.step(), stayed.step()
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
    for ours, theirs in zip(network.parameters(), still.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_channels_last_gradients_are_taken_in_order():
    network, other = Network(), Network()
    ours, theirs = MuonAdamW(network.parameters()), MuonAdamW(other.parameters())
    give_gradients(network, 0), give_gradients(other, 0)
    network.kernel.grad = network.kernel.grad.contiguous(memory_format=torch.channels_last)
    ours.step(), theirs.step()
    assert torch.equal(network.kernel, other.kernel)


def test_a_closure_and_the_gradient_scaler_work():
    network = Network()
    optimizer = MuonAdamW(network.parameters(), OptimizerOptions(learning_rate=0.01))

    def closure():
        optimizer.zero_grad()
        loss = sum(parameter.square().sum() for parameter in network.parameters())
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(network.state_dict())
    optimizer.zero_grad()
    scaler.scale(network.kernel.square().sum()).backward()
    network.kernel.grad[0, 0, 0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_networks_of_matrices_or_vectors_alone():
    for shape in ((3, 4), (5,)):
        parameter = nn.Parameter(torch.ones(shape))
        optimizer = MuonAdamW([parameter])
        parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        assert not torch.equal(parameter, torch.ones(shape))


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(TrainingError, match="nothing to train"):
        MuonAdamW([nn.Parameter(torch.ones(3), requires_grad=False)])
    with pytest.raises(TrainingError, match="not contiguous"):
        MuonAdamW([nn.Parameter(torch.ones(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))])
    with pytest.raises(TrainingError, match="no further parameter groups"):
        MuonAdamW([nn.Parameter(torch.ones(3))]).add_param_group({"params": [nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"adamw_betas": (0.9, math.nan)}, "AdamW beta is nan"),
        ({"ns_steps": 0}, "ns_steps is 0"),
    ],
)
def test_impossible_optimizers_are_refused(options, words):
    with pytest.raises(TrainingError, match=words):
        OptimizerOptions(**options)


def test_the_learning_rate_is_the_papers():
    schedule = ScheduleOptions()
    steps = {0: 1.0, 110_999: 1.0, 111_000: 0.1, 128_999: 0.1, 129_000: 0.01, 137_999: 0.01}
    assert {step: schedule.factor(step) for step in steps} == pytest.approx(steps)


def test_the_learning_rate_falls_as_half_a_cosine():
    options = ScheduleOptions(warm_up=10, milestones=(), cosine=100)
    assert [options.factor(step) for step in (4, 9, 50, 100, 200)] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * 0.04)) / 2, (1 + math.cos(math.pi * 0.09)) / 2, 0.5, 0, 0], abs=1e-12
    )


def test_the_learning_rate_warms_up_and_reaches_both_groups():
    network = Network()
    optimizer = MuonAdamW(network.parameters(), OptimizerOptions(learning_rate=1.0))
    schedule = learning_rate_schedule(optimizer, ScheduleOptions(warm_up=4, milestones=(6,), decay=0.5))
    seen = []
    for step in range(8):
        give_gradients(network, step)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1
        seen += rates
        optimizer.step()
        schedule.step()
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warm_up": -1}, "warm-up is -1"),
        ({"cosine": 0}, "the cosine is over 0 steps"),
        ({"milestones": (5, 5)}, r"milestones are \[5, 5\]"),
        ({"milestones": (0, 5)}, "rising numbers"),
        ({"decay": 0.0}, "decay is 0.0"),
        ({"decay": math.nan}, "decay is nan"),
    ],
)
def test_impossible_schedules_are_refused(options, words):
    with pytest.raises(TrainingError, match=words):
        ScheduleOptions(**options)


def test_averaged_weights_follow_the_formula():
    network = Network()
    ema, expected = averaged(network, decay=0.3), None
    for count in range(6):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1.0)
        network.statistics += 1
        network.count += 1
        ema.update_parameters(network)
        now = min(0.3, (1 + count) / (10 + count))
        weights = network.kernel.detach().double()
        expected = weights if expected is None else now * expected + (1 - now) * weights
    torch.testing.assert_close(ema.module.kernel.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(ema.module.statistics, network.statistics)
    assert ema.module.count == 6
    assert not torch.equal(ema.module.kernel, network.kernel)
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_averaged_weights_resume_with_their_count():
    network = Network()
    ema = averaged(network, decay=0.9)

    def go(ema, steps):
        for step in steps:
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.copy_(parameter * 0.5 + step)
            ema.update_parameters(network)

    go(ema, range(3))
    kept, weights = copy.deepcopy(ema.state_dict()), copy.deepcopy(network.state_dict())
    go(ema, range(3, 5))
    network.load_state_dict(weights)
    resumed = averaged(Network(), decay=0.9)
    resumed.load_state_dict(kept)
    go(resumed, range(3, 5))
    for name, value in ema.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_impossible_averages_are_refused(decay):
    with pytest.raises(TrainingError, match="expected 0 to 1"):
        averaged(Network(), decay)
