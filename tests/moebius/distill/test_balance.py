"""Balancing weights against a slow computation written from equations 4 and 5 of the paper."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from moebius import Moebius, preset
from moebius.distill.balance import RELEASED_BALANCE, BalanceOptions, balance, coarse_parameter, fine_parameter
from moebius.distill.losses import NAMES, RELEASED_LOSSES, LossOptions, Tap
from moebius.errors import TrainingError

THETA_F = "diff_model.conv_out.conv_pw.weight"
THETA_C = "diff_model.down_blocks.1.attentions.0.proj_out.weight"
EXACT = BalanceOptions(fine_epsilon=0.0, coarse_epsilon=0.0)  # the equations have no epsilon


def balanced(scene, options=None, settings=EXACT, losses=None, **more):
    options = options or scene.options
    return balance(
        scene.losses(options) if losses is None else losses,
        options,
        settings,
        fine=fine_parameter(scene.student),
        coarse=coarse_parameter(scene.student, 1),
        **more,
    )


def losses_as_written(scene, student):
    """The four losses of section 3.3, one after the other, nothing shared with the package but the network."""
    noise, features = student.forward_features(scene.sample, scene.batch.timesteps, scene.ids)
    a = scene.bars.double()[scene.batch.timesteps].reshape(-1, 1, 1, 1)

    def x0(e):
        return (scene.batch.latents - torch.sqrt(1 - a) * e) / torch.sqrt(a)

    return {
        "coarse": torch.mean((scene.teacher.features[2] - features[1]) ** 2),
        "task": torch.mean((scene.batch.target - noise) ** 2),
        "fine": torch.mean((scene.teacher.output - noise) ** 2),
        "perceptual": torch.mean(scene.distance(x0(noise), x0(scene.batch.target))),
    }


def squared_norm(scene, combine, name):
    """G(L, θ)²: a copy of the network, a whole forward and backward pass, and the sum of the gradient's squares."""
    student = copy.deepcopy(scene.student)
    combine(losses_as_written(scene, student)).backward()
    gradient = dict(student.named_parameters())[name].grad
    return sum(float(value) ** 2 for value in gradient.flatten())


def by_the_equations(scene):
    """Equations 4 and 5: L_total and its weights, in Python floats."""
    task_f, fine_f, perceptual_f = (
        squared_norm(scene, lambda losses, n=n: losses[n], THETA_F) for n in ("task", "fine", "perceptual")
    )
    w_fine, w_perceptual = task_f / fine_f, task_f / perceptual_f

    def out(losses):
        return losses["task"] + w_fine * losses["fine"] + w_perceptual * losses["perceptual"]

    w_out = squared_norm(scene, lambda losses: losses["coarse"], THETA_C) / squared_norm(scene, out, THETA_C)
    losses = {name: loss.item() for name, loss in losses_as_written(scene, copy.deepcopy(scene.student)).items()}
    total = losses["coarse"] + w_out * out(losses)
    return {"fine": w_fine, "perceptual": w_perceptual, "out": w_out}, total


def test_weights_and_total_are_those_of_equations_4_and_5(scene):
    expected, total = by_the_equations(scene)
    found = balanced(scene)
    assert found.weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert float(found.weights[name]) == pytest.approx(weight, rel=1e-10), name
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-10)
    assert len({round(weight, 3) for weight in expected.values()} | {1.0}) == 4  # none is 1, no two are equal


def test_float32_stays_near_float64(scene_of):
    """Within 1e-4: squares of norms that are sums of float32 products, through batch norms of small batches."""
    exact, found = balanced(scene_of(torch.float64)), balanced(scene_of(torch.float32))
    assert found.total.dtype == torch.float32
    for name, weight in exact.weights.items():
        assert float(found.weights[name]) == pytest.approx(float(weight), rel=1e-4), name
    assert float(found.total.detach()) == pytest.approx(float(exact.total.detach()), rel=1e-4)


def test_the_epsilons_change_next_to_nothing(scene):
    exact, usual = balanced(scene), balanced(scene, settings=BalanceOptions())
    for name, weight in exact.weights.items():
        assert float(usual.weights[name]) == pytest.approx(float(weight), rel=1e-3), name
        assert usual.weights[name] < weight


def test_the_released_balance_takes_plain_norms_and_the_task_alone(scene):
    found = balanced(scene, RELEASED_LOSSES_HERE, RELEASED_BALANCE)
    at_f, at_c = [(name, THETA_F) for name in ("task", "fine", "perceptual")], [("task", THETA_C), ("coarse", THETA_C)]
    norm = {
        (name, place): math.sqrt(squared_norm(scene, lambda losses, n=name: losses[n], place))
        for name, place in at_f + at_c
    }
    expected = {
        "fine": norm["task", THETA_F] / (norm["fine", THETA_F] + 1e-6),
        "perceptual": norm["task", THETA_F] / (norm["perceptual", THETA_F] + 1e-6),
        "out": norm["coarse", THETA_C] / (norm["task", THETA_C] + 1e-4),
    }
    for name, weight in expected.items():
        assert float(found.weights[name]) == pytest.approx(weight, rel=1e-10), name
    loss = {name: value.item() for name, value in losses_as_written(scene, copy.deepcopy(scene.student)).items()}
    out = 0.5 * loss["task"] + 0.01 * expected["fine"] * loss["fine"]
    out += 0.5 * expected["perceptual"] * loss["perceptual"]
    total = 0.01 * loss["coarse"] + expected["out"] * out
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-10)


RELEASED_LOSSES_HERE = replace(RELEASED_LOSSES, taps=(Tap(1, 2),))


def test_balanced_gradients_are_alike_with_plain_norms(scene):
    """What the weights are for: with exponent 1 the weighted gradients at θ are equally long."""
    losses = scene.losses()
    found = balanced(scene, losses=losses, settings=replace(EXACT, exponent=1.0))
    lengths = {name: float(found.norms[f"{name} at θ_F"]) for name in ("task", "fine", "perceptual")}
    for name in ("fine", "perceptual"):
        assert lengths[name] * float(found.weights[name]) == pytest.approx(lengths["task"], rel=1e-12)
    out = float(found.norms["out at θ_C"]) * float(found.weights["out"])
    assert out == pytest.approx(float(found.norms["coarse at θ_C"]), rel=1e-12)


def test_weights_are_constants_and_the_graph_is_kept(scene):
    """The gradient of the total is that of the sum with the weights as numbers; one forward pass serves it all."""
    found = balanced(scene)
    assert all(not value.requires_grad for value in (*found.weights.values(), *found.norms.values()))
    found.total.backward()
    weights = {name: float(weight) for name, weight in found.weights.items()}
    other = copy.deepcopy(scene.student)
    other.zero_grad()
    losses = losses_as_written(scene, other)
    out = losses["task"] + weights["fine"] * losses["fine"] + weights["perceptual"] * losses["perceptual"]
    (losses["coarse"] + weights["out"] * out).backward()
    largest = max(parameter.grad.norm() for parameter in other.parameters())
    for (name, ours), theirs in zip(scene.student.named_parameters(), other.parameters(), strict=True):
        # Some gradients are rounding errors of 0: a norm takes out what a bias before it adds.
        assert (ours.grad - theirs.grad).norm() < 1e-9 * theirs.grad.norm() + 1e-14 * largest, name


def test_accumulated_batches_do_not_touch_each_other(scene):
    """Two batches one after the other give the sum of their gradients, each with its own weights."""
    rows, parts = (slice(0, 2), slice(1, 3)), []
    for part in rows:
        scene.student.zero_grad()
        balanced(scene, losses=scene.losses(rows=part)).total.backward()
        parts.append([parameter.grad.clone() for parameter in scene.student.parameters()])
    scene.student.zero_grad()
    for part in rows:
        balanced(scene, losses=scene.losses(rows=part)).total.backward()
    for parameter, first, second in zip(scene.student.parameters(), *parts, strict=True):
        torch.testing.assert_close(parameter.grad, first + second, rtol=1e-12, atol=1e-12)


def test_gradient_checkpointing_gives_the_same(scene):
    plain = balanced(scene)
    plain.total.backward()
    expected = [parameter.grad.clone() for parameter in scene.student.parameters()]
    buffers = {name: buffer.clone() for name, buffer in scene.student.named_buffers()}
    other = copy.deepcopy(scene.student)
    scene.student = other
    other.zero_grad()
    other.diff_model.gradient_checkpointing = True
    saving = balanced(scene)
    counted = {name: buffer.clone() for name, buffer in other.named_buffers()}
    saving.total.backward()
    for name, weight in plain.weights.items():
        torch.testing.assert_close(saving.weights[name], weight, rtol=1e-10, atol=0)
    for parameter, gradient in zip(other.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    # Recomputed several times over, and still one batch more than before.
    tracked = [name for name in buffers if name.endswith("num_batches_tracked")]
    assert tracked
    for name, buffer in other.named_buffers():
        assert torch.equal(buffer, counted[name]), name
        assert name not in tracked or buffer == buffers[name] + 1


def test_a_gradient_scale_changes_nothing_but_the_way(scene):
    plain, scaled = balanced(scene), balanced(scene, scale=2.0**16)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(scaled.weights[name], weight, rtol=1e-12, atol=0)
    for name, norm in plain.norms.items():
        torch.testing.assert_close(scaled.norms[name], norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_bfloat16_autocast_stays_in_the_neighbourhood(scene_of, exponent):
    """Weights within 10 % per power of a norm of float32's: bfloat16 has 8 bits, and the sums average its errors."""
    scene = scene_of(torch.float32)
    settings = BalanceOptions(exponent=exponent)
    exact = balanced(scene, settings=settings)
    with torch.autocast("cpu", torch.bfloat16):
        student = scene.predict()
        inside = scene.losses(student=student)["perceptual"]
    assert student.output.dtype == torch.bfloat16
    assert inside.dtype == torch.float32
    losses = scene.losses(student=student)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    found = balanced(scene, losses=losses, settings=settings)
    for name, weight in exact.weights.items():
        assert float(found.weights[name]) == pytest.approx(float(weight), rel=0.1 * exponent), name
    found.total.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in scene.student.parameters())


def test_reduced_gradients_are_those_of_the_global_batch(scene):
    """Two processes, each with its own rows: averaged gradients give both the weights of all rows together."""
    student, rows = scene.student.eval(), (slice(0, 1), slice(1, 2))  # eval: statistics that rows do not share
    whole = balanced(scene, losses=scene.losses(rows=slice(0, 2)))
    shares = [scene.losses(rows=part) for part in rows]
    theta = {"F": fine_parameter(student), "C": coarse_parameter(student, 1)}
    wanted = iter(
        [
            *((theta["F"], lambda losses, n=n: losses[n]) for n in ("task", "fine", "perceptual")),
            (theta["C"], lambda losses: losses["coarse"]),
            (
                theta["C"],
                lambda losses: losses["task"] + sum(whole.weights[n] * losses[n] for n in ("fine", "perceptual")),
            ),
        ]
    )

    def reduce(gradient):
        parameter, combine = next(wanted)
        other = torch.autograd.grad(combine(shares[1]), parameter, retain_graph=True)[0]
        return (gradient + other) / 2

    found = balanced(scene, losses=shares[0], reduce=reduce)
    assert next(wanted, None) is None
    for name, weight in whole.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-9, atol=0, msg=name)


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        (("coarse",), set()),
        (("task",), set()),
        (("coarse", "fine"), {"out"}),  # the second row of the paper's table 5
        (("coarse", "task", "fine"), {"fine", "out"}),
        (("fine", "perceptual"), {"perceptual"}),
        (("coarse", "perceptual"), {"out"}),
    ],
)
def test_switched_off_losses_leave_the_others_balanced(scene, on, expected):
    options = LossOptions(**{name: float(name in on) for name in NAMES}, taps=(Tap(1, 2),))
    losses = scene.losses(options)
    found = balanced(scene, options, losses=losses)
    assert found.weights.keys() == expected
    total = sum(
        losses[name] * found.weights.get(name, 1.0) * (1.0 if name == "coarse" else found.weights.get("out", 1.0))
        for name in on
    )
    torch.testing.assert_close(found.total, total, rtol=1e-12, atol=0)
    found.total.backward()


def test_switched_off_balance_is_the_plain_sum(scene):
    losses = scene.losses()
    found = balanced(scene, RELEASED_LOSSES_HERE, BalanceOptions(enabled=False), losses=losses)
    assert not found.weights
    assert not found.norms
    expected = 0.01 * losses["coarse"] + 0.5 * losses["task"] + 0.01 * losses["fine"] + 0.5 * losses["perceptual"]
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=0)


def test_weights_are_clamped(scene):
    settings = BalanceOptions(fine_limit=0.01, coarse_limit=0.02)
    found = balanced(scene, settings=settings)
    assert {name: float(weight) for name, weight in found.weights.items()} == {
        "fine": 0.01,
        "perceptual": 0.01,
        "out": 0.02,
    }


def test_a_student_that_equals_its_teacher_meets_the_limit(scene):
    """No gradient to divide by: the weight is the limit, the weighted loss 0, and nothing is NaN."""
    scene.teacher = scene.teacher._replace(output=scene.predict().output.detach())
    found = balanced(scene, settings=BalanceOptions())
    assert float(found.weights["fine"]) == 1e6
    assert torch.isfinite(found.total)


def test_nan_is_not_hidden(scene):
    losses = scene.losses()
    losses["fine"] = losses["fine"] * math.nan
    assert torch.isnan(balanced(scene, losses=losses).total)


def test_losses_that_do_not_reach_theta_are_refused(scene):
    losses = scene.losses()
    with pytest.raises(TrainingError, match="'task' does not depend on θ_F"):
        balanced(scene, losses=losses | {"task": losses["task"].detach()})
    with pytest.raises(TrainingError, match="'fine' does not depend on θ_F"):
        balanced(scene, losses=losses | {"fine": losses["coarse"]})
    with pytest.raises(TrainingError, match="losses coarse, fine are on and have no value"):
        balanced(scene, losses={"task": losses["task"], "perceptual": losses["perceptual"]})


def test_theta_of_the_released_network():
    with torch.device("meta"):
        student = Moebius(preset("full").student)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    assert names[id(fine_parameter(student))] == THETA_F
    assert names[id(coarse_parameter(student, 2))] == "diff_model.down_blocks.2.attentions.1.proj_out.weight"
    assert names[id(coarse_parameter(student, 0))] == "diff_model.down_blocks.0.downsamplers.0.conv.weight"
    assert names[id(coarse_parameter(student, 3))] == "diff_model.up_blocks.0.upsamplers.0.conv.weight"
    assert names[id(coarse_parameter(student, 5))] == "diff_model.up_blocks.2.attentions.2.proj_out.weight"
    with pytest.raises(TrainingError, match="no student feature 6; the student has 0 to 5"):
        coarse_parameter(student, 6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exponent": 0.0}, "exponent is 0.0"),
        ({"exponent": math.nan}, "exponent is nan"),
        ({"against": "all"}, "'out' .paper. or 'task'"),
        ({"fine_epsilon": -1e-6}, "epsilon is -1e-06"),
        ({"coarse_limit": 0.0}, "limit is 0.0"),
        ({"fine_limit": math.nan}, "limit is nan"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(TrainingError, match=words):
        BalanceOptions(**options)


@pytest.mark.parametrize("overflowing", [0, 1], ids=["task", "fine"])
def test_a_norm_that_overflowed_gives_no_weight(scene, overflowing):
    """Neither 0 nor the limit, with which the step would be taken: NaN, for which a gradient scaler skips it."""
    calls = []

    def reduce(gradient):
        calls.append(gradient)
        return torch.full_like(gradient, torch.inf) if len(calls) == overflowing + 1 else gradient

    options = LossOptions(coarse=0, perceptual=0)
    fine, coarse = fine_parameter(scene.student), coarse_parameter(scene.student, 1)
    found = balance(scene.losses(options), options, BalanceOptions(), fine=fine, coarse=coarse, reduce=reduce)
    assert len(calls) == 2
    assert bool(found.weights["fine"].isnan())
    assert bool(found.total.isnan())
