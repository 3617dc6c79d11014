"""Triton kernels of training and long prefill: what is neither a matrix product nor the law, in one pass each.

Between two matrix products a layer touches its activations in a dozen elementwise steps; each of them alone would cost as
much memory traffic as a product costs time. The formulas are those of ``mixers``; arithmetic is float32, storage is the
tensors' own dtype. The autograd functions around the kernels stand in ``fused``; the tests compare them with the torch
forms in Triton's interpreter on the CPU:

    TRITON_INTERPRET=1 python -m pytest tests/test_fused.py

Sizes in kernels: N rows (tokens, or tokens times heads), D channels, T tokens of a sequence.
"""

from __future__ import annotations

from .triton_kernels import _sigmoid, jit, tl


@jit
def _log1p(x):
    """log(1 + x) for x > -1 without the cancellation near 0 (Kahan)."""
    u = 1.0 + x
    near = u == 1.0
    return tl.where(near, x, tl.log(u) * (x / tl.where(near, 1.0, u - 1.0)))


# ---------------------------------------------------------------------------------------------------------------- norm


@jit
def norm_forward(
    x_ptr, residual_ptr, gate_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr, N, eps,
    D: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y = rms_norm(x [+ residual]) * weight [* act(gate)]; GATE 0 none, 1 silu, 2 sigmoid."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BD)
    mask = (rows < N)[:, None] & (cols < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + cols[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, x, mask=mask)
        x = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    y = x * rstd[:, None] * tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if GATE > 0:
        g = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y *= _sigmoid(g)
        if GATE == 1:
            y *= g
    tl.store(y_ptr + at, y, mask=mask)


@jit
def norm_backward(
    x_ptr, gate_ptr, weight_ptr, rstd_ptr, dy_ptr, dsum_ptr, dx_ptr, dgate_ptr, dweight_ptr, N,
    D: tl.constexpr, DSUM: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of ``norm_forward``; x is its sum. Every program takes blocks of rows in turn and keeps its share of
    the weight's gradient, dweight [programs, D], adding rows up only at its end."""
    cols = tl.arange(0, BD)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, BD), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & (cols < D)[None, :]
        at = rows.to(tl.int64)[:, None] * D + cols[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dn = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)[:, None]
        normed = x * rstd
        if GATE > 0:
            g = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
            s = _sigmoid(g)
            if GATE == 1:
                dgate = dn * normed * weight * s * (1.0 + g * (1.0 - s))
                dn *= g * s
            else:
                dgate = dn * normed * weight * s * (1.0 - s)
                dn *= s
            tl.store(dgate_ptr + at, dgate, mask=mask)
        dweight += dn * normed
        dn *= weight
        dx = rstd * (dn - normed * (tl.sum(dn * normed, axis=1) / D)[:, None])
        if DSUM:
            dx += tl.load(dsum_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=mask)
    tl.store(dweight_ptr + tl.program_id(0) * D + cols, tl.sum(dweight, axis=0), mask=cols < D)


# --------------------------------------------------------------------------------------------------------- convolution


@jit
def _convolve(x_ptr, taps_ptr, t, since, cols, mask, row0, C, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """[BT, BD]: the causal convolution of channels ``cols`` at times ``t`` of the sequence that begins at ``row0``."""
    y = tl.zeros((BT, BD), tl.float32)
    for w in tl.static_range(W):
        back = W - 1 - w
        seen = mask & (since >= back)[:, None]
        x = tl.load(x_ptr + (row0 + t - back)[:, None] * C + cols[None, :], mask=seen, other=0.0).to(tl.float32)
        y += x * tl.load(taps_ptr + cols * W + w, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    return y


@jit
def _tokens_since(since_ptr, t, row0, T, PACKED: tl.constexpr):
    """[BT] how many tokens of the same document lie before each."""
    if PACKED:
        return tl.load(since_ptr + row0 + t, mask=t < T, other=0)
    return t


@jit
def conv_forward(
    x_ptr, taps_ptr, since_ptr, y_ptr, T, C, first,
    D: tl.constexpr, W: tl.constexpr, ACT: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y = conv(x) of the head's D channels from ``first``; ACT 1: silu of it, 2: that divided by its length.

    x [B, T, C], taps [C, W], y [B, T, heads * D]; programs (heads, blocks of T, B).
    """
    head, heads = tl.program_id(0), tl.num_programs(0)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    row0 = tl.program_id(2).to(tl.int64) * T
    d = tl.arange(0, BD)
    cols = first + head * D + d
    mask = (t < T)[:, None] & (d < D)[None, :]
    y = _convolve(x_ptr, taps_ptr, t, _tokens_since(since_ptr, t, row0, T, PACKED), cols, mask, row0, C, W, BT, BD)
    if ACT > 0:
        y *= _sigmoid(y)
    if ACT == 2:
        y *= 1.0 / tl.sqrt(tl.sum(tl.where(mask, y * y, 0.0), axis=1) + 1e-6)[:, None]
    tl.store(y_ptr + (row0 + t)[:, None] * (heads * D) + head * D + d[None, :], y, mask=mask)


@jit
def conv_backward_inside(
    x_ptr, taps_ptr, since_ptr, dy_ptr, du_ptr, T, C, first,
    D: tl.constexpr, W: tl.constexpr, ACT: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradient du [B, T, C] at the convolution's output; arguments and programs as in ``conv_forward``."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    row0 = tl.program_id(2).to(tl.int64) * T
    d = tl.arange(0, BD)
    cols = first + head * D + d
    mask = (t < T)[:, None] & (d < D)[None, :]
    du = tl.load(dy_ptr + (row0 + t)[:, None] * (heads * D) + head * D + d[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    if ACT > 0:
        since = _tokens_since(since_ptr, t, row0, T, PACKED)
        u = _convolve(x_ptr, taps_ptr, t, since, cols, mask, row0, C, W, BT, BD)
        s = _sigmoid(u)
        if ACT == 2:
            y = u * s
            r = 1.0 / tl.sqrt(tl.sum(tl.where(mask, y * y, 0.0), axis=1) + 1e-6)[:, None]
            du = r * (du - y * (r * r * tl.sum(du * y, axis=1)[:, None]))
        du *= s * (1.0 + u * (1.0 - s))
    tl.store(du_ptr + (row0 + t)[:, None] * C + cols[None, :], du, mask=mask)


@jit
def conv_backward(
    x_ptr, du_ptr, taps_ptr, since_ptr, dx_ptr, dtaps_ptr, T, C,
    W: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """dx_t = sum over taps of tap du_(t + back), what later tokens of the same document took from token t; and the taps'
    gradient, the sum of du_(t + back) x_t, as shares dtaps [programs, W, C]. W is at most 4.

    A program takes BLOCKS blocks of BT tokens and keeps the products apart until its end: summing over tokens costs more
    than all the rest.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    row0 = tl.program_id(2).to(tl.int64) * T
    # By distance: sum0 belongs to the current token's tap, the last one.
    sum0 = tl.zeros((BT, BC), tl.float32)
    sum1 = tl.zeros((BT, BC), tl.float32)
    sum2 = tl.zeros((BT, BC), tl.float32)
    sum3 = tl.zeros((BT, BC), tl.float32)
    for i in range(BLOCKS):
        t = (tl.program_id(1) * BLOCKS + i) * BT + tl.arange(0, BT)
        mask = (t < T)[:, None] & (c < C)[None, :]
        at = (row0 + t)[:, None] * C + c[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dx = tl.zeros((BT, BC), tl.float32)
        for back in tl.static_range(W):
            later = t + back
            took = mask & (later < T)[:, None]
            took = took & (_tokens_since(since_ptr, later, row0, T, PACKED) >= back)[:, None]
            du = tl.load(du_ptr + (row0 + later)[:, None] * C + c[None, :], mask=took, other=0.0).to(tl.float32)
            dx += du * tl.load(taps_ptr + c * W + (W - 1 - back), mask=c < C, other=0.0).to(tl.float32)[None, :]
            if back == 0:
                sum0 += du * x
            elif back == 1:
                sum1 += du * x
            elif back == 2:
                sum2 += du * x
            else:
                sum3 += du * x
        tl.store(dx_ptr + at, dx, mask=mask)
    share = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * W
    tl.store(dtaps_ptr + (share + W - 1) * C + c, tl.sum(sum0, axis=0), mask=c < C)
    if W > 1:
        tl.store(dtaps_ptr + (share + W - 2) * C + c, tl.sum(sum1, axis=0), mask=c < C)
    if W > 2:
        tl.store(dtaps_ptr + (share + W - 3) * C + c, tl.sum(sum2, axis=0), mask=c < C)
    if W > 3:
        tl.store(dtaps_ptr + (share + W - 4) * C + c, tl.sum(sum3, axis=0), mask=c < C)


# ---------------------------------------------------------------------------------------------------------------- MLP


@jit
def swiglu_forward(gu_ptr, y_ptr, N, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """y = silu(g) u for gu = [g | u], [N, 2 D]."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (rows < N)[:, None] & (cols < D)[None, :]
    at = rows.to(tl.int64)[:, None] * (2 * D) + cols[None, :]
    g = tl.load(gu_ptr + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gu_ptr + at + D, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * D + cols[None, :], g * _sigmoid(g) * u, mask=mask)


@jit
def swiglu_backward(gu_ptr, dy_ptr, dgu_ptr, y_ptr, N, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """dgu [N, 2 D] from dy, and y once more, which is then not kept since the forward."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (rows < N)[:, None] & (cols < D)[None, :]
    at = rows.to(tl.int64)[:, None] * (2 * D) + cols[None, :]
    y_at = rows.to(tl.int64)[:, None] * D + cols[None, :]
    g = tl.load(gu_ptr + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gu_ptr + at + D, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + y_at, mask=mask, other=0.0).to(tl.float32)
    s = _sigmoid(g)
    tl.store(dgu_ptr + at, dy * u * s * (1.0 + g * (1.0 - s)), mask=mask)
    tl.store(dgu_ptr + at + D, dy * g * s, mask=mask)
    tl.store(y_ptr + y_at, g * s * u, mask=mask)


# -------------------------------------------------------------------------------------------------------------- gates


@jit
def _bounded(f, floor_ptr, room_ptr, cols, D, BOUNDED: tl.constexpr):
    """sigmoid(f), sigmoid(-f), the gate a = floor + room sigmoid(f), 1 - a, and room, each exact where it is small."""
    e = tl.exp(-tl.abs(f))
    large = 1.0 / (1.0 + e)
    s = tl.where(f > 0, large, e * large)
    c = tl.where(f > 0, e * large, large)
    room = tl.zeros_like(f) + 1.0
    a = s
    if BOUNDED:
        room *= tl.load(room_ptr + cols, mask=cols < D, other=0.0)[None, :]
        a = tl.load(floor_ptr + cols, mask=cols < D, other=1.0)[None, :] + room * s
    return s, c, a, room * c, room


@jit
def _log_of_gate(a, rest):
    """log a for a = 1 - rest, exact at both ends."""
    u = 1.0 - rest
    near = a > 0.5
    none = u == 1.0
    log = tl.log(tl.where(near, u, a))
    correction = rest / tl.where(none, 1.0, 1.0 - u)  # Kahan's, as in _log1p
    return tl.where(near, tl.where(none, -rest, log * correction), log)


@jit
def forget_forward(
    z_ptr, f_ptr, bias_ptr, floor_ptr, room_ptr, log_ptr, first_ptr, second_ptr, N, z_stride, f_stride, scale,
    D: tl.constexpr, FORM: tl.constexpr, BIAS: tl.constexpr, BOUNDED: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """log of the forget gate a of f [+ bias], float32, times scale; and what else it decides.

    FORM 0 (GLA): nothing. FORM 1 (HGRN): first = silu(z) (1 - a). FORM 2 (HGRN2): first = silu(z), second = 1 - a.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (rows < N)[:, None] & (cols < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + cols[None, :]
    f = tl.load(f_ptr + rows.to(tl.int64)[:, None] * f_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        f += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    s, c, a, rest, room = _bounded(f, floor_ptr, room_ptr, cols, D, BOUNDED)
    if BOUNDED:
        log_a = _log_of_gate(a, rest)
    else:
        log_a = tl.minimum(f, 0.0) - _log1p(tl.exp(-tl.abs(f)))
    tl.store(log_ptr + at, log_a * scale, mask=mask)
    if FORM > 0:
        z = tl.load(z_ptr + rows.to(tl.int64)[:, None] * z_stride + cols[None, :], mask=mask, other=0.0)
        z = z.to(tl.float32)
        silu = z * _sigmoid(z)
        if FORM == 1:
            tl.store(first_ptr + at, silu * rest, mask=mask)
        else:
            tl.store(first_ptr + at, silu, mask=mask)
            tl.store(second_ptr + at, rest, mask=mask)


@jit
def forget_backward(
    z_ptr, f_ptr, bias_ptr, floor_ptr, room_ptr, dlog_ptr, dfirst_ptr, dsecond_ptr, dz_ptr, df_ptr,
    dbias_ptr, dfloor_ptr, droom_ptr, N, z_stride, f_stride, scale,
    D: tl.constexpr, FORM: tl.constexpr, BIAS: tl.constexpr, BOUNDED: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of ``forget_forward``; those of bias and bounds [programs, D] are shares, summed over a program's rows."""
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    share = tl.program_id(0).to(tl.int64) * D + cols
    if BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    dbias = tl.zeros((BN, BD), tl.float32)
    dfloor = tl.zeros((BN, BD), tl.float32)
    droom = tl.zeros((BN, BD), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, BN), tl.num_programs(0)):
        rows = block * BN + tl.arange(0, BN)
        mask = (rows < N)[:, None] & (cols < D)[None, :]
        at = rows.to(tl.int64)[:, None] * D + cols[None, :]
        f_at = rows.to(tl.int64)[:, None] * f_stride + cols[None, :]
        f = tl.load(f_ptr + f_at, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            f += bias
        dlog = tl.load(dlog_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
        s, c, a, rest, room = _bounded(f, floor_ptr, room_ptr, cols, D, BOUNDED)
        drest = tl.zeros((BN, BD), tl.float32)
        if FORM > 0:
            z_at = rows.to(tl.int64)[:, None] * z_stride + cols[None, :]
            z = tl.load(z_ptr + z_at, mask=mask, other=0.0).to(tl.float32)
            sz = _sigmoid(z)
            dsilu = tl.load(dfirst_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if FORM == 1:
                drest = dsilu * z * sz
                dsilu *= rest
            else:
                drest = tl.load(dsecond_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dz_ptr + z_at, dsilu * sz * (1.0 + z * (1.0 - sz)), mask=mask)
        # All are 0 where there is no token, for dlog and drest are.
        if BOUNDED:
            da = dlog / a
            df = (da - drest) * room * s * c
            dfloor += da
            droom += da * s + drest * c
        else:
            df = (dlog - drest * s) * c
        tl.store(df_ptr + f_at, df, mask=mask)
        if BIAS:
            dbias += df
    if BIAS:
        tl.store(dbias_ptr + share, tl.sum(dbias, axis=0), mask=cols < D)
    if BOUNDED:
        tl.store(dfloor_ptr + share, tl.sum(dfloor, axis=0), mask=cols < D)
        tl.store(droom_ptr + share, tl.sum(droom, axis=0), mask=cols < D)


@jit
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, N, x_stride, y_stride, table_rows, sign,
    HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Turn channels j and j + D / 2 of every head by the token's angle; sign -1 turns back (the gradient).

    x [N, heads * D], cos and sin [table_rows, D], the same for every sequence if table_rows is T.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.arange(0, BH)
    mask = (rows < N)[:, None] & (j < D // 2)[None, :]
    table = (rows % table_rows).to(tl.int64)[:, None] * D + j[None, :]
    cos = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32) * sign
    for head in range(HEADS):
        x_at = rows.to(tl.int64)[:, None] * x_stride + head * D + j[None, :]
        y_at = rows.to(tl.int64)[:, None] * y_stride + head * D + j[None, :]
        a = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + x_at + D // 2, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + y_at, a * cos - b * sin, mask=mask)
        tl.store(y_ptr + y_at + D // 2, b * cos + a * sin, mask=mask)


# --------------------------------------------------------------------------------------------------------------- loss


@jit
def cross_entropy_kernel(
    logits_ptr, target_ptr, loss_ptr, scale_ptr, V, ignored, GRADIENT: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """The loss of one row of logits [N, V], and in its place the gradient, times scale[0]; 0 where it is ignored."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(target_ptr + row)
    top = -float("inf")
    total = 0.0
    wanted = 0.0
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        x = tl.load(logits_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), axis=0)
        wanted += tl.sum(tl.where(v == target, x, 0.0), axis=0)
        top = new_top
    log_sum = top + tl.log(total)
    counts = target != ignored
    tl.store(loss_ptr + row, tl.where(counts, log_sum - wanted, 0.0))
    if GRADIENT:
        scale = tl.where(counts, tl.load(scale_ptr).to(tl.float32), 0.0)
        for start in range(0, V, BV):
            v = start + tl.arange(0, BV)
            x = tl.load(logits_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
            gradient = (tl.exp(x - log_sum) - tl.where(v == target, 1.0, 0.0)) * scale
            tl.store(logits_ptr + v, gradient, mask=v < V)


__all__ = [
    "conv_backward",
    "conv_backward_inside",
    "conv_forward",
    "cross_entropy_kernel",
    "forget_backward",
    "forget_forward",
    "norm_backward",
    "norm_forward",
    "rotate_kernel",
    "swiglu_backward",
    "swiglu_forward",
]
