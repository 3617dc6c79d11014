"""Triton kernels of the decode step: projections of one token for a whole batch, and what all decode kernels share.

At decode time a model reads each weight once and computes almost nothing, so what counts is bytes and launches. A layer
is five launches: ``linear_rows`` (norm and all projections of one input, with the short convolution), the mixer's step
(``triton_steps``: gates, state, output) or attention (``triton_attention``), ``linear_rows`` again (output norm, gate,
projection, residual), and twice more for the MLP.

From Hopper on a kernel begins while the one before it ends (programmatic dependent launch): it loads what no kernel of
this token writes, weights and states, and then waits for its inputs. That is sound because each kernel waits before it
writes anything, and because the token's first one, torch's, begins after all of the token before.

Arithmetic is float32 whatever the storage, the state is float32, and every formula is the one in ``mixers`` and
``recurrence``, against which the tests compare each kernel in Triton's interpreter on the CPU:

    TRITON_INTERPRET=1 python -m pytest tests/test_triton_kernels.py

Sizes in kernels: B rows, K contraction, N outputs.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only installation; decoding then takes the torch path
    triton = tl = None

jit = triton.jit if triton is not None else lambda function: function

FEW_ROWS = 4  # up to here rows are multiplied one by one, beyond on tensor cores


# ------------------------------------------------------------------------------------------------------------- kernels


@jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def _let_next_begin(EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def _wait_for_inputs(EARLY: tl.constexpr):
    """What the kernels before have written may be read from here on, and their inputs overwritten."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@jit
def _input_block(x_ptr, norm_ptr, gate_ptr, rows, offs_k, x_stride, gate_stride, mask, K, eps,
                 NORM: tl.constexpr, GATE: tl.constexpr, HEAD: tl.constexpr):  # fmt: skip
    """[BB, BK] of the prepared input, and its squares' sums [BB] (for a norm over all of K)."""
    x = tl.load(x_ptr + rows[:, None] * x_stride + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    squares = tl.sum(x * x, axis=1)
    if NORM == 2:  # the block is whole heads
        BB: tl.constexpr = x.shape[0]
        BK: tl.constexpr = x.shape[1]
        by_head = tl.reshape(x, (BB, BK // HEAD, HEAD))
        rstd = 1.0 / tl.sqrt(tl.sum(by_head * by_head, axis=2) / HEAD + eps)
        x = tl.reshape(by_head * rstd[:, :, None], (BB, BK))
        x = x * tl.load(norm_ptr + offs_k % HEAD).to(tl.float32)[None, :]
    elif NORM == 1:
        x = x * tl.load(norm_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)[None, :]
    if GATE > 0:
        g = tl.load(gate_ptr + rows[:, None] * gate_stride + offs_k[None, :], mask=mask, other=0.0)
        x = x * _sigmoid(g)
        if GATE == 1:
            x = x * g
    return x, squares


@jit
def _prepare_rows_kernel(
    x_ptr, norm_ptr, gate_ptr, out_ptr, x_stride, gate_stride, out_stride, eps,
    K: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, HEAD: tl.constexpr, BK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    _let_next_begin(EARLY)
    _wait_for_inputs(EARLY)
    rows, offs_k = tl.program_id(0) + tl.arange(0, 1), tl.arange(0, BK)
    mask = (rows[:, None] >= 0) & (offs_k < K)[None, :]
    x, squares = _input_block(x_ptr, norm_ptr, gate_ptr, rows, offs_k, x_stride, gate_stride, mask, K, eps,
                              NORM, GATE, HEAD)  # fmt: skip
    if NORM == 1:
        x = x * (1.0 / tl.sqrt(squares / K + eps))[:, None]
    tl.store(out_ptr + rows[:, None] * out_stride + offs_k[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _linear_rows_kernel(
    x_ptr, norm_ptr, gate_ptr, y_ptr, residual_ptr, window_ptr, taps_ptr, w0, w1, w2, w3, w4, w5,
    B, x_stride, gate_stride, y_stride, eps,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    N5: tl.constexpr, CONV_CHANNELS: tl.constexpr, TAPS: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr,
    HEAD: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr,
    BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    _let_next_begin(EARLY)
    pid = tl.program_id(0)
    rows = tl.program_id(1) * BB + tl.arange(0, BB)
    # Which of up to six weights this program serves; columns of y follow each other in their order.
    w, width, first, column = w0, N0, 0, 0
    if not SWIGLU:
        end: tl.constexpr = (N0 + BN - 1) // BN
        end1: tl.constexpr = end + (N1 + BN - 1) // BN
        end2: tl.constexpr = end1 + (N2 + BN - 1) // BN
        end3: tl.constexpr = end2 + (N3 + BN - 1) // BN
        end4: tl.constexpr = end3 + (N4 + BN - 1) // BN
        if pid >= end4:
            w, width, first, column = w5, N5, end4, N0 + N1 + N2 + N3 + N4
        elif pid >= end3:
            w, width, first, column = w4, N4, end3, N0 + N1 + N2 + N3
        elif pid >= end2:
            w, width, first, column = w3, N3, end2, N0 + N1 + N2
        elif pid >= end1:
            w, width, first, column = w2, N2, end1, N0 + N1
        elif pid >= end:
            w, width, first, column = w1, N1, end, N0
    offs_n = (pid - first) * BN + tl.arange(0, BN)
    in_rows, in_width = rows < B, offs_n < width

    acc = tl.zeros((BB, BN), tl.float32)
    up = tl.zeros((BB, BN), tl.float32)
    squares = tl.zeros((BB,), tl.float32)
    if DOT:
        _wait_for_inputs(EARLY)
        for k in range(0, K, BK):
            offs_k = k + tl.arange(0, BK)
            in_k = offs_k < K
            x, sq = _input_block(x_ptr, norm_ptr, gate_ptr, rows, offs_k, x_stride, gate_stride,
                                 in_rows[:, None] & in_k[None, :], K, eps, NORM, GATE, HEAD)  # fmt: skip
            squares += sq
            tile = _weight_block(w, offs_n, offs_k, in_width, K)
            x = x.to(tile.dtype)
            acc += tl.dot(x, tl.trans(tile), input_precision="ieee")
            if SWIGLU:
                up += tl.dot(x, tl.trans(_weight_block(w1, offs_n, offs_k, in_width, K)), input_precision="ieee")
    else:
        # The next block's weights are under way while this one's are multiplied, the first one's while inputs are made.
        tile = _weight_block(w, offs_n, tl.arange(0, BK), in_width, K)
        if SWIGLU:
            up_tile = _weight_block(w1, offs_n, tl.arange(0, BK), in_width, K)
        _wait_for_inputs(EARLY)
        for k in tl.static_range(0, K, BK):
            offs_k = k + tl.arange(0, BK)
            x, sq = _input_block(x_ptr, norm_ptr, gate_ptr, rows, offs_k, x_stride, gate_stride,
                                 in_rows[:, None] & (offs_k < K)[None, :], K, eps, NORM, GATE, HEAD)  # fmt: skip
            squares += sq
            now = tile
            if k + BK < K:
                tile = _weight_block(w, offs_n, offs_k + BK, in_width, K)
            acc += tl.sum(x[:, None, :] * now.to(tl.float32)[None, :, :], axis=2)
            if SWIGLU:
                up_now = up_tile
                if k + BK < K:
                    up_tile = _weight_block(w1, offs_n, offs_k + BK, in_width, K)
                up += tl.sum(x[:, None, :] * up_now.to(tl.float32)[None, :, :], axis=2)
    if NORM == 1:
        rstd = 1.0 / tl.sqrt(squares / K + eps)
        acc = acc * rstd[:, None]
        up = up * rstd[:, None]
    if SWIGLU:
        acc = acc * _sigmoid(acc) * up
    columns = column + offs_n
    inside = in_rows[:, None] & in_width[None, :]
    if CONV_CHANNELS > 0:
        if column < CONV_CHANNELS:
            acc = _convolve(acc, window_ptr, taps_ptr, rows, columns, inside, CONV_CHANNELS, TAPS)
    if RESIDUAL:
        acc += tl.load(residual_ptr + rows[:, None] * y_stride + columns[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    tl.store(y_ptr + rows[:, None] * y_stride + columns[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _weight_block(w, offs_n, offs_k, in_width, K):
    """[BN, BK] of a weight [N, K]."""
    return tl.load(w + offs_n[:, None] * K + offs_k[None, :], mask=in_width[:, None] & (offs_k < K)[None, :], other=0.0)


@jit
def _convolve(x, window_ptr, taps_ptr, rows, channels, inside, C: tl.constexpr, TAPS: tl.constexpr):
    """Apply the taps to the window and x, and shift x into the window. Only this program touches these channels."""
    x = x.to(window_ptr.dtype.element_ty)
    in_conv = channels < C
    y = (
        x.to(tl.float32)
        * tl.load(taps_ptr + channels * TAPS + TAPS - 1, mask=in_conv, other=0.0).to(tl.float32)[None, :]
    )
    at = window_ptr + rows[:, None] * ((TAPS - 1) * C) + channels[None, :]
    for tap in tl.static_range(TAPS - 1):
        past = tl.load(at + tap * C, mask=inside, other=0.0)
        y += (
            past.to(tl.float32)
            * tl.load(taps_ptr + channels * TAPS + tap, mask=in_conv, other=0.0).to(tl.float32)[None, :]
        )
        if tap > 0:
            tl.store(at + (tap - 1) * C, past, mask=inside)
    tl.store(at + (TAPS - 2) * C, x, mask=inside)
    return y


# ------------------------------------------------------------------------------------------------------------ launchers


def linear_rows(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    y: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    head: int = 0,
    gate: torch.Tensor | None = None,
    gate_act: str = "silu",
    swiglu: bool = False,
    residual: bool = False,
    window: torch.Tensor | None = None,
    taps: torch.Tensor | None = None,
    config: tuple[int, int, int, int] | None = None,
) -> None:
    """y[:, columns] = f(x) @ weight^T for several weights of one input, side by side in y, in one launch.

    Args:
        x: [B, K]; weights: up to six [N_i, K], contiguous, of one dtype; y: [B, >= sum N_i], written.
        norm: RMSNorm weight on x: [K], or [head] for one norm per ``head`` consecutive channels (then K % head == 0).
        gate: [B, K] float32; x is multiplied by gate_act(gate) after its norm.
        swiglu: two weights, gate and up: y = silu(gate) * up.
        residual: add to what y holds.
        window: [B, taps - 1, C] of the short convolution, updated in place, taps: [C, 1, taps]; the first C columns of
            y are convolved.
        config: instead of ``linear_config``'s.
    """
    B, K = x.shape
    sizes = [w.shape[0] for w in weights] + [0] * (6 - len(weights))
    pointers = [*weights, *[weights[0]] * (6 - len(weights))]
    dot = B > FEW_ROWS
    options = dict(
        NORM=0 if norm is None else (2 if head else 1),
        GATE=0 if gate is None else (1 if gate_act == "silu" else 2),
        HEAD=max(head, 1),
    )
    norm, gate, gate_stride = (
        x if norm is None else norm,
        x if gate is None else gate,
        0 if gate is None else gate.stride(0),
    )
    if dot and (options["NORM"] or options["GATE"] or x.dtype != weights[0].dtype):
        # With many rows a tensor core's operand must be ready in memory: worked out once, not in every program.
        prepared = torch.empty(B, K, dtype=weights[0].dtype, device=x.device)
        _prepare_rows_kernel[(B,)](
            x,
            norm,
            gate,
            prepared,
            x.stride(0),
            gate_stride,
            K,
            eps,
            K,
            **options,
            BK=triton.next_power_of_2(K),
            **early(x),
        )
        x, options = prepared, dict(NORM=0, GATE=0, HEAD=1)
    BB = max(16, min(64, triton.next_power_of_2(B))) if dot else triton.next_power_of_2(B)
    BN, BK, warps, stages = config or linear_config(BB, K, max(sizes), weights[0].element_size(), swiglu)
    BK = max(BK, options["HEAD"])
    columns = sizes[0] if swiglu else None
    blocks = triton.cdiv(columns, BN) if swiglu else sum(triton.cdiv(n, BN) for n in sizes)
    _linear_rows_kernel[(blocks, triton.cdiv(B, BB))](
        x, norm, gate, y, y, x if window is None else window, x if taps is None else taps, *pointers,
        B, x.stride(0), gate_stride, y.stride(0), eps,
        K, *sizes,
        CONV_CHANNELS=0 if taps is None else taps.shape[0], TAPS=2 if taps is None else taps.shape[2],
        **options, SWIGLU=swiglu, RESIDUAL=residual, DOT=dot, BB=BB, BN=BN, BK=BK,
        num_warps=warps, num_stages=stages, **early(x),
    )  # fmt: skip


def early(x: torch.Tensor) -> dict[str, bool]:
    """Launch options: whether the kernel, for the rows of x, begins before the one before it has ended (see above).

    Many rows keep the card busy as it is, and there it costs more than it gives.
    """
    few = x.is_cuda and len(x) <= FEW_ROWS
    if not few or not hasattr(tl.extra.cuda, "gdc_wait") or torch.cuda.get_device_capability(x.device) < (9, 0):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


def linear_config(rows: int, K: int, N: int, itemsize: int, swiglu: bool = False) -> tuple[int, int, int, int]:
    """Outputs per program, contraction per step, warps and pipeline stages, for ``rows`` rows per program.

    Found by benchmarks/tune_decode.py on an H200. One row: the whole contraction in one step, so that all loads are in
    flight at once. More: the tensor cores' tiles.
    """
    if rows > FEW_ROWS and itemsize > 2:  # float32 is for checking, not for speed: what fits in shared memory
        return 16, 64, 4, 2
    if rows > FEW_ROWS:
        return (64, 128, 4, 4) if N > 4096 else (16, 256, 4, 4)
    block = min(triton.next_power_of_2(K), 2048)
    if swiglu:  # two tiles at a time
        return 2, block, 4, 1
    return 4, block, 8 if N <= 4096 and K <= 2048 else 4, 1


__all__ = ["FEW_ROWS", "early", "jit", "linear_rows", "triton"]
