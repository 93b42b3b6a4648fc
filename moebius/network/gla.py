"""Gated Linear Attention: the recurrence of the paper, a chunked algorithm for any device, and the layer.

Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (ICML 2024), section 4. A head keeps
a state S [d, e], zero before the first token. Token t decays the state by its gates, adds its key and value, and reads
the state with its query:

    S_t = diag(exp(log_gate_t)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t / sqrt(d)

`gla_recurrence` computes just that, token by token. It is the reference for the other two: `gla_chunked`, matrix
products over chunks, and `gla_fla`, the CUDA kernels of the package flash-linear-attention.

Letters in shapes: B batch, T tokens, h heads, d key width and e value width of a head, N chunks of c tokens each.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GlaForm = Literal["auto", "recurrence", "chunked", "fla"]
FORMS: tuple[GlaForm, ...] = get_args(GlaForm)

CHUNK = 64  # tokens; longer chunks cost more MACs, shorter ones more steps of the Python loop
GATE_DIVISOR = 16.0  # log-gates are divided by it, so that a state fades over many tokens
_HALVES = (torch.float16, torch.bfloat16)


def gla_recurrence(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    """Computes the attention token by token: the slow reference, differentiable. Sums and state are float32 at least.

    Args:
        q: [B, T, h, d] queries, not yet divided by sqrt(d).
        k: [B, T, h, d] keys.
        v: [B, T, h, e] values.
        log_gate: [B, T, h, d] natural logarithms of the gates, at most 0; -inf forgets everything before.

    Returns:
        [B, T, h, e] in the dtype of `v`.

    Raises:
        ValueError: the shapes do not fit each other, or there are no tokens.
    """
    _check(q, k, v, log_gate)
    dtype = _sum_dtype(q, k, v, log_gate)
    q, k, gate = q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype), log_gate.to(dtype).exp()
    values = v.to(dtype)
    state = values.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])  # [B, h, d, e]
    outputs = []
    for query, key, value, fade in zip(q.unbind(1), k.unbind(1), values.unbind(1), gate.unbind(1), strict=True):
        state = fade[..., None] * state + key[..., None] * value[..., None, :]
        outputs.append((query[..., None] * state).sum(-2))  # [B, h, e]
    return torch.stack(outputs, 1).to(v.dtype)


def gla_chunked(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, chunk: int = CHUNK) -> Tensor:
    """Computes the same as `gla_recurrence` by matrix products within chunks, and states between chunks.

    It is stable for any gates: only sums of log-gates are exponentiated, never differences, so no exponent is above 0
    and nothing cancels. Autocast is disabled inside.

    Args:
        q, k, v, log_gate: as in `gla_recurrence`.
        chunk: tokens per chunk, a power of two. The sequence may have any length.

    Raises:
        ValueError: as `gla_recurrence`, or `chunk` is not a power of two.
    """
    _check(q, k, v, log_gate)
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk {chunk}: expected a power of two, such as {CHUNK}")
    dtype, tokens, result = _sum_dtype(q, k, v, log_gate), q.shape[1], v.dtype
    chunk = min(chunk, 1 << (tokens - 1).bit_length())
    with _no_autocast(q.device):
        q, k, v, log_gate = (_in_chunks(x.to(dtype), chunk) for x in (q, k, v, log_gate))  # [B, h, N, c, d or e]
        q = q * q.shape[-1] ** -0.5
        read, until, after = _within_chunks(q, k, v, log_gate)
        updates = (k * after.exp()).mT @ v  # [B, h, N, d, e], added to the state by a chunk
        fades = until[..., -1, :].exp()[..., None]  # [B, h, N, d, 1], decay of the previous state
        read = read + (q * until.exp()) @ _states_before(fades, updates)
    return read.flatten(2, 3)[:, :, :tokens].transpose(1, 2).to(result)


def gla_fla(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    """Computes the same by the CUDA kernels of flash-linear-attention (`fla.ops.gla.chunk_gla`).

    Triton multiplies float32 as TF32, so float32 inputs agree with the other forms to about three digits only.

    Raises:
        ValueError: as `gla_recurrence`.
        RuntimeError: the package or CUDA is not available.
    """
    _check(q, k, v, log_gate)
    if problem := fla_unavailable(q.device):
        raise RuntimeError(problem)
    from fla.ops.gla import chunk_gla

    output: Tensor = chunk_gla(q.to(v.dtype), k.to(v.dtype), v, log_gate.float(), scale=q.shape[-1] ** -0.5)[0]
    return output.to(v.dtype)


def fla_unavailable(device: torch.device) -> str | None:
    """Why flash-linear-attention cannot run on a device, and what to do; None if it can."""
    if device.type != "cuda":
        return f"the GLA form 'fla' runs on CUDA, the tensors are on {device}; choose the form 'chunked' there"
    try:
        import fla.ops.gla  # noqa: F401
    except ImportError as error:
        return (
            f"the GLA form 'fla' needs flash-linear-attention, which cannot be imported ({error}); "
            "install fla-core, or choose the form 'chunked'"
        )
    return None


@cache
def _fla_installed() -> bool:
    return find_spec("fla") is not None


def resolve_form(form: GlaForm, device: torch.device, dtype: torch.dtype) -> GlaForm:
    """Resolves "auto" for a device and dtype: "fla" for 16-bit CUDA tensors if it is installed, else "chunked".

    float32 is left to the chunked form because Triton multiplies it as TF32. Other forms are returned unchanged.
    """
    if form != "auto":
        return form
    return "fla" if device.type == "cuda" and dtype in _HALVES and _fla_installed() else "chunked"


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, form: GlaForm = "auto") -> Tensor:
    """Computes the attention by the chosen form. Arguments, result and errors as `gla_recurrence` and `gla_fla`.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 100, 8, 20).unbind()
        >>> gated_linear_attention(q, k, v, -torch.rand(1, 100, 8, 20)).shape
        torch.Size([1, 100, 8, 20])
    """
    form = resolve_form(form, v.device, v.dtype)
    return {"recurrence": gla_recurrence, "chunked": gla_chunked, "fla": gla_fla}[form](q, k, v, log_gate)


def set_gla_form(network: nn.Module, form: GlaForm) -> None:
    """Chooses how all GLA layers of a network compute. Results agree up to rounding.

    Raises:
        ValueError: an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"GLA form {form!r}: expected {', '.join(map(repr, FORMS[:-1]))} or {FORMS[-1]!r}")
    for module in network.modules():
        if isinstance(module, GatedLinearAttention):
            module.form = form


class GatedLinearAttention(nn.Module):
    """The self-attention of PixelHacker's U-Net, called as diffusers calls its own `attn1`.

    Keys and queries are half as wide as the values. Parameters are named as in the released checkpoints.
    """

    def __init__(self, dim: int, heads: int, gate_rank: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.form: GlaForm = "auto"
        self.q_proj = nn.Linear(dim, dim // 2, bias=False)
        self.k_proj = nn.Linear(dim, dim // 2, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.g_proj = nn.Linear(dim, dim, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, dim // 2))
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.g_norm_swish_gate = nn.RMSNorm(dim // heads, eps=1e-6)

    def forward(
        self, x: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Tokens [B, T, C] in raster order -> [B, T, C].

        Raises:
            ValueError: a context or a mask is given; this layer is causal self-attention.
        """
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("a GLA layer was given a context or a mask; it attends to its own tokens only, drop them")
        q, k, v, gate = (
            projected.unflatten(-1, (self.heads, -1))  # [B, T, h, d or e]
            for projected in (self.q_proj(x), self.k_proj(x), self.v_proj(x), self.gk_proj(x))
        )
        log_gate = F.logsigmoid(gate.to(_sum_dtype(gate))) / GATE_DIVISOR
        y = self.g_norm_swish_gate(gated_linear_attention(q, k, v, log_gate, self.form)).flatten(-2)  # [B, T, C]
        return self.o_proj(y * F.silu(self.g_proj(x)))


def _within_chunks(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each token reads from its own chunk, and cumulative sums of the log-gates.

    Adjacent blocks of 1, 2, 4, ... tokens are joined until one block is left: in each pair the later block's
    queries read the earlier block's keys. Between key j and query i lie the log-gates after j in its block and those
    until i in the other, so a weight is the product of two exponentials of sums.

    Args:
        q: [..., c, d], scaled.
        k: [..., c, d].
        v: [..., c, e].
        log_gate: [..., c, d].

    Returns:
        read [..., c, e]; until [..., c, d], the sum over the chunk's tokens up to and with this one; after
        [..., c, d], the sum over those behind it.
    """
    read = (q * k).sum(-1, keepdim=True) * v  # its own contribution
    until, after = log_gate, torch.zeros_like(log_gate)
    size = 1
    while size < log_gate.shape[-2]:
        (k_early, _), (v_early, _), (_, q_late) = (_pairs(x, size) for x in (k, v, q))  # [..., pairs, size, d or e]
        (read_early, read_late), (until_early, until_late), (after_early, after_late) = (
            _pairs(x, size) for x in (read, until, after)
        )
        scores = (q_late * until_late.exp()) @ (k_early * after_early.exp()).mT  # [..., pairs, size, size]
        read = _joined(read_early, read_late + scores @ v_early)
        until = _joined(until_early, until_early[..., -1:, :] + until_late)
        after = _joined(after_early + until_late[..., -1:, :], after_late)
        size *= 2
    return read, until, after


def _pairs(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[..., c, d] -> the earlier and the later half of each 2 * size tokens, [..., pairs, size, d] each."""
    early, late = x.unflatten(-2, (-1, 2, size)).unbind(-3)
    return early, late


def _joined(early: Tensor, late: Tensor) -> Tensor:
    """The inverse of `_pairs`."""
    return torch.stack((early, late), -3).flatten(-4, -2)


def _states_before(fades: Tensor, updates: Tensor) -> Tensor:
    """The state before each chunk [B, h, N, d, e], of each chunk's fade [B, h, N, d, 1] and update [B, h, N, d, e]."""
    states = [torch.zeros_like(updates[:, :, 0])]
    for fade, update in zip(fades.unbind(2)[:-1], updates.unbind(2)[:-1], strict=True):
        states.append(fade * states[-1] + update)
    return torch.stack(states, 2)


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, T, h, d] -> [B, h, N, c, d], padded with zeros after the last token; they do not change the state."""
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(2, (-1, chunk))


def _no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Disables autocast inside the block, on devices that have it (the meta device has not)."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _sum_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where one of the tensors is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _check(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (q, k, v, log_gate)]
    fits = q.ndim == v.ndim == 4 and shapes[0] == shapes[1] == shapes[3] and shapes[0][:3] == shapes[2][:3]
    if not fits or q.numel() == 0 or v.numel() == 0:
        raise ValueError(
            f"q, k, v, log_gate of shapes {', '.join(str(list(shape)) for shape in shapes)}: expected [B, T, h, d] for "
            "q, k and log_gate, [B, T, h, e] for v, with at least one token"
        )
