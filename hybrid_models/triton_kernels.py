"""Triton kernels of the decode step: one token for a whole batch, in five launches a layer.

At decode time a model reads each weight once and computes almost nothing, so what counts is bytes and launches. A layer
is: ``linear_rows`` (norm and all projections of one input, with the short convolution), the mixer's step (gates, state,
output), ``linear_rows`` again (output norm, gate, projection, residual), and twice more for the MLP. Attention layers
have ``triton_attention`` in place of the step.

Arithmetic is float32 whatever the storage, the state is float32, and every formula is the one in ``mixers`` and
``recurrence``, against which the tests compare each kernel in Triton's interpreter on the CPU:

    TRITON_INTERPRET=1 python -m pytest tests/test_triton_kernels.py

Sizes in kernels: B rows, K contraction, N outputs; in steps K and V are key and value width of a head.
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
):  # fmt: skip
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
    BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
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
    for k in range(0, K, BK):
        offs_k = k + tl.arange(0, BK)
        in_k = offs_k < K
        x, sq = _input_block(x_ptr, norm_ptr, gate_ptr, rows, offs_k, x_stride, gate_stride,
                             in_rows[:, None] & in_k[None, :], K, eps, NORM, GATE, HEAD)  # fmt: skip
        squares += sq
        offsets = offs_n[:, None] * K + offs_k[None, :]
        inside = in_width[:, None] & in_k[None, :]
        tile = tl.load(w + offsets, mask=inside, other=0.0)
        if DOT:
            x = x.to(tile.dtype)
            acc += tl.dot(x, tl.trans(tile), input_precision="ieee")
            if SWIGLU:
                acc_tile = tl.load(w1 + offsets, mask=inside, other=0.0)
                up += tl.dot(x, tl.trans(acc_tile), input_precision="ieee")
        else:
            acc += tl.sum(x[:, None, :] * tile.to(tl.float32)[None, :, :], axis=2)
            if SWIGLU:
                up_tile = tl.load(w1 + offsets, mask=inside, other=0.0).to(tl.float32)
                up += tl.sum(x[:, None, :] * up_tile[None, :, :], axis=2)
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


@jit
def _gated_step_kernel(
    y_ptr, state_ptr, o_ptr, a_ptr, c_ptr, position_ptr, y_stride, o_stride, scale,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, Q_AT: tl.constexpr, K_AT: tl.constexpr,
    V_AT: tl.constexpr, LOW_AT: tl.constexpr, RANK: tl.constexpr, KIND: tl.constexpr, SILU: tl.constexpr,
    BOUNDED: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """RetNet (KIND 0: a = inverse frequencies), GLA (1: a = gate weight, c = its bias), HGRN2 (2: a, c = bound, 1 - bound)."""
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    group = head // (H // HK)
    keys = tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    in_k, in_v = keys < K, values < V
    y = y_ptr + row * y_stride
    q = tl.load(y + Q_AT + head * K + keys, mask=in_k, other=0.0)
    k = tl.load(y + K_AT + group * K + keys, mask=in_k, other=0.0)
    v = tl.load(y + V_AT + group * V + values, mask=in_v, other=0.0)
    if KIND == 0:
        half: tl.constexpr = K // 2
        position = tl.load(position_ptr + row).to(tl.float32)
        angle = position * tl.load(a_ptr + keys % half, mask=in_k, other=0.0)
        other = tl.where(keys < half, keys + half, keys - half)
        sign = tl.where(keys < half, -1.0, 1.0)
        q = q * tl.cos(angle) + sign * tl.load(y + Q_AT + head * K + other, mask=in_k, other=0.0) * tl.sin(angle)
        k = k * tl.cos(angle) + sign * tl.load(y + K_AT + group * K + other, mask=in_k, other=0.0) * tl.sin(angle)
        decay = tl.zeros((BK,), tl.float32) + (1.0 - tl.exp2(-5.0 - head.to(tl.float32)))
    elif KIND == 1:
        if SILU:
            q, k, v = q * _sigmoid(q), k * _sigmoid(k), v * _sigmoid(v)
        ranks = tl.arange(0, RANK)
        low = tl.load(y + LOW_AT + ranks)
        weight = tl.load(a_ptr + (group * K + keys)[:, None] * RANK + ranks[None, :], mask=in_k[:, None], other=0.0)
        gate = tl.sum(weight.to(tl.float32) * low[None, :], axis=1)
        gate += tl.load(c_ptr + group * K + keys, mask=in_k, other=0.0).to(tl.float32)
        decay = tl.exp(-_softplus(-gate) / 16.0)
    else:
        q = q * _sigmoid(q)
        f = _sigmoid(k)
        k = _sigmoid(-k)
        decay = f
        if BOUNDED:
            rest = tl.load(c_ptr + head * K + keys, mask=in_k, other=0.0)
            decay = tl.load(a_ptr + head * K + keys, mask=in_k, other=0.0) + rest * f
            k = rest * k
    at = state_ptr + tl.program_id(0) * (K * V) + keys[:, None] * V + values[None, :]
    inside = in_k[:, None] & in_v[None, :]
    state = tl.load(at, mask=inside, other=0.0) * decay[:, None] + tl.where(in_k, k, 0.0)[:, None] * v[None, :]
    tl.store(at, state, mask=inside)
    o = tl.sum(state * (tl.where(in_k, q, 0.0) * scale)[:, None], axis=0)
    tl.store(o_ptr + row * o_stride + head * V + values, o, mask=in_v)


@jit
def _delta_step_kernel(
    y_ptr, state_ptr, o_ptr, a_log_ptr, dt_bias_ptr, y_stride, o_stride, scale, max_beta,
    HV: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, Q_AT: tl.constexpr, K_AT: tl.constexpr,
    V_AT: tl.constexpr, B_AT: tl.constexpr, A_AT: tl.constexpr, GATED: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """DeltaNet, and GatedDeltaNet with its decay."""
    row, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    group = head // (HV // HK)
    keys = tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    in_k, in_v = keys < K, values < V
    y = y_ptr + row * y_stride
    q = tl.load(y + Q_AT + group * K + keys, mask=in_k, other=0.0)
    k = tl.load(y + K_AT + group * K + keys, mask=in_k, other=0.0)
    v = tl.load(y + V_AT + head * V + values, mask=in_v, other=0.0)
    q, k, v = q * _sigmoid(q), k * _sigmoid(k), v * _sigmoid(v)
    q = q / tl.sqrt(tl.sum(q * q, axis=0) + 1e-6) * scale
    k = k / tl.sqrt(tl.sum(k * k, axis=0) + 1e-6)
    beta = _sigmoid(tl.load(y + B_AT + head)) * max_beta
    at = state_ptr + tl.program_id(0) * (K * V) + keys[:, None] * V + values[None, :]
    inside = in_k[:, None] & in_v[None, :]
    state = tl.load(at, mask=inside, other=0.0)
    if GATED:
        rate = tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
        dt = _softplus(tl.load(y + A_AT + head) + tl.load(dt_bias_ptr + head).to(tl.float32))
        state = state * tl.exp(-rate * dt)
    write = beta * (v - tl.sum(state * k[:, None], axis=0))
    state += k[:, None] * write[None, :]
    tl.store(at, state, mask=inside)
    tl.store(o_ptr + row * o_stride + head * V + values, tl.sum(state * q[:, None], axis=0), mask=in_v)


@jit
def _vector_step_kernel(
    y_ptr, state_ptr, o_ptr, bound_ptr, rest_ptr, y_stride, o_stride,
    D: tl.constexpr, BOUNDED: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """HGRN: input gate at column 0, forget gate at column D."""
    row = tl.program_id(0)
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = channels < D
    i = tl.load(y_ptr + row * y_stride + channels, mask=inside, other=0.0)
    f = tl.load(y_ptr + row * y_stride + D + channels, mask=inside, other=0.0)
    decay, write = _sigmoid(f), _sigmoid(-f)
    if BOUNDED:
        rest = tl.load(rest_ptr + channels, mask=inside, other=0.0)
        decay = tl.load(bound_ptr + channels, mask=inside, other=0.0) + rest * decay
        write = rest * write
    state = tl.load(state_ptr + row * D + channels, mask=inside, other=0.0)
    state = decay * state + i * _sigmoid(i) * write
    tl.store(state_ptr + row * D + channels, state, mask=inside)
    tl.store(o_ptr + row * o_stride + channels, state, mask=inside)


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
            x, norm, gate, prepared, x.stride(0), gate_stride, K, eps, K, **options, BK=triton.next_power_of_2(K)
        )
        x, options = prepared, dict(NORM=0, GATE=0, HEAD=1)
    BB = max(16, min(64, triton.next_power_of_2(B))) if dot else triton.next_power_of_2(B)
    BN, BK, warps, stages = config or linear_config(BB, K, max(sizes), weights[0].element_size())
    BK = max(BK, options["HEAD"])
    columns = sizes[0] if swiglu else None
    blocks = triton.cdiv(columns, BN) if swiglu else sum(triton.cdiv(n, BN) for n in sizes)
    _linear_rows_kernel[(blocks, triton.cdiv(B, BB))](
        x, norm, gate, y, y, x if window is None else window, x if taps is None else taps, *pointers,
        B, x.stride(0), gate_stride, y.stride(0), eps,
        K, *sizes,
        CONV_CHANNELS=0 if taps is None else taps.shape[0], TAPS=2 if taps is None else taps.shape[2],
        **options, SWIGLU=swiglu, RESIDUAL=residual, DOT=dot, BB=BB, BN=BN, BK=BK,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def linear_config(rows: int, K: int, N: int, itemsize: int) -> tuple[int, int, int, int]:
    """Outputs per program, contraction per step, warps and pipeline stages, for ``rows`` rows per program.

    Found by benchmarks/tune_decode.py on an H100. One row: the whole contraction in one step, so that all loads are in
    flight at once. More: the tensor cores' tiles.
    """
    if rows > FEW_ROWS and itemsize > 2:  # float32 is for checking, not for speed: what fits in shared memory
        return 16, 64, 4, 2
    if rows > FEW_ROWS:
        return (64, 128, 4, 4) if N > 4096 else (16, 256, 4, 4)
    return 2, min(triton.next_power_of_2(K), 2048), 4, 1


def _value_block(programs: int, V: int) -> int:
    """State columns per program, for ``programs`` states of V columns: wide ones stream better, narrow ones fill the card."""
    wide = 64 if programs * V // 64 >= 256 else 16
    return min(triton.next_power_of_2(V), wide)


def gated_step(y, state, o, kind, dims, columns, a=None, c=None, position=None, silu=False, bounded=True):
    """RetNet, GLA or HGRN2: one token.

    Args:
        y: [B, *] float32, projections (convolved); ``columns``: where q, k, v (and GLA's low-rank gate) begin in it.
        state: [B, H, K, V] float32, updated in place; o: [B, H * V] float32, written.
        kind: "retnet" (a: inverse frequencies [K / 2], position [B]), "gla" (a: gate weight [heads * K, 16], c: bias),
            "hgrn2" (a, c: bound and 1 - bound [H * K], both ignored unless ``bounded``).
    """
    B, H, K, V = state.shape
    BV = _value_block(B * H, V)
    _gated_step_kernel[(B * H, triton.cdiv(V, BV))](
        y, state, o, y if a is None else a, y if c is None else c, y if position is None else position,
        y.stride(0), o.stride(0), K**-0.5,
        H, dims.num_key_heads, K, V, *columns[:3], columns[3] if len(columns) > 3 else 0, 16,
        ("retnet", "gla", "hgrn2").index(kind), silu, bounded, triton.next_power_of_2(K), BV, num_warps=4,
    )  # fmt: skip


def delta_step(y, state, o, num_key_heads, columns, max_beta=1.0, a_log=None, dt_bias=None):
    """DeltaNet or (with a_log) GatedDeltaNet: one token. ``columns``: where q, k, v, b (and a) begin in y [B, *]."""
    B, H, K, V = state.shape
    BV = _value_block(B * H, V)
    _delta_step_kernel[(B * H, triton.cdiv(V, BV))](
        y, state, o, y if a_log is None else a_log, y if dt_bias is None else dt_bias, y.stride(0), o.stride(0),
        K**-0.5, max_beta,
        H, num_key_heads, K, V, *columns[:4], columns[4] if a_log is not None else 0, a_log is not None,
        triton.next_power_of_2(K), BV, num_warps=4,
    )  # fmt: skip


def vector_step(y, state, o, bound=None, rest=None):
    """HGRN: one token. y [B, >= 2 D] float32 holds the input gate, then the forget gate; state [B, D] float32."""
    B, D = state.shape
    _vector_step_kernel[(B, triton.cdiv(D, 256))](
        y, state, o, y if bound is None else bound, y if rest is None else rest, y.stride(0), o.stride(0),
        D, bound is not None, 256, num_warps=2,
    )  # fmt: skip


__all__ = ["FEW_ROWS", "delta_step", "gated_step", "jit", "linear_rows", "triton", "vector_step"]
