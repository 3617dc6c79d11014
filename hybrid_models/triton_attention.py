"""Attention of the decode step: one new token per row over a static key/value cache of any filling.

A row and head alone would leave most of a GPU idle, so the keys are split over programs (as in Flash-Decoding), each of
which keeps its own softmax maximum and sum; a second launch merges them. A head's programs take blocks of keys in turn: what
is read at one time lies together, in few pages. The length is read on the device, so one captured graph serves every length.
"""

from __future__ import annotations

from .triton_kernels import _let_next_begin, _wait_for_inputs, early, jit, triton

try:
    import triton.language as tl
except ImportError:  # see triton_kernels
    tl = None


@jit
def _attend_kernel(
    y_ptr, key_ptr, value_ptr, valid_ptr, length_ptr, position_ptr, freq_ptr, partial_ptr, y_stride, max_len, scale,
    rope_scale, H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One head's attention over one share of the keys; the share whose turn the newest column is also stores it."""
    _let_next_begin(EARLY)
    _wait_for_inputs(EARLY)
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    split = tl.program_id(1)
    group = head // (H // HK)
    dims = tl.arange(0, BD)
    half: tl.constexpr = D // 2
    in_d = dims < D
    length = tl.load(length_ptr).to(tl.int32)  # columns before this token
    y = y_ptr + row * y_stride
    angle = tl.load(position_ptr + row).to(tl.float32) * tl.load(freq_ptr + dims % half, mask=in_d, other=0.0)
    cos, sin = tl.cos(angle) * rope_scale, tl.sin(angle) * rope_scale
    other = tl.where(dims < half, dims + half, dims - half)
    sign = tl.where(dims < half, -1.0, 1.0)
    k_at, v_at = y + (H + group) * D, y + (H + HK + group) * D
    q = tl.load(y + head * D + dims, mask=in_d, other=0.0) * cos
    q = (q + sign * tl.load(y + head * D + other, mask=in_d, other=0.0) * sin) * scale
    store = key_ptr.dtype.element_ty
    k_new = tl.load(k_at + dims, mask=in_d, other=0.0) * cos
    k_new = (k_new + sign * tl.load(k_at + other, mask=in_d, other=0.0) * sin).to(store)
    v_new = tl.load(v_at + dims, mask=in_d, other=0.0).to(store)

    base = (row * HK + group).to(tl.int64) * max_len * D
    best, total = -float("inf"), 0.0
    acc = tl.zeros((BD,), tl.float32)
    for t in tl.range(split * BT, length, SPLITS * BT, num_stages=STAGES):
        times = t + tl.arange(0, BT)
        in_t = times < length
        at = base + times.to(tl.int64)[:, None] * D + dims[None, :]
        inside = in_t[:, None] & in_d[None, :]
        keys = tl.load(key_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scores = tl.sum(keys * q[None, :], axis=1)
        seen = in_t & (tl.load(valid_ptr + row * max_len + times, mask=in_t, other=0) != 0)
        scores = tl.where(seen, scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=0))
        safe = tl.where(new_best == -float("inf"), 0.0, new_best)
        weights = tl.exp(scores - safe)
        old = tl.exp(best - safe)
        values = tl.load(value_ptr + at, mask=inside, other=0.0).to(tl.float32)
        acc = acc * old + tl.sum(values * weights[:, None], axis=0)
        total = total * old + tl.sum(weights, axis=0)
        best = new_best
    if split == length // BT % SPLITS:
        score = tl.sum(k_new.to(tl.float32) * q, axis=0)
        new_best = tl.maximum(best, score)
        old, weight = tl.exp(best - new_best), tl.exp(score - new_best)
        acc = acc * old + v_new.to(tl.float32) * weight
        total = total * old + weight
        best = new_best
        if head % (H // HK) == 0:
            tl.store(key_ptr + base + length.to(tl.int64) * D + dims, k_new, mask=in_d)
            tl.store(value_ptr + base + length.to(tl.int64) * D + dims, v_new, mask=in_d)
    out = partial_ptr + (tl.program_id(0) * SPLITS + split) * (D + 2)
    tl.store(out + dims, acc, mask=in_d)
    tl.store(out + D, best)
    tl.store(out + D + 1, total)


@jit
def _merge_splits_kernel(
    partial_ptr, o_ptr, o_stride, H: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    _let_next_begin(EARLY)
    _wait_for_inputs(EARLY)
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, BD)
    at = partial_ptr + (tl.program_id(0) * SPLITS + splits) * (D + 2)
    best = tl.load(at + D)
    weight = tl.exp(best - tl.max(best, axis=0))
    total = tl.sum(weight * tl.load(at + D + 1), axis=0)
    parts = tl.load(at[:, None] + dims[None, :], mask=(dims < D)[None, :], other=0.0)
    o = tl.sum(parts * weight[:, None], axis=0) / total
    tl.store(o_ptr + row * o_stride + head * D + dims, o, mask=dims < D)


def attend(y, keys, values, valid, length, position, inv_freq, partial, o, num_heads, rope_scale=1.0, config=None):
    """Attention of one new token per row over a static cache, which it is appended to.

    Args:
        y: [B, *] float32 with q [H * D], k, v [HK * D] side by side, not yet rotated.
        keys, values: [B, HK, max_len, D], column ``length`` written; valid: [B, max_len] bool.
        length: 0-dim integer tensor, columns before this token; position: [B] integer, rotary position of it.
        partial: [B * H * splits, D + 2] float32 scratch, splits a power of two (see ``attention_splits``).
        o: [B, H * D] float32, written.
        config: keys per block, warps and pipeline stages, instead of ``attention_config``'s.
    """
    B, HK, max_len, D = keys.shape
    splits = partial.shape[0] // (B * num_heads)
    BD = triton.next_power_of_2(D)
    BT, warps, stages = config or attention_config(BD, max_len)
    _attend_kernel[(B * num_heads, splits)](
        y, keys, values, valid, length, position, inv_freq, partial, y.stride(0), max_len, D**-0.5, rope_scale,
        num_heads, HK, D, splits, BD, BT, stages, num_warps=warps, **early(y),
    )  # fmt: skip
    _merge_splits_kernel[(B * num_heads,)](partial, o, o.stride(0), num_heads, D, splits, BD, num_warps=2, **early(y))


def attention_config(width: int, max_len: int) -> tuple[int, int, int]:
    """Keys per block, warps and pipeline stages, for heads of (a power of two) ``width`` (benchmarks/tune_decode.py, H200).

    Large blocks read long contexts faster, but fill the shared memory, so that no kernel can begin beside them.
    """
    return max(16, (8192 if max_len <= 16384 else 16384) // width), 4, 2


def attention_splits(heads: int, max_len: int) -> int:
    """Programs that share the keys of each of ``heads`` heads (of all rows), for about 1000 in all; a power of two."""
    splits = 1
    while splits * heads < 1024 and splits * 64 < max_len:
        splits *= 2
    return splits


__all__ = ["attend", "attention_splits"]
