"""Dense layers through oneDNN: nn.Linear's numbers and gradients, and nn.Linear itself wherever anybody looks, or no AVX-512 is.

float32 sums of K terms of order one; a bound of 2e-6 sqrt(K) times their size is some twenty roundings.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hybrid_models.dense import HAS_AVX512, dense, is_plain, product, product_over_rows

ONEDNN = "mkldnn::_linear_pointwise"


def close(ours, right, terms):
    torch.testing.assert_close(
        ours.double(), right, rtol=1e-5, atol=2e-6 * terms**0.5 * max(1.0, right.abs().max().item())
    )


def operations(function):
    with torch.profiler.profile() as profiler:
        function()
    return {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows, K, N", [((16,), 32, 48), ((3, 50), 96, 24), ((2, 1), 512, 512), ((1, 17, 5), 8, 700)])
def test_values_and_gradients(rows, K, N, bias):
    """Against float64; the two forms of the weights' gradient (wider and narrower outputs) both occur."""
    torch.manual_seed(0)
    layer, x, dy = nn.Linear(K, N, bias=bias), torch.randn(*rows, K, requires_grad=True), torch.randn(*rows, N)
    assert (ONEDNN in operations(lambda: dense(layer, x))) == HAS_AVX512
    y = dense(layer, x)
    y.backward(dy)
    wide = [p.detach().double().requires_grad_() for p in (x, *layer.parameters())]
    right = nn.functional.linear(*wide)
    right.backward(dy.double())
    close(y, right, K)
    for ours, theirs, terms in zip((x, *layer.parameters()), wide, (N, dy.numel() / N, dy.numel() / N)):
        assert ours.grad.stride() == ours.stride()
        close(ours.grad, theirs.grad, terms)


def test_second_derivatives():
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40, bias=False), torch.randn(20, 24)

    def squared_gradient(function, x, weight):
        (gradient,) = torch.autograd.grad(function(x, weight).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (x, weight))

    leaves = [p.detach().requires_grad_() for p in (x, layer.weight)]
    ours = squared_gradient(product, *leaves)
    right = squared_gradient(lambda x, w: x @ w.t(), *(leaf.detach().double().requires_grad_() for leaf in leaves))
    for mine, theirs in zip(ours, right):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("widths", [(8, 70), (70, 8)])
def test_product_over_rows(widths):
    torch.manual_seed(0)
    a, b = (torch.randn(300, width) for width in widths)
    close(product_over_rows(a, b), a.double().t() @ b.double(), 300)


def watched_by_flop_counter(layer, x):
    with FlopCounterMode(display=False) as counter:
        y = dense(layer, x)
    assert counter.get_total_flops() == 2 * x.numel() * y.shape[-1]
    return y


def under_autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = dense(layer, x)
    assert y.dtype == torch.bfloat16
    return y.float()


def with_a_hook(layer, x):
    seen = []
    with layer.register_forward_hook(lambda *args: seen.append(1)):
        y = dense(layer, x)
    assert seen
    return y


def with_a_forward_of_its_own(layer, x):
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight)
    y = dense(layer, x) / 2
    del layer.forward
    return y


def switched_off(layer, x):
    with torch.backends.mkldnn.flags(enabled=False):
        return dense(layer, x)


def forward_mode(layer, x):
    import torch.autograd.forward_ad as fwAD

    with fwAD.dual_level():
        y, tangent = fwAD.unpack_dual(dense(layer, fwAD.make_dual(x, x)))
        torch.testing.assert_close(tangent, y)
        return y


@pytest.mark.parametrize(
    "way",
    [
        watched_by_flop_counter,
        under_autocast,
        with_a_hook,
        with_a_forward_of_its_own,
        switched_off,
        forward_mode,
        lambda layer, x: torch.func.vmap(lambda row: dense(layer, row))(x),
        lambda layer, x: torch.func.functional_call(layer, {"weight": layer.weight}, (x,)),
        lambda layer, x: torch.jit.trace(lambda x: dense(layer, x), x, check_trace=False)(x),
        lambda layer, x: torch.compile(lambda x: dense(layer, x), backend="eager", fullgraph=True)(x),
        lambda layer, x: dense(layer, x.double().to(torch.float32)[:1, :1]).expand(2, 40, -1),
    ],
)
def test_elsewhere_the_layer_is_called(way):
    torch.manual_seed(0)
    layer = nn.Linear(32, 48, bias=False).requires_grad_(False)
    x = torch.randn(1, 1, 32).expand(2, 40, 32).contiguous()
    tolerance = 2e-2 if way is under_autocast else 1e-5
    done = []
    assert ONEDNN not in operations(lambda: done.append(way(layer, x)))
    torch.testing.assert_close(done[0], layer(x), rtol=tolerance, atol=tolerance)


def test_other_dtypes_and_kinds_of_layer():
    x = torch.randn(64, 32)
    assert dense(nn.Identity(), x) is x
    with pytest.raises(RuntimeError, match="dtype"):
        dense(nn.Linear(32, 8, dtype=torch.float64), x)
    with pytest.raises(RuntimeError, match="shape"):
        dense(nn.Linear(16, 8), x)

    quantised = torch.ao.nn.quantized.dynamic.Linear(32, 8)  # whose weight is a method
    assert dense(quantised, x).shape == (64, 8)

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    twice = Twice(32, 8)
    assert not is_plain(twice, bias=True)
    torch.testing.assert_close(dense(twice, x), twice(x))
