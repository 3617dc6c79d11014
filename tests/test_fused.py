"""The fused operations against the torch forms, values and gradients, in Triton's interpreter on the CPU.

The reference is ``pointwise`` in float64 on the same numbers. float32 tolerance 1e-5 (2e-5 for gradients that are sums over
rows): both sides add at most some hundred terms of order one, in another order. What a device adds is in test_gpu.py.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton", reason="Triton is for Linux and Windows")

from transformers.loss.loss_utils import ForCausalLMLoss

from hybrid_models import attention, fused, loss, mixers, modeling_hybrid_linear, pointwise  # noqa: E402
from hybrid_models.layout import TokenLayout  # noqa: E402
from hybrid_models.mixers import HybridLinearRMSNorm, ShortConvolution  # noqa: E402
from tests.common import randomize, tiny_model  # noqa: E402

B, T = 2, 13


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def compare(run, inputs, modules=(), grad_atol=2e-5):
    """``run(ops, *inputs, *modules)`` with both modules of operations: outputs, and gradients of a random projection of them."""
    results = []
    for ops, dtype in ((pointwise, torch.float64), (fused, torch.float32)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        own = [copy.deepcopy(module).to(dtype) for module in modules]
        outputs = [y for y in run(ops, *leaves, *own) if y is not None]
        g = torch.Generator().manual_seed(1)
        sum((y * torch.randn(y.shape, generator=g, dtype=torch.float64)).sum() for y in outputs).backward()
        gradients = [x.grad for x in leaves] + [p.grad for module in own for p in module.parameters()]
        results.append((outputs, gradients))
    (want, want_gradients), (got, got_gradients) = results
    assert len(want) == len(got)
    for a, b in zip(want, got):
        torch.testing.assert_close(b.double(), a, rtol=1e-5, atol=1e-5)
    for a, b in zip(want_gradients, got_gradients):
        torch.testing.assert_close(b.double(), a, rtol=1e-5, atol=grad_atol)


def norm_of(width):
    norm = HybridLinearRMSNorm(width, 1e-5)
    nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("width", [48, 64])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(width, residual):
    """Both results are used, as in a layer: the sum goes on, its norm into the mixer."""
    x = torch.randn(B, T, width)
    inputs = [x, torch.randn_like(x)] if residual else [x]
    compare(lambda ops, x, *rest: ops.rms_norm(rest[-1], x, *rest[:-1]), inputs, [norm_of(width)])


def test_rms_norm_of_which_one_result_is_used():
    x = torch.randn(B, T, 48)
    compare(lambda ops, x, r, norm: ops.rms_norm(norm, x, r)[1:], [x, torch.randn_like(x)], [norm_of(48)])


@pytest.mark.parametrize("act", [None, "silu", "sigmoid"])
def test_output_norm(act):
    o, gate = torch.randn(B, T, 3, 24), torch.randn(B, T, 72)
    inputs = [o] if act is None else [o, gate]
    compare(lambda ops, o, *rest: [ops.output_norm(rest[-1], o, o.dtype, *rest[:-1], act=act)], inputs, [norm_of(24)])


def packed(ops, *parts):
    return torch.cat(parts, -1) if ops is fused else parts


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
def test_short_convolution(kernel, documents):
    heads = [(2, 12, "unit"), (2, 12, "silu"), (1, 20, "nothing")]
    conv = ShortConvolution(68, kernel)
    layout = None
    if documents:
        reset = torch.zeros(B, T, dtype=torch.bool)
        reset[:, 0] = reset[0, 1] = reset[0, 5] = reset[1, 7] = reset[1, 8] = True
        layout = TokenLayout().packed(reset)
    parts = [torch.randn(B, T, n) for n in (24, 24, 20)]
    compare(
        lambda ops, a, b, c, conv: ops.short_convolution(packed(ops, a, b, c), conv, heads, None, layout)[0],
        parts,
        [conv],
    )


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("kernel", [2, 4])
def test_the_convolution_is_its_formula(kernel, begun):
    """y_t = sum_w taps_w x_(t - kernel + 1 + w) in float64, for lengths on both sides of where oneDNN takes over."""
    for dtype, tokens in itertools.product((torch.float32, torch.bfloat16, torch.float64), (1, 2 * kernel - 2, 50)):
        conv = ShortConvolution(24, kernel)
        x = torch.randn(B, tokens, 24).to(dtype).requires_grad_()
        window = torch.randn(B, kernel - 1, 24).to(dtype) if begun else None
        with torch.autocast("cpu", torch.bfloat16):  # which must not reach it
            y, inputs = conv.to(dtype)(x, window)
        before = torch.zeros(B, kernel - 1, 24) if window is None else window
        seen = torch.cat((before.double(), x.double()), 1)
        taps = conv.weight[:, 0].double()
        want = torch.stack([(seen[:, t : t + kernel] * taps.t()).sum(1) for t in range(tokens)], 1)
        assert y.dtype == torch.promote_types(dtype, torch.float32) and torch.equal(inputs.double(), seen)
        weight = torch.randn(B, tokens, 24)
        grads = [torch.autograd.grad((out * weight).sum(), (x, conv.weight)) for out in (want, y)]
        for a, b in zip((y, *grads[1]), (want, *grads[0]), strict=True):
            # Four products added up in float32; gradients come back in 8 bits where x has them.
            tolerance = 1e-2 if b.dtype == torch.bfloat16 else 1e-12 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def test_a_convolution_goes_on_from_its_inputs():
    """In two pieces, the second after a window cut from the first's inputs, as a cache does it."""
    heads, conv = [(2, 12, "unit"), (1, 20, "silu")], ShortConvolution(44, 4)
    x = torch.randn(B, T, 44)
    whole, _ = fused.short_convolution(x, conv, heads)
    first, inputs = fused.short_convolution(x[:, :5].contiguous(), conv, heads, keep_inputs=True)
    rest, _ = fused.short_convolution(x[:, 5:].contiguous(), conv, heads, inputs[:, -3:], keep_inputs=True)
    for a, b, c in zip(whole, first, rest):
        torch.testing.assert_close(torch.cat((b, c), 1), a, rtol=1e-5, atol=1e-6)


def test_activation_without_convolution():
    heads = [(2, 12, "unit"), (1, 20, "silu")]
    parts = [torch.randn(B, T, n) for n in (24, 20)]
    compare(lambda ops, a, b: ops.short_convolution(packed(ops, a, b), None, heads)[0], parts)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("form", ["log", "input", "key"])
def test_forget_gate(form, bounded):
    """Gates of 1e-9 to 1 - 1e-9: the logarithm of one near 1, and one minus it, must keep their digits."""
    f, z, lower = torch.randn(B, T, 40) * 8, torch.randn(B, T, 40), torch.rand(40) * 0.9

    def run(ops, f, z, lower):
        bounds = (lower, 1 - lower) if bounded else None
        parts = f if form == "log" else packed(ops, z, f)
        return [*ops.forget_gate(parts, bounds, 0.25 if form == "log" else 1.0, form), 0 * z.sum(), 0 * lower.sum()]

    compare(run, [f, z, lower], grad_atol=1e-4)  # the bounds' gradient sums 26 rows of 1 / gate, up to 10 each


def test_forget_gate_through_a_low_rank():
    layer = nn.Linear(6, 40)
    compare(lambda ops, r, layer: ops.forget_gate(r, scale=0.25, through=layer), [torch.randn(B, T, 6) * 4], [layer])


def test_small_forget_gates_keep_their_digits():
    f = torch.tensor([-30.0, -5.0, 5.0, 15.0, 30.0]).expand(1, 1, 5).contiguous()
    log_a, _, rest = fused.forget_gate(torch.cat((f, f), -1), form="key")
    torch.testing.assert_close(log_a.double(), F.logsigmoid(f.double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(rest.double(), torch.sigmoid(-f.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("table", [1, B])
def test_rotate(table):
    angles = torch.rand(table, T, 8).repeat(1, 1, 2) * 6
    q, k = torch.randn(B, T, 3 * 16), torch.randn(B, T, 16)
    compare(lambda ops, q, k: ops.rotate(packed(ops, q, k), angles.cos().to(q), angles.sin().to(q), (3, 1)), [q, k])


def test_project():
    layers = nn.ModuleList(nn.Linear(24, n, bias=False) for n in (8, 12, 20, 4))

    def run(ops, x, layers):
        first, second, third = ops.project(x, (layers[0], layers[1]), (layers[2],), (layers[3],))
        return [first if ops is fused else torch.cat(first, -1), second, third]

    compare(run, [torch.randn(B, T, 24)], [layers])


def test_project_calls_layers_that_do_more_than_multiply():
    layers = [nn.Linear(24, 8, bias=False), nn.Linear(24, 8)]
    x = torch.randn(B, T, 24)
    assert not fused.is_plain(layers[1])
    torch.testing.assert_close(fused.project(x, tuple(layers))[0], torch.cat([layer(x) for layer in layers], -1))
    layers[0].register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(fused.project(x, (layers[0],))[0], 2 * F.linear(x, layers[0].weight))


def test_a_module_with_offloaded_weights_is_called():
    """accelerate keeps such weights elsewhere until its own forward runs."""
    from accelerate import cpu_offload

    norm, mlp = norm_of(32), tiny_model("gla").float().model.layers[0].mlp
    conv = ShortConvolution(64, 4)
    x, wide = torch.randn(B, T, 32), torch.randn(B, T, 64)

    def run():
        total, normed = fused.rms_norm(norm, x)
        convolved, _ = fused.short_convolution(wide, conv, [(2, 32, "silu")])
        gated = fused.output_norm(norm, x[:, :, None], x.dtype, x, "silu")
        return [normed, gated, convolved[0], fused.mlp(mlp, x), fused.project(x, (mlp.gate_proj,))[0]]

    with torch.no_grad():
        want = run()
        for module in (norm, mlp, conv):
            cpu_offload(module, execution_device="cpu")
        assert norm.weight.is_meta and mlp.gate_proj.weight.is_meta
        for a, b in zip(want, run()):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient():
    layers = [nn.Linear(24, 8, bias=False).requires_grad_(False), nn.Linear(24, 8, bias=False)]
    x = torch.randn(B, T, 24, requires_grad=True)
    sum(y.sum() for y in fused.project(x, *[(layer,) for layer in layers])).backward()
    assert layers[0].weight.grad is None and layers[1].weight.grad is not None and x.grad is not None


def test_mlp():
    module = tiny_model("gla").model.layers[0].mlp
    compare(lambda ops, x, module: [ops.mlp(module, x)], [torch.randn(B, T, 32)], [module])


@pytest.mark.parametrize("count", [None, 7])
def test_linear_cross_entropy(count, monkeypatch):
    monkeypatch.setitem(loss.BLOCK_ELEMENTS, "cpu", 5 * 50)  # five tokens at a time, the last block shorter
    hidden, weight = torch.randn(13, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    targets = torch.randint(0, 50, (13,))
    targets[[2, 12]] = -100
    values = []
    for one in (
        lambda h, w: F.cross_entropy(h @ w.t(), targets, reduction="sum") / (count or 11),
        lambda h, w: loss.linear_cross_entropy(h, w, targets, count),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = one(h, w)
        (3 * value).backward()
        values.append((value.detach(), h.grad, w.grad))
    for a, b in zip(*values):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_cross_entropy_kernel():
    logits, targets = 4 * torch.randn(6, 70), torch.tensor([0, 69, -100, 5, 6, 7])
    x = logits.double().requires_grad_()
    want = F.cross_entropy(x, targets, reduction="none")
    (want.sum() * 0.5).backward()
    losses = torch.empty(6)
    loss.cross_entropy_kernel[(6,)](logits, targets, losses, torch.tensor(0.5), 70, -100, GRADIENT=True, BV=32)
    torch.testing.assert_close(losses.double(), want.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), x.grad, rtol=1e-5, atol=1e-6)


def test_labels_outside_the_vocabulary_are_refused():
    model = tiny_model("gla")
    ids = torch.randint(3, 101, (1, 5))
    with pytest.raises(ValueError, match="below 101"):
        model(ids, labels=ids + 99, skip_logits=True)
    with pytest.raises(ValueError, match="pass labels"):
        model(ids, skip_logits=True)


@pytest.mark.parametrize("num_items", [None, 40])
def test_loss_without_logits_is_the_loss(num_items):
    model = tiny_model("gla").double()
    ids = torch.randint(3, 101, (2, 9))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
    gradients = []
    for skip in (False, True):
        model.zero_grad()
        out = model(ids, labels=labels, skip_logits=skip, num_items_in_batch=num_items, use_cache=False)
        out.loss.backward()
        gradients.append(torch.cat([out.loss.detach()[None], *(p.grad.flatten() for p in model.parameters())]))
    assert out.logits is None
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)  # the library's loss is in float32 even here


@pytest.mark.parametrize("case", ["plain", "padded", "packed"])
@pytest.mark.parametrize("mixer", ["hgrn", "retnet", "gla", "hgrn2", "delta_net", "gated_delta_net"])
def test_a_whole_model(mixer, case, monkeypatch):
    """Loss and gradients of a hybrid; float32, errors of some 30 operations in a row: 1e-4 of the largest gradient."""
    model = randomize(tiny_model(mixer, "3-1", num_hidden_layers=3))
    ids = torch.randint(3, 101, (2, 11))
    inputs = {"labels": ids}
    if case == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :4] = 0
        inputs["labels"] = ids.masked_fill(inputs["attention_mask"] == 0, -100)
    elif case == "packed":
        inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1], [*range(11)]])
    gradients = []
    for ops, dtype in ((pointwise, torch.float64), (fused, torch.float32)):
        for module in (attention, mixers, modeling_hybrid_linear):
            monkeypatch.setattr(module, "operations", lambda x, ops=ops: ops)
        own = copy.deepcopy(model).to(dtype)
        value = own(ids, use_cache=False, **inputs).loss
        value.backward()
        gradients.append(torch.cat([value.detach()[None], *(p.grad.flatten() for p in own.parameters())]).double())
    want, got = gradients
    assert (want - got).abs().max() < 1e-4 * want.abs().max()


def test_what_leaves_a_layer_is_whole_where_somebody_looks(monkeypatch):
    """The fused path leaves a layer's last addition to the next norm, unless hidden states are recorded or a hook is there."""
    model, ids = randomize(tiny_model("gla", "3-1", torch.float32, num_hidden_layers=3)), torch.randint(3, 101, (2, 11))
    fresh = copy.deepcopy(model)  # recording hidden states leaves hooks behind
    want = model(ids, use_cache=False, output_hidden_states=True)
    for module in (attention, mixers, modeling_hybrid_linear):
        monkeypatch.setattr(module, "operations", lambda x: fused)
    left = []
    run = modeling_hybrid_linear.HybridLinearDecoderLayer.forward
    monkeypatch.setattr(
        modeling_hybrid_linear.HybridLinearDecoderLayer,
        "forward",
        lambda self, *args, **kwargs: left.append(kwargs["defer"]) or run(self, *args, **kwargs),
    )
    torch.testing.assert_close(fresh(ids, use_cache=False).logits, want.logits, rtol=1e-5, atol=1e-5)
    assert left == [True] * 3
    seen = []
    fresh.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    got = fresh(ids, use_cache=False, output_hidden_states=True)
    assert left[3:] == [False] * 3
    for a, b in zip([*got.hidden_states, got.logits, *seen], [*want.hidden_states, want.logits, want.hidden_states[2]]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    "more", [{}, {"num_items_in_batch": torch.tensor(37)}, {"num_items_in_batch": 11}, {"shift_labels": True}]
)
def test_loss_of_logits_is_the_librarys(more, dtype, close, monkeypatch):
    """Value and gradient, in blocks of 3 rows; bfloat16 to the rounding of a gradient in bfloat16."""
    monkeypatch.setattr(loss, "CACHE_ELEMENTS", 3 * 50)
    torch.manual_seed(0)
    labels = torch.randint(0, 50, (2, 11)).masked_fill(torch.rand(2, 11) < 0.3, -100)
    if more.get("shift_labels") is not None:
        more = {"shift_labels": labels.roll(-1, 1)}
    found = []
    for function in (loss.causal_lm_loss, ForCausalLMLoss):
        logits = (3 * torch.randn(2, 11, 50, generator=torch.Generator().manual_seed(1))).to(dtype).requires_grad_()
        value = function(logits, labels, 50, **more)
        (2 * value).backward()
        assert value.dtype == torch.float32 and logits.grad.dtype == dtype
        found.append((value.detach(), logits.grad.float()))
    torch.testing.assert_close(*found, rtol=close, atol=close * found[1][1].abs().max().item())


def test_loss_of_logits_twice_differentiable():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 2, -100, 4], [0, 6, 5, 3]])
    targets, scale = loss.shift(labels).flatten(), torch.tensor(0.3, dtype=torch.float64)
    function = lambda logits: loss._CrossEntropy.apply(logits.flatten(0, 1), targets, scale)  # noqa: E731
    assert torch.autograd.gradcheck(function, logits) and torch.autograd.gradgradcheck(function, logits)


def test_loss_of_logits_under_torch_func():
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[1, 2, -100, 4], [0, 6, 5, 3]])
    gradient = torch.func.grad(lambda logits: loss.causal_lm_loss(logits, labels, 7))(logits)
    right = torch.func.grad(lambda logits: ForCausalLMLoss(logits, labels, 7))(logits)
    torch.testing.assert_close(gradient, right)


def test_loss_of_logits_names_a_label_that_does_not_exist():
    with pytest.raises(ValueError, match="below 7"):
        loss.causal_lm_loss(torch.zeros(1, 2, 7), torch.tensor([[1, 7]]), 7)
