"""The fused λ operators: against their slow references, values and gradients, and `opcheck`."""

import pytest
import torch

from moebius.network.lambda_layers import LocalLambda
from moebius.network.lambda_ops import (
    default_tile,
    interactive_lambda,
    interactive_lambda_reference,
    lambda_summary,
    lambda_summary_reference,
    local_lambda,
    local_lambda_backward,
    local_lambda_reference,
)

# float64 on both sides: sums of up to 10,000 terms in another order, 1e-15 each; a wrong term costs 1e-4 and more.
TOLERANCE = 1e-11


def numbers(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=dtype, generator=generator, requires_grad=True)


def gradients(function, inputs, *rest):
    output = function(*inputs, *rest)
    weights = numbers(*output.shape, seed=9).detach()
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


def agree(function, reference, inputs, rest=(), reference_rest=()):
    for got, expected in zip(
        gradients(function, inputs, *rest), gradients(reference, inputs, *reference_rest), strict=True
    ):
        assert got.shape == expected.shape
        assert float(((got - expected).norm() / expected.norm()).detach()) < TOLERANCE


@pytest.mark.parametrize("shape", [(1, 4, 9, 5), (3, 7, 64, 2)])
def test_summary(shape):
    batch, depth, positions, values = shape
    agree(
        lambda_summary, lambda_summary_reference, [numbers(batch, depth, positions), numbers(batch, positions, values)]
    )


@pytest.mark.parametrize(
    ("size", "tile", "window"),
    [((8, 8), (1, 8), 15), ((8, 8), (2, 4), 5), ((6, 12), (2, 4), 7), ((16, 16), (16, 16), 15), ((5, 7), (1, 7), 3)],
)
def test_local_lambda(size, tile, window):
    height, width = size
    inputs = [
        numbers(2, height * width, 3 * 4),
        numbers(2, height * width, 4),
        numbers(2, 4, 4),
        numbers(4, window, window),
    ]
    agree(local_lambda, local_lambda_reference, inputs, (size, tile), (size,))


def test_interactive_lambda():
    agree(
        interactive_lambda,
        interactive_lambda_reference,
        [numbers(2, 3, 10, 4 * 5), numbers(2, 10, 5, 6), numbers(2, 6, 5)],
    )


def test_local_lambda_is_the_layers():
    """The operator fed as the layer feeds itself gives the layer's output."""
    torch.manual_seed(0)
    layer = LocalLambda(32, 4, 15).double().eval()
    x, size = numbers(2, 64, 32).detach(), (8, 8)
    image = x.transpose(1, 2).reshape(2, 32, *size)
    query = layer.norm_q(layer.to_q(image)).flatten(2).transpose(1, 2)
    values = layer.norm_v(layer.to_v(image)).flatten(2).transpose(1, 2)
    summary = lambda_summary(layer.to_k(image).flatten(2), values) + layer.pos_conv.bias[:, None]
    got = local_lambda(query, values, summary, layer.pos_conv.weight[:, 0, 0], size, (2, 4))
    expected = layer(x, size)
    assert float(((got - expected).norm() / expected.norm()).detach()) < TOLERANCE


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (lambda_summary, lambda: (numbers(2, 4, 16), numbers(2, 16, 4))),
        (interactive_lambda, lambda: (numbers(2, 1, 6, 8), numbers(2, 6, 4, 3), numbers(2, 3, 4))),
        (
            local_lambda,
            lambda: (numbers(2, 16, 8), numbers(2, 16, 4), numbers(2, 4, 4), numbers(4, 3, 3), [4, 4], [2, 4]),
        ),
        (
            local_lambda_backward,
            lambda: [
                value.detach() if isinstance(value, torch.Tensor) else value
                for value in (
                    *(numbers(2, 16, 8), numbers(2, 16, 8), numbers(2, 16, 4), numbers(2, 4, 4), numbers(4, 3, 3)),
                    *([4, 4], [2, 4]),
                )
            ],
        ),
    ],
    ids=["summary", "interactive", "local", "local backward"],
)
def test_opcheck(operator, arguments):
    """Schema, shape function, autograd registration and tracing, by torch's own checker."""
    torch.library.opcheck(operator, arguments())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tile": (3, 4)}, "tiles of 3x4 do not divide 8x8"),
        ({"size": (4, 8)}, "expected 32 positions"),
        ({"summary": torch.zeros(2, 3, 4)}, "do not fit"),
        ({"window": torch.zeros(4, 4, 4)}, "has no middle"),
    ],
)
def test_refusals(change, words):
    arguments = {
        "query": torch.zeros(2, 64, 12),
        "values": torch.zeros(2, 64, 4),
        "summary": torch.zeros(2, 4, 4),
        "window": torch.zeros(4, 5, 5),
        "size": (8, 8),
        "tile": (2, 4),
    }
    with pytest.raises(ValueError, match=words):
        local_lambda(**arguments | change)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 32), (16, 16), (7, 24), (9, 9), (12, 20)])
def test_the_default_tile_divides(height, width):
    tall, wide = default_tile(height, width)
    assert height % tall == 0
    assert width % wide == 0
