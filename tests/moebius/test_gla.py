"""Gated Linear Attention: the chunked form against the recurrence, and the recurrence against closed forms."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from moebius.network import gla
from moebius.network.gla import (
    GatedLinearAttention,
    fla_unavailable,
    gated_linear_attention,
    gla_chunked,
    gla_recurrence,
    resolve_form,
    set_gla_form,
)

LENGTHS = [1, 2, 3, 13, 31, 64, 65, 127, 200]
GATES = {
    "trained": lambda shape: F.logsigmoid(torch.randn(shape, dtype=torch.float64)) / 16,
    "open": lambda shape: -1e-9 * torch.rand(shape, dtype=torch.float64),
    "shut": lambda shape: -1e4 * torch.rand(shape, dtype=torch.float64) - 100,
    "mixed": lambda shape: torch.tensor([0.0, -1e-6, -0.1, -3.0, -80.0, -1e4], dtype=torch.float64)[
        torch.randint(6, shape)
    ],
}


def inputs(tokens, gates="trained", dtype=torch.float64, heads=2, d=3, e=5):
    """q, k, v, log_gate that want gradients, rounded to `dtype` and kept in it."""
    torch.manual_seed(tokens)
    wide, narrow = (2, tokens, heads, e), (2, tokens, heads, d)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in (narrow, narrow, wide))
    return [x.to(dtype).requires_grad_() for x in (q, k, v, GATES[gates](narrow))]


def results(form, given, **how):
    """Output and the four gradients of a loss that weighs every number of it differently."""
    output = form(*given, **how)
    torch.manual_seed(0)
    weights = torch.randn(output.shape, dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad((output.double() * weights).sum(), given)]


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


# The recurrence


def test_the_recurrence_with_open_gates_is_causal_linear_attention():
    q, k, v, _ = inputs(9)
    scores = torch.einsum("bthd,bshd->bhts", q, k).tril() / 3**0.5
    expected = torch.einsum("bhts,bshe->bthe", scores, v)
    torch.testing.assert_close(gla_recurrence(q, k, v, torch.zeros_like(q)), expected, rtol=1e-12, atol=1e-12)


def test_the_recurrence_by_hand():
    """One number per head: S goes 1*2 = 2, then 2/4 + 3*1 = 3.5; the query of the second token is 2."""
    q, k, v = (torch.tensor(pair, dtype=torch.float64).view(1, 2, 1, 1) for pair in ([1, 2], [1, 3], [2, 1]))
    log_gate = torch.tensor([0.5, 0.25], dtype=torch.float64).log().view(1, 2, 1, 1)
    assert gla_recurrence(q, k, v, log_gate).flatten().tolist() == [2.0, 7.0]


def test_the_recurrence_weighs_each_pair_by_the_gates_between():
    """o_i = sum over j <= i of sum_d q_i k_j exp(sum of the log-gates j+1..i) v_j / sqrt(d)."""
    q, k, v, log_gate = inputs(11, "mixed")
    expected = torch.zeros_like(v)
    for i in range(11):
        for j in range(i + 1):
            weights = (q[:, i] * k[:, j] * log_gate[:, j + 1 : i + 1].sum(1).exp()).sum(-1, keepdim=True)
            expected[:, i] += weights * v[:, j] / 3**0.5
    torch.testing.assert_close(gla_recurrence(q, k, v, log_gate), expected, rtol=1e-12, atol=1e-12)


# The chunked form


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_chunked_is_the_recurrence_in_float64(tokens, gates):
    given = inputs(tokens, gates)
    expected = results(gla_recurrence, given)
    for chunk in (1, 8, 64):
        for found, right in zip(results(gla_chunked, given, chunk=chunk), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gates", GATES)
def test_chunked_in_float32(gates):
    """Output and gradients within 2e-6 relative of float64, with any gates: 4e-7 was seen at worst."""
    given = inputs(333, gates, torch.float32, d=20, e=40)
    expected = results(gla_recurrence, [x.detach().double().requires_grad_() for x in given])
    for found, right in zip(results(gla_chunked, given), expected, strict=True):
        assert found.dtype == torch.float32
        assert error(found, right) < 2e-6


@pytest.mark.parametrize("form", [gla_chunked, gla_recurrence])
def test_bfloat16_is_rounded_at_the_end_only(form):
    """Half a last place of bfloat16 is 2^-9; a state kept in bfloat16 would be an order of magnitude worse."""
    given = inputs(500, "open", torch.bfloat16)
    exact = gla_recurrence(*(x.detach().double() for x in given))
    output = form(*given)
    assert output.dtype == torch.bfloat16
    assert error(output, exact) < 2**-9


def test_autocast_does_not_reach_the_sums():
    given = inputs(100, dtype=torch.float32)
    plain = gla_chunked(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gla_chunked(*given), plain)


def test_gradcheck():
    given = inputs(5, heads=1, d=2, e=2)
    assert torch.autograd.gradcheck(lambda *x: gla_chunked(*x, chunk=2), given)
    assert torch.autograd.gradcheck(gla_recurrence, given)


@pytest.mark.parametrize("form", [gla_chunked, gla_recurrence])
def test_a_gate_of_zero_forgets_everything_before(form):
    q, k, v, log_gate = inputs(70)
    cut = log_gate.detach().clone()
    cut[:, 37] = -torch.inf
    output = form(q, k, v, cut)
    tail = form(q[:, 37:], k[:, 37:], v[:, 37:], log_gate[:, 37:])
    torch.testing.assert_close(output[:, 37:], tail, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(output[:, 37:].sum(), [q, k, v])
    assert all(torch.isfinite(gradient).all() and (gradient[:, :37] == 0).all() for gradient in gradients)


def test_later_tokens_change_nothing():
    q, k, v, log_gate = inputs(100)
    torch.testing.assert_close(
        gla_chunked(q, k, v, log_gate)[:, :41],
        gla_chunked(q[:, :41], k[:, :41], v[:, :41], log_gate[:, :41]),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("chunk", [0, -4, 24])
def test_a_chunk_that_is_no_power_of_two_is_refused(chunk):
    with pytest.raises(ValueError, match=f"chunk {chunk}: expected a power of two"):
        gla_chunked(*inputs(5), chunk=chunk)


@pytest.mark.parametrize("form", [gla_chunked, gla_recurrence, gla.gla_fla])
@pytest.mark.parametrize(
    "damage",
    [
        lambda q, k, v, g: (q[:, :4], k, v, g),
        lambda q, k, v, g: (q, k, v[:, :, :1], g),
        lambda q, k, v, g: (q, k, v, g[..., :1]),
        lambda q, k, v, g: (q[0], k[0], v[0], g[0]),
        lambda q, k, v, g: (q[:, :0], k[:, :0], v[:, :0], g[:, :0]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(form, damage):
    with pytest.raises(ValueError, match=r"expected \[B, T, h, d\] for q, k and log_gate"):
        form(*damage(*inputs(5)))


# Which form, and flash-linear-attention


@pytest.mark.parametrize(
    ("form", "device", "dtype", "installed", "chosen"),
    [
        ("auto", "cpu", torch.bfloat16, True, "chunked"),
        ("auto", "cuda", torch.bfloat16, True, "fla"),
        ("auto", "cuda", torch.float16, True, "fla"),
        ("auto", "cuda", torch.float32, True, "chunked"),
        ("auto", "cuda", torch.bfloat16, False, "chunked"),
        ("fla", "cuda", torch.float32, False, "fla"),
        ("recurrence", "cuda", torch.bfloat16, True, "recurrence"),
    ],
)
def test_what_auto_means(monkeypatch, form, device, dtype, installed, chosen):
    monkeypatch.setattr(gla, "_fla_installed", lambda: installed)
    assert resolve_form(form, torch.device(device), dtype) == chosen


def test_fla_on_a_cpu_is_refused():
    with pytest.raises(RuntimeError, match="runs on CUDA, the tensors are on cpu; choose the form 'chunked'"):
        gated_linear_attention(*inputs(5), form="fla")


def test_fla_asked_for_and_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    problem = fla_unavailable(torch.device("cuda"))
    assert problem is not None
    assert "cannot be imported" in problem
    assert "install fla-core, or choose the form 'chunked'" in problem


def test_how_fla_is_called(monkeypatch):
    """Its layout is ours; keys and queries in the values' dtype, log-gates in float32, and the scale passed."""
    module = ModuleType("fla.ops.gla")

    def chunk_gla(q, k, v, g, scale=None):
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert g.dtype == torch.float32
        return gla_recurrence(q.double() * scale * q.shape[-1] ** 0.5, k, v, g), None

    module.chunk_gla = chunk_gla
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gla", module)
    monkeypatch.setattr(gla, "fla_unavailable", lambda device: None)
    q, k, v, log_gate = inputs(30, dtype=torch.bfloat16)
    found = gated_linear_attention(q, k.float(), v, log_gate, form="fla")
    assert torch.equal(found, gla_recurrence(q, k, v, log_gate))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [64, 200, 1024])
def test_fla_on_a_gpu(tokens):
    """bfloat16 inputs and state: a hundredth of output and gradients is what the kernels' own rounding makes."""
    pytest.importorskip("fla.ops.gla", reason="flash-linear-attention is not installed")
    given = [x.detach().cuda().requires_grad_() for x in inputs(tokens, dtype=torch.bfloat16, d=20, e=40)]
    expected = results(gla_recurrence, [x.detach().double().cpu().requires_grad_() for x in given])
    for found, right in zip(results(lambda *x: gla.gla_fla(*x).cpu(), given), expected, strict=True):
        assert error(found.cpu(), right) < 1e-2


# The layer


def layer_in_words(layer, x):
    """The layer written head by head and token by token, from the design's sentences."""
    heads, dim = layer.heads, x.shape[-1]
    wide, narrow = dim // heads, dim // 2 // heads
    gain = layer.g_norm_swish_gate.weight
    joined = torch.zeros_like(x)
    for head in range(heads):
        keys, values = slice(head * narrow, (head + 1) * narrow), slice(head * wide, (head + 1) * wide)
        for row in range(x.shape[0]):
            state = x.new_zeros(narrow, wide)
            for t in range(x.shape[1]):
                token = x[row, t]
                gate = layer.gk_proj[1].weight[keys] @ (layer.gk_proj[0].weight @ token) + layer.gk_proj[1].bias[keys]
                log_gate = gate.sigmoid().log() / 16
                key, value = layer.k_proj.weight[keys] @ token, layer.v_proj.weight[values] @ token
                state = torch.diag(log_gate.exp()) @ state + torch.outer(key, value)
                read = (layer.q_proj.weight[keys] @ token / narrow**0.5) @ state
                normed = read / (read.square().mean() + 1e-6).sqrt() * gain
                swish = layer.g_proj.weight[values] @ token
                joined[row, t, values] = normed * swish * swish.sigmoid()
    return joined @ layer.o_proj.weight.T


@pytest.mark.parametrize("form", ["auto", "chunked", "recurrence"])
def test_the_layer_is_what_the_design_says(form):
    torch.manual_seed(3)
    layer = GatedLinearAttention(24, heads=3, gate_rank=5).double()
    torch.nn.init.normal_(layer.g_norm_swish_gate.weight)
    set_gla_form(layer, form)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer_in_words(layer, x), rtol=1e-10, atol=1e-12)


def test_a_context_or_mask_is_refused():
    layer, x = GatedLinearAttention(16, heads=2), torch.zeros(1, 4, 16)
    with pytest.raises(ValueError, match="its own tokens only"):
        layer(x, encoder_hidden_states=x)
    with pytest.raises(ValueError, match="its own tokens only"):
        layer(x, attention_mask=torch.ones(1, 4))


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="expected 'auto', 'recurrence', 'chunked' or 'fla'"):
        set_gla_form(GatedLinearAttention(16, heads=2), "fast")
