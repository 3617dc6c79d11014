"""What a layer computes beside matrix products and the law, as fused CUDA operations with their gradients.

``pointwise`` has the same functions in plain torch, and ``kernels.operations`` chooses between the two modules. Fusing saves
time and memory: one pass instead of a dozen, an operation's input kept instead of every step in it, the MLP's product
computed again in the backward, and weights that share an input multiplied as one.

Under autocast everything comes out in autocast's dtype, and gradients of float32 weights are accumulated in float32.
Arguments and results are those of ``pointwise``; where a group of projections has several members its result is one
tensor, the members' outputs side by side, which the consumers here take apart without a copy.
"""

from __future__ import annotations

import itertools
import sys

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .dense import is_plain, is_swiglu, is_untouched
from .fused_kernels import (
    conv_backward,
    conv_backward_inside,
    conv_forward,
    forget_backward,
    forget_forward,
    norm_backward,
    norm_forward,
    rotate_kernel,
    swiglu_backward,
    swiglu_forward,
)
from .pointwise import compute_dtype
from .pointwise import output_norm as torch_output_norm
from .pointwise import rms_norm as torch_rms_norm
from .pointwise import short_convolution as torch_convolution
from .triton_kernels import triton

GATES = {None: 0, "silu": 1, "sigmoid": 2}
FOLLOWS = {"nothing": 0, "silu": 1, "unit": 2}
TILE = 4096  # elements that a program of 4 warps holds at a time; fewer where it also holds sums or several inputs
LONGEST_CONV = 4  # taps
PROGRAMS = 1056  # of kernels that sum over rows: eight on each multiprocessor of an H100


def _tile(width: int, elements: int = TILE) -> tuple[int, int]:
    """Rows and padded width of a tile that holds whole rows."""
    padded = triton.next_power_of_2(width)
    return max(1, elements // padded), padded


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _weight(weights, dtype: torch.dtype) -> torch.Tensor:
    return weights[0].to(dtype) if len(weights) == 1 else torch.cat([w.to(dtype) for w in weights])


def _weight_gradient(dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dy^T x in ``dtype``, without rounding to 16 bits in between."""
    if dtype != dy.dtype and dy.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=dtype)
    return (dy.t() @ x).to(dtype)


# ---------------------------------------------------------------------------------------------------------- projections


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype, counts, *weights):
        flat = _flat(x).to(dtype)
        ctx.save_for_backward(flat, *weights)
        ctx.counts, ctx.shape, ctx.dtype = counts, x.shape, x.dtype
        rest = list(weights)
        groups = [[rest.pop(0) for _ in range(count)] for count in counts]
        return tuple((flat @ _weight(group, dtype).t()).unflatten(0, x.shape[:-1]) for group in groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        dx, dweights = None, [None] * len(weights)
        for dy, places in _side_by_side([_flat(dy).to(x.dtype) for dy in dys], ctx.counts, x.shape[1]):
            group = [weights[i] for i in places]
            if ctx.needs_input_grad[0]:
                weight = _weight(group, x.dtype)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            if any(w.requires_grad for w in group):
                for i, gradient in zip(places, _weight_gradient(dy, x, group[0].dtype).split([len(w) for w in group])):
                    dweights[i] = gradient
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, *dweights


def _side_by_side(dys, counts, width: int) -> list[tuple[torch.Tensor, list[int]]]:
    """Gradients of groups of ``counts`` weights, with the places of their weights; those narrower than the input as one.

    A matrix product of few columns waits for memory: for x, which it reads, and for x's gradient, which it adds to.
    """
    ends = list(itertools.accumulate(counts))
    groups = [(dy, list(range(end - count, end))) for dy, count, end in zip(dys, counts, ends)]
    narrow = [group for group in groups if group[0].shape[1] < width]
    if len(narrow) < 2:
        return groups
    one = torch.cat([dy for dy, _ in narrow], 1), [place for _, places in narrow for place in places]
    return [group for group in groups if group[0].shape[1] >= width] + [one]


def project(x, *groups):
    if all(is_plain(linear) for group in groups for linear in group):
        counts = tuple(map(len, groups))
        return list(
            _Project.apply(x, compute_dtype(x), counts, *(linear.weight for group in groups for linear in group))
        )
    return [torch.cat([linear(x) for linear in group], -1) if len(group) > 1 else group[0](x) for group in groups]


def members(parts, counts):
    return parts.split(counts, -1)


# ----------------------------------------------------------------------------------------------------------------- norm


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, gate, weight, eps, dtype, act):
        D = weight.shape[0]
        flat, gate = x.reshape(-1, D).contiguous(), None if gate is None else gate.contiguous()
        N = len(flat)
        total = flat if residual is None else torch.empty_like(flat)
        y = torch.empty(flat.shape, dtype=dtype, device=x.device)
        rstd = torch.empty(N, dtype=torch.float32, device=x.device)
        rows, BD = _tile(D)
        norm_forward[(triton.cdiv(N, rows),)](
            flat, None if residual is None else residual.contiguous(), gate, weight, total, y, rstd, N, eps,
            D=D, RESIDUAL=residual is not None, GATE=GATES[act], ROWS=rows, BD=BD,
        )  # fmt: skip
        ctx.save_for_backward(total, gate, weight, rstd)
        ctx.act, ctx.residual_dtype = act, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return x if residual is None else total.view(x.shape), y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dy):
        x, gate, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dtotal, None if ctx.residual_dtype is None else dtotal, None, None, None, None, None
        shape, (N, D) = dy.shape, x.shape
        dtotal = None if dtotal is None else dtotal.contiguous()
        dx, dgate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
        rows, BD = _tile(D, TILE if gate is None and D > 512 else TILE // 4)
        programs = min(PROGRAMS, triton.cdiv(N, rows))
        dweight = torch.empty(programs, D, dtype=torch.float32, device=x.device)
        norm_backward[(programs,)](
            x, gate, weight, rstd, dy.contiguous(), dtotal, dx, dgate, dweight, N,
            D=D, DSUM=dtotal is not None, GATE=GATES[ctx.act], ROWS=rows, BD=BD,
        )  # fmt: skip
        dx = dx.view(shape)
        dresidual = None if ctx.residual_dtype is None else dx.to(ctx.residual_dtype)
        return dx, dresidual, dgate, dweight.sum(0).to(weight.dtype), None, None, None


def rms_norm(norm, x, residual=None):
    if not is_untouched(norm):
        return torch_rms_norm(norm, x, residual)
    return _Norm.apply(x, residual, None, norm.weight, norm.eps, compute_dtype(x), None)


def output_norm(norm, o, dtype, gate=None, act=None):
    if not is_untouched(norm):
        return torch_output_norm(norm, o, dtype, gate, act)
    _, y = _Norm.apply(o, None, gate, norm.weight, norm.eps, dtype, None if gate is None else act)
    return y.flatten(2)


# ---------------------------------------------------------------------------------------------------------- convolution


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, taps, since, heads):
        B, T, C = x.shape
        x, W = x.contiguous(), taps.shape[-1]
        ctx.save_for_backward(x, taps, since)
        ctx.heads = heads
        outputs, first = [], 0
        for count, width, follows in heads:
            y = x.new_empty(B, T, count, width)
            rows, BD = _tile(width)
            conv_forward[(count, triton.cdiv(T, rows), B)](
                x, taps, since, y, T, C, first,
                D=width, W=W, ACT=FOLLOWS[follows], PACKED=since is not None, BT=rows, BD=BD,
            )  # fmt: skip
            outputs.append(y)
            first += count * width
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, taps, since = ctx.saved_tensors
        (B, T, C), W, packed = x.shape, taps.shape[-1], since is not None
        du, dx, first = torch.empty_like(x), torch.empty_like(x), 0
        for (count, width, follows), dy in zip(ctx.heads, dys):
            rows, BD = _tile(width)
            conv_backward_inside[(count, triton.cdiv(T, rows), B)](
                x, taps, since, dy.contiguous(), du, T, C, first,
                D=width, W=W, ACT=FOLLOWS[follows], PACKED=packed, BT=rows, BD=BD,
            )  # fmt: skip
            first += count * width
        rows, channels, blocks = 8, 64, 32
        grid = (triton.cdiv(C, channels), triton.cdiv(T, rows * blocks), B)
        dtaps = torch.empty(grid[1] * B, W, C, dtype=torch.float32, device=x.device)
        conv_backward[grid](
            x, du, taps, since, dx, dtaps, T, C, W=W, PACKED=packed, BT=rows, BC=channels, BLOCKS=blocks, num_warps=2
        )
        return dx, dtaps.sum(0).t().reshape(taps.shape).to(taps.dtype), None, None


def short_convolution(parts, conv1d, heads, window=None, layout=None, keep_inputs=False):
    if conv1d is not None and not (conv1d.kernel_size[0] <= LONGEST_CONV and is_untouched(conv1d)):
        parts = parts.split([count * width for count, width, _ in heads], -1)
        return torch_convolution(parts, conv1d, heads, window, layout, keep_inputs)
    if keep_inputs and conv1d is not None:
        before = conv1d.kernel_size[0] - 1
        inputs = torch.cat(
            (parts.new_zeros(len(parts), before, parts.shape[-1]) if window is None else window, parts), 1
        )
        outputs = _Convolution.apply(inputs, conv1d.weight, None, tuple(heads))
        return [y[:, before:] for y in outputs], inputs
    since = None if layout is None else layout.since
    taps = parts.new_ones(parts.shape[-1], 1, 1) if conv1d is None else conv1d.weight
    return list(_Convolution.apply(parts, taps, since, tuple(heads))), None


# ---------------------------------------------------------------------------------------------------------------- gates


class _Forget(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts, bias, floor, room, form, scale, dtype):
        D = parts.shape[-1] // (1 if form == 0 else 2)
        parts = parts.contiguous()
        flat = _flat(parts)
        z, f = (None, flat) if form == 0 else (flat[:, :D], flat[:, D:])
        shape = (*parts.shape[:-1], D)
        log_a = torch.empty(shape, dtype=torch.float32, device=parts.device)
        first, second = (torch.empty(shape, dtype=dtype, device=parts.device) if form >= n else None for n in (1, 2))
        grid, blocks = _grid(len(flat), D)
        stride = flat.stride(0)
        forget_forward[grid](
            z, f, bias, floor, room, log_a, first, second, len(flat), stride, stride, scale,
            D=D, FORM=form, BIAS=bias is not None, BOUNDED=floor is not None, **blocks,
        )  # fmt: skip
        ctx.save_for_backward(parts, bias, floor, room)
        ctx.form, ctx.scale = form, scale
        return log_a, first, second

    @staticmethod
    @once_differentiable
    def backward(ctx, dlog, dfirst, dsecond):
        parts, bias, floor, room = ctx.saved_tensors
        D, dparts = dlog.shape[-1], torch.empty_like(parts)
        flat, dflat = _flat(parts), _flat(dparts)
        (z, f), (dz, df) = ((None, p) if ctx.form == 0 else (p[:, :D], p[:, D:]) for p in (flat, dflat))
        (rows, columns), blocks = _grid(len(flat), D, TILE // 4)
        grid = (min(rows, max(1, PROGRAMS // columns)), columns)

        def sums(of):
            return None if of is None else torch.empty(grid[0], D, dtype=torch.float32, device=parts.device)

        shares = sums(bias), sums(floor), sums(room)
        dlog, dfirst, dsecond = (None if d is None else d.contiguous() for d in (dlog, dfirst, dsecond))
        forget_backward[grid](
            z, f, bias, floor, room, dlog, dfirst, dsecond, dz, df, *shares,
            len(flat), flat.stride(0), flat.stride(0), ctx.scale,
            D=D, FORM=ctx.form, BIAS=bias is not None, BOUNDED=floor is not None, **blocks,
        )  # fmt: skip
        dbias, dfloor, droom = (None if share is None else share.sum(0) for share in shares)
        return dparts, None if bias is None else dbias.to(bias.dtype), dfloor, droom, None, None, None


def _grid(rows: int, width: int, elements: int = TILE // 2) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs and block sizes of an elementwise kernel over [rows, width]."""
    BD = min(512, triton.next_power_of_2(width))
    BN = elements // BD
    return (triton.cdiv(rows, BN), triton.cdiv(width, BD)), {"BN": BN, "BD": BD}


def forget_gate(parts, bounds=None, scale=1.0, form="log", through=None):
    floor, room = (None, None) if bounds is None else (bound.float().contiguous() for bound in bounds)
    form = ("log", "input", "key").index(form)
    if not isinstance(parts, torch.Tensor):  # from a convolution
        parts = torch.cat([part.flatten(2) for part in parts], -1)
    bias = None
    if through is not None and is_plain(through, bias=True):
        parts, bias = F.linear(parts, through.weight), through.bias
    elif through is not None:
        parts = through(parts)
    return _Forget.apply(parts, bias, floor, room, form, scale, compute_dtype(parts))[: form + 1]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, counts):
        width = cos.shape[-1]
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.counts = counts
        outputs = [x.new_empty(*x.shape[:2], count, width) for count in counts]
        parts = _flat(x).split([count * width for count in counts], -1)
        _turn(parts, [y.flatten(2) for y in outputs], cos, sin, 1.0)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        cos, sin = ctx.saved_tensors
        widths = [count * cos.shape[-1] for count in ctx.counts]
        dx = dys[0].new_empty(*dys[0].shape[:2], sum(widths))
        _turn([dy.contiguous().flatten(2) for dy in dys], _flat(dx).split(widths, -1), cos, sin, -1.0)
        return dx, None, None, None


def _turn(sources, targets, cos, sin, sign: float) -> None:
    width = cos.shape[-1]
    half = triton.next_power_of_2(width // 2)
    rows = max(1, TILE // (8 * half))
    for x, y in zip(sources, targets):
        x, y = (z if z.dim() == 2 else z.view(-1, z.shape[-1]) for z in (x, y))
        N, heads = len(x), x.shape[-1] // width
        rotate_kernel[(triton.cdiv(N, rows),)](
            x, cos, sin, y, N, x.stride(0), y.stride(0), cos.shape[0] * cos.shape[1], sign,
            HEADS=heads, D=width, BN=rows, BH=half,
        )  # fmt: skip


def rotate(parts, cos, sin, counts):
    return list(_Rotate.apply(parts, cos, sin, tuple(counts)))


# ------------------------------------------------------------------------------------------------------------------ MLP


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype, gate, up, down):
        flat = _flat(x).to(dtype)
        gu = flat @ _weight((gate, up), dtype).t()
        y = flat.new_empty(len(flat), len(gate))
        grid, blocks = _grid(*y.shape)
        swiglu_forward[grid](gu, y, len(y), D=len(gate), **blocks)
        ctx.save_for_backward(flat, gu, gate, up, down)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return (y @ down.to(dtype).t()).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, gu, gate, up, down = ctx.saved_tensors
        dout = _flat(dout).to(x.dtype)
        dy = dout @ down.to(x.dtype)
        dgu, y = torch.empty_like(gu), torch.empty_like(dy)
        grid, blocks = _grid(*y.shape)
        swiglu_backward[grid](gu, dy, dgu, y, len(y), D=len(gate), **blocks)
        needs_x, _, *needs = ctx.needs_input_grad
        ddown = _weight_gradient(dout, y, down.dtype) if needs[2] else None
        dgate, dup = _weight_gradient(dgu, x, gate.dtype).chunk(2) if any(needs[:2]) else (None, None)
        dx = (dgu @ _weight((gate, up), x.dtype)).view(ctx.shape).to(ctx.dtype) if needs_x else None
        return dx, None, dgate, dup, ddown


def mlp(module, x):
    if not is_swiglu(module) or module.config.hidden_act != "silu":
        return module(x)
    linears = (module.gate_proj, module.up_proj, module.down_proj)
    if not all(map(is_plain, linears)):
        return module(x)
    return _Mlp.apply(x, compute_dtype(x), *(linear.weight for linear in linears))


# Passed around as one object, so that a layer names the operation and not who serves it.
OPERATIONS = sys.modules[__name__]

__all__ = [
    "OPERATIONS",
    "compute_dtype",
    "forget_gate",
    "members",
    "mlp",
    "output_norm",
    "project",
    "rms_norm",
    "rotate",
    "short_convolution",
]
