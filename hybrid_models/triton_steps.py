"""Triton kernels of the decode step: one token through each mixer's law, from its projections to what its state reads.

A launch takes the projections side by side in one row of y, works out gates, updates the float32 state in place and writes
the output. Formulas are those of ``mixers`` and ``recurrence``, in float32.

Sizes in kernels: B rows, H heads, K and V key and value width of a head.
"""

from __future__ import annotations

from .triton_kernels import _let_next_begin, _sigmoid, _softplus, _wait_for_inputs, early, jit, triton

try:
    import triton.language as tl
except ImportError:  # see triton_kernels
    tl = None


@jit
def _gated_step_kernel(
    y_ptr, state_ptr, o_ptr, a_ptr, c_ptr, position_ptr, y_stride, o_stride, scale,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, Q_AT: tl.constexpr, K_AT: tl.constexpr,
    V_AT: tl.constexpr, LOW_AT: tl.constexpr, RANK: tl.constexpr, KIND: tl.constexpr, SILU: tl.constexpr,
    BOUNDED: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """RetNet (KIND 0: a = inverse frequencies), GLA (1: a = gate weight, c = its bias), HGRN2 (2: a, c = bound, 1 - bound)."""
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    group = head // (H // HK)
    keys = tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    in_k, in_v = keys < K, values < V
    at = state_ptr + tl.program_id(0) * (K * V) + keys[:, None] * V + values[None, :]
    inside = in_k[:, None] & in_v[None, :]
    _let_next_begin(EARLY)
    if EARLY:
        state = tl.load(at, mask=inside, other=0.0)
    _wait_for_inputs(EARLY)
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
    # GLA works its gate out of a block of weights: with that and a wide block of the state the registers spill.
    if not EARLY:
        state = tl.load(at, mask=inside, other=0.0)
    state = state * decay[:, None] + tl.where(in_k, k, 0.0)[:, None] * v[None, :]
    tl.store(at, state, mask=inside)
    o = tl.sum(state * (tl.where(in_k, q, 0.0) * scale)[:, None], axis=0)
    tl.store(o_ptr + row * o_stride + head * V + values, o, mask=in_v)


@jit
def _delta_step_kernel(
    y_ptr, state_ptr, o_ptr, a_log_ptr, dt_bias_ptr, y_stride, o_stride, scale, max_beta,
    HV: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, Q_AT: tl.constexpr, K_AT: tl.constexpr,
    V_AT: tl.constexpr, B_AT: tl.constexpr, A_AT: tl.constexpr, GATED: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """DeltaNet, and GatedDeltaNet with its decay."""
    row, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    group = head // (HV // HK)
    keys = tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    in_k, in_v = keys < K, values < V
    at = state_ptr + tl.program_id(0) * (K * V) + keys[:, None] * V + values[None, :]
    inside = in_k[:, None] & in_v[None, :]
    _let_next_begin(EARLY)
    state = tl.load(at, mask=inside, other=0.0)
    _wait_for_inputs(EARLY)
    y = y_ptr + row * y_stride
    q = tl.load(y + Q_AT + group * K + keys, mask=in_k, other=0.0)
    k = tl.load(y + K_AT + group * K + keys, mask=in_k, other=0.0)
    v = tl.load(y + V_AT + head * V + values, mask=in_v, other=0.0)
    q, k, v = q * _sigmoid(q), k * _sigmoid(k), v * _sigmoid(v)
    q = q / tl.sqrt(tl.sum(q * q, axis=0) + 1e-6) * scale
    k = k / tl.sqrt(tl.sum(k * k, axis=0) + 1e-6)
    beta = _sigmoid(tl.load(y + B_AT + head)) * max_beta
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
    D: tl.constexpr, BOUNDED: tl.constexpr, BD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """HGRN: input gate at column 0, forget gate at column D."""
    row = tl.program_id(0)
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = channels < D
    _let_next_begin(EARLY)
    state = tl.load(state_ptr + row * D + channels, mask=inside, other=0.0)
    _wait_for_inputs(EARLY)
    i = tl.load(y_ptr + row * y_stride + channels, mask=inside, other=0.0)
    f = tl.load(y_ptr + row * y_stride + D + channels, mask=inside, other=0.0)
    decay, write = _sigmoid(f), _sigmoid(-f)
    if BOUNDED:
        rest = tl.load(rest_ptr + channels, mask=inside, other=0.0)
        decay = tl.load(bound_ptr + channels, mask=inside, other=0.0) + rest * decay
        write = rest * write
    state = decay * state + i * _sigmoid(i) * write
    tl.store(state_ptr + row * D + channels, state, mask=inside)
    tl.store(o_ptr + row * o_stride + channels, state, mask=inside)


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
        ("retnet", "gla", "hgrn2").index(kind), silu, bounded, triton.next_power_of_2(K), BV, num_warps=4, **early(y),
    )  # fmt: skip


def delta_step(y, state, o, num_key_heads, columns, max_beta=1.0, a_log=None, dt_bias=None):
    """DeltaNet or (with a_log) GatedDeltaNet: one token. ``columns``: where q, k, v, b (and a) begin in y [B, *]."""
    B, H, K, V = state.shape
    BV = _value_block(B * H, V)
    _delta_step_kernel[(B * H, triton.cdiv(V, BV))](
        y, state, o, y if a_log is None else a_log, y if dt_bias is None else dt_bias, y.stride(0), o.stride(0),
        K**-0.5, max_beta,
        H, num_key_heads, K, V, *columns[:4], columns[4] if a_log is not None else 0, a_log is not None,
        triton.next_power_of_2(K), BV, num_warps=4, **early(y),
    )  # fmt: skip


def vector_step(y, state, o, bound=None, rest=None):
    """HGRN: one token. y [B, >= 2 D] float32 holds the input gate, then the forget gate; state [B, D] float32."""
    B, D = state.shape
    _vector_step_kernel[(B, triton.cdiv(D, 256))](
        y, state, o, y if bound is None else bound, y if rest is None else rest, y.stride(0), o.stride(0),
        D, bound is not None, 256, num_warps=2, **early(y),
    )  # fmt: skip


__all__ = ["delta_step", "gated_step", "vector_step"]
