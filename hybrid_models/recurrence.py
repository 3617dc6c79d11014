"""The law of all six mixers in plain torch: one recurrence, three forms, one signature.

Every head keeps a state ``S`` [K, V]. A token decays it, writes to it and reads from it:

    S <- exp(log_decay_t) * S                    log_decay: absent | one number | one number per key channel
    S <- S + k_t v_t^T                           without beta (HGRN, RetNet, GLA, HGRN-2)
    S <- S + beta_t k_t (v_t - S^T k_t)^T        with beta, after the decay (DeltaNet, GatedDeltaNet)
    o_t = scale * S^T q_t

``reference`` is the law as written, token by token in float64; everything else is tested against it. ``chunk`` is the
parallel form for whole sequences, differentiable; ``step`` is one token. HGRN's state is a vector: ``k`` is None, ``v``
and ``log_decay`` are [B, T, D], and the output is the state itself.

Sources: GLA (arXiv 2312.06635) for the chunk form and its decay algebra, DeltaNet (arXiv 2406.06484) for the solve in
the delta rule, GatedDeltaNet (arXiv 2412.06464) for the decay inside it, HGRN (arXiv 2311.04823) for the vector state.

Shape suffixes: B batch, T time, H heads, K key width, V value width, N chunks, C tokens of a chunk, D channels.

    >>> import torch
    >>> from hybrid_models.recurrence import chunk, reference
    >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind(0)
    >>> log_decay = -torch.rand(1, 100, 2)
    >>> (chunk(q, k, v, log_decay)[0] - reference(q, k, v, log_decay)[0]).abs().max() < 1e-4
    tensor(True)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Tokens per chunk. Larger chunks do more work inside a chunk (quadratic), smaller ones carry more states between them.
CHUNK_SIZE = 64
# The delta rule solves a triangular system of this many tokens.
DELTA_CHUNK_SIZE = 64
# HGRN's scan: steps of the sequential loop, which runs for all chunks at once.
VECTOR_CHUNK_SIZE = 32


def reference(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    valid: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The law, one token after the other, in float64. Slow on purpose: this is what "right" means.

    Args (all three forms take the same):
        q, k: [B, T, H, K]. ``k=None``: the state is a vector and ``q`` must be None too. ``q=None`` alone: only the
            final state is wanted.
        v: [B, T, H, V], or [B, T, D] for a vector state.
        log_decay: natural logarithm of the decay, <= 0. None (no decay), [B, T, H], or [B, T, H, K]; [B, T, D] for a
            vector state.
        beta: [B, T, H] write strength of the delta rule, or None for the plain write.
        initial_state: [B, H, K, V] or [B, D], or None for zeros.
        scale: factor on the output. Default: K**-0.5.
        valid: [B, T] bool. A token that is False neither decays nor writes; its output means nothing.
        reset: [B, T] bool. True at the first token of a document: the state is zeroed before that token.

    Returns:
        o [B, T, H, V] (or [B, T, D], or None without q), final state [B, H, K, V] (or [B, D]). ``chunk`` and ``step``
        compute and return float32, or float64 for float64 inputs, whatever the dtype of the inputs.
    """
    vector = k is None
    q, k, v, log_decay, beta, state = (
        None if x is None else x.to(torch.float64) for x in (q, k, v, log_decay, beta, initial_state)
    )
    if state is None:
        state = v.new_zeros(v[:, 0].shape if vector else (v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]))
    scale = _scale(k, scale)

    def per_row(flags_B):
        return flags_B.reshape(-1, *[1] * (state.dim() - 1))

    outputs = []
    for t in range(v.shape[1]):
        if reset is not None:
            state = torch.where(per_row(reset[:, t]), torch.zeros_like(state), state)
        new = state
        if log_decay is not None:
            decay = log_decay[:, t].exp()
            new = new * (decay if vector else _per_key(decay, new))
        if vector:
            new = new + v[:, t]
        else:
            write = v[:, t]
            if beta is not None:
                write = beta[:, t, :, None] * (write - torch.einsum("bhkv,bhk->bhv", new, k[:, t]))
            new = new + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        state = new if valid is None else torch.where(per_row(valid[:, t]), new, state)
        if vector:
            outputs.append(state)
        elif q is not None:
            outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return (torch.stack(outputs, 1) if outputs else None), state


def step(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    valid: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """One token (T = 1); arguments and results as in ``reference``."""
    if v.shape[1] != 1:
        raise ValueError(f"step takes one token, but v has T={v.shape[1]}: use chunk.")
    with torch.autocast(v.device.type, enabled=False):
        q, k, v, log_decay, beta, state = _in_full_precision(q, k, v, log_decay, beta, initial_state)
        if reset is not None or valid is not None:  # rare for one token: the general form keeps this one short
            return chunk(q, k, v, log_decay, beta, state, scale=scale, valid=valid, reset=reset)
        if k is None:
            new = v[:, 0] if state is None else log_decay[:, 0].exp() * state + v[:, 0]
            return new[:, None], new
        k_BHK1, v_BH1V = k[:, 0, :, :, None], v[:, 0, :, None, :]
        if state is None:
            new = k_BHK1 * (v_BH1V if beta is None else beta[:, 0, :, None, None] * v_BH1V)
        else:
            new = state if log_decay is None else state * _per_key(log_decay[:, 0].exp(), state)
            if beta is not None:
                v_BH1V = beta[:, 0, :, None, None] * (v_BH1V - k_BHK1.transpose(-1, -2) @ new)
            new = torch.addcmul(new, k_BHK1, v_BH1V)
        if q is None:
            return None, new
        o_BH1V = (q[:, 0, :, None, :] * _scale(k, scale)) @ new
        return o_BH1V.transpose(1, 2), new


def chunk(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    valid: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """A whole sequence, in time and memory linear in T; arguments and results as in ``reference``.

    Inside a chunk tokens meet pairwise; between chunks only the state travels. Decays stay in the log domain and every
    exponent is a sum of log decays over a later-minus-earlier range, hence <= 0: no decay overflows, however small.
    """
    with torch.autocast(v.device.type, enabled=False):
        q, k, v, log_decay, beta, state = _in_full_precision(q, k, v, log_decay, beta, initial_state)
        if valid is not None:
            v, k, log_decay = _drop_invalid(valid, v, k, log_decay)
        if k is None:
            return _chunk_vector(v, log_decay, state, reset)
        return _chunk_matrix(q, k, v, log_decay, beta, state, _scale(k, scale), reset)


# ------------------------------------------------------------------------------------------------------ shared by forms


def _in_full_precision(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """float32, or float64 where any input is: what states, gates and decays are computed in."""
    dtype = torch.float32
    for x in tensors:
        if x is not None:
            dtype = torch.promote_types(dtype, x.dtype)
    return [None if x is None else x.to(dtype) for x in tensors]


def _scale(k: torch.Tensor | None, scale: float | None) -> float:
    return scale if scale is not None else (1.0 if k is None else k.shape[-1] ** -0.5)


def _per_key(decay: torch.Tensor, state_BHKV: torch.Tensor) -> torch.Tensor:
    """[B, H] or [B, H, K] decay, shaped to multiply a state."""
    return decay[..., None, None] if decay.dim() == state_BHKV.dim() - 2 else decay[..., None]


def _drop_invalid(valid_BT, *tensors):
    """Zero log decay (decay 1), key and value at invalid tokens: they leave the state alone."""
    return [
        None if x is None else x.masked_fill(~valid_BT.reshape(*valid_BT.shape, *[1] * (x.dim() - 2)), 0.0)
        for x in tensors
    ]


# --------------------------------------------------------------------------------------------------- chunk, matrix state


def _chunk_matrix(q, k, v, log_decay, beta, state, scale, reset):
    B, T, H, K = k.shape
    per_channel = log_decay is not None and log_decay.dim() == 4
    C = min(DELTA_CHUNK_SIZE if beta is not None else CHUNK_SIZE, 1 << (T - 1).bit_length())
    N = -(-T // C)

    def to_chunks(x):  # [B, T, H, ...] -> [N, B, H, C, ...]; the padding at the end is invalid tokens (all zeros)
        if x is None:
            return None
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, N * C - T)) if N * C != T else x
        return x.unflatten(1, (N, C)).movedim((1, 3), (0, 2)).contiguous()

    q, k, v, log_decay, beta = (to_chunks(x) for x in (None if q is None else q * scale, k, v, log_decay, beta))
    segments = _Segments(None if reset is None else F.pad(reset, (0, N * C - T)).unflatten(1, (N, C)).movedim(1, 0))

    b = None if log_decay is None else log_decay.cumsum(3)  # log of the decay since the chunk's start, inclusive
    if b is None:
        q_in, k_out, state_decay = q, k, None
    else:
        b_key = b if per_channel else b[..., None]
        b_end = b_key[:, :, :, -1:]
        q_in = None if q is None else q * b_key.exp()
        k_out = k * (b_end - b_key).exp()
        state_decay = b_end.exp().transpose(-1, -2)  # [N, B, H, K or 1, 1]
    q_in, k_out, state_decay = segments.carry(q_in, k_out, state_decay)
    if state is None:
        state = v.new_zeros(B, H, K, v.shape[-1])

    u, w, pair_decay = v, None, None
    if not per_channel and (q is not None or beta is not None):
        pair_decay = _pair_decay(b, k, segments)
    if beta is not None:
        u, w = _solve_writes(k, v, b, beta, pair_decay, segments)
    written, o, state = _across_chunks(u, w, q_in, k_out, state_decay, state)
    if q is None:
        return None, state
    if per_channel:
        o = o.view_as(v) + _pairs_by_halves(q, k, v, b, segments)
    else:
        scores = (q @ k.transpose(-1, -2)) * pair_decay
        o = torch.baddbmm(o.flatten(0, 1), scores.flatten(0, 2), written.flatten(0, 1)).view_as(v)
    return o.movedim((0, 2), (1, 3)).flatten(1, 2)[:, :T], state


class _Segments:
    """Which tokens of a chunk belong together when documents are packed (``reset`` [N, B, C]); no-op for None."""

    def __init__(self, reset_NBC):
        self.ids = None if reset_NBC is None else reset_NBC.cumsum(-1)[:, :, None]  # [N, B, 1, C], 0: began before

    def carry(self, q_in, k_out, state_decay):
        """Only the first document of a chunk reads the incoming state, only the last one adds to the outgoing."""
        if self.ids is None:
            return q_in, k_out, state_decay
        last, keeps = self.ids == self.ids[..., -1:], self.ids[..., -1:, None] == 0
        q_in = None if q_in is None else self.first(q_in)
        state_decay = keeps.to(k_out.dtype) if state_decay is None else state_decay * keeps
        return q_in, k_out * last[..., None], state_decay

    def first(self, x):
        """x [N, B, H, C, *], zero but in the first document of a chunk."""
        return x if self.ids is None else x * (self.ids == 0)[..., None]

    def same(self):
        """[N, B, 1, C, C] True where two tokens are of one document."""
        return self.ids[..., :, None] == self.ids[..., None, :]


def _across_chunks(u, w, q_in, k_out, state_decay, state):
    """Carry the state from chunk to chunk.

    Args:
        u: [N, B, H, C, V], what the tokens write, less, with w [N, B, H, C, K], what the state before them holds already.

    Returns:
        What was written (without w: u), what the states before each chunk answer to q_in (None without it), both
        [N, B * H, C, V], and the last state [B, H, K, V].
    """

    def each(x):
        # unbind, not indexing: the gradient of n slices is n tensors of full size, and the step quadratic in length.
        return [None] * len(u) if x is None else x.expand(*u.shape[:3], -1, -1).flatten(1, 2).unbind(0)

    shape, state = state.shape, state.flatten(0, 1)
    writes, answers = [], []
    per_chunk = zip(*map(each, (u, w, q_in, k_out.transpose(-1, -2), state_decay)), strict=True)
    for write, hold, ask, key, decay in per_chunk:
        if hold is not None:
            write = torch.baddbmm(write, hold, state, alpha=-1)
            writes.append(write)
        if ask is not None:
            answers.append(ask @ state)
        state = torch.baddbmm(state if decay is None else state * decay, key, write)
    written, answers = (torch.stack(rows) if rows else None for rows in (writes, answers))
    return u.flatten(1, 2) if written is None else written, answers, state.view(shape)


def _pair_decay(b, k, segments):
    """[N, B, H, C, C] decay from token j to token i >= j of a chunk; 0 for j > i or another document."""
    C = k.shape[-2]
    keep = torch.ones(C, C, dtype=torch.bool, device=k.device).tril()
    if segments.ids is not None:
        keep = keep & segments.same()
    if b is None:
        return keep.to(k.dtype)
    # Masked before exp: above the diagonal the exponent is positive and may overflow, and 0 * inf is not 0.
    return (b[..., :, None] - b[..., None, :]).masked_fill(~keep, float("-inf")).exp()


def _pairs_by_halves(q, k, v, b, segments):
    """Output [N, B, H, C, V] of the pairs inside a chunk when every key channel decays by itself.

    A chunk is halved until single tokens remain. Between two halves, both sides refer their decay to the border, so
    that the two exponents, border to i and j to border, are both <= 0; a product over the whole chunk, exp(b_i) times
    exp(-b_j), would overflow in float32 as soon as a chunk decays by more than e^-88.
    """
    C = k.shape[-2]
    o = (q * k).sum(-1, keepdim=True) * v
    size = 1
    while size < C:
        q_lo, q_hi = q.unflatten(3, (-1, 2, size)).unbind(4)
        k_lo, _ = k.unflatten(3, (-1, 2, size)).unbind(4)
        v_lo, _ = v.unflatten(3, (-1, 2, size)).unbind(4)
        b_lo, b_hi = b.unflatten(3, (-1, 2, size)).unbind(4)
        border = b_lo[..., -1:, :]
        q_border, k_border = q_hi * (b_hi - border).exp(), k_lo * (border - b_lo).exp()
        if size == 1:
            scores = (q_border * k_border).sum(-1, keepdim=True)
        else:
            scores = q_border @ k_border.transpose(-1, -2)
        if segments.ids is not None:
            lo, hi = segments.ids.unflatten(3, (-1, 2, size)).unbind(4)
            scores = scores * (hi[..., :, None] == lo[..., None, :])
        o_lo, o_hi = o.unflatten(3, (-1, 2, size)).unbind(4)
        o = torch.stack((o_lo, o_hi + scores @ v_lo), 4).flatten(3, 5)
        size *= 2
    return o


def _solve_writes(k, v, b, beta, pair_decay, segments):
    """What a token writes depends on what the chunk's earlier tokens wrote: (I + L) x = beta (v - k S), solved at once.

    L is strictly lower triangular, and substitution finds the inverse of I + L also for near-identical keys and beta up to
    2, where the Neumann series overflows. Strengths and decays go to the inverse, C wide, rather than to k and v.

    Returns:
        u [N, B, H, C, V] and w [N, B, H, C, K], such that a chunk that begins with the state S writes u - w S.
    """
    strength = beta[..., None]
    # The solver reads the strictly lower triangle only.
    system = (k @ k.transpose(-1, -2)) * (pair_decay * strength)
    one = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, one, upper=False, unitriangular=True)
    hold = segments.first(strength if b is None else strength * b.exp()[..., None])
    return (inverse * strength.mT) @ v, (inverse * hold.mT) @ k


# --------------------------------------------------------------------------------------------------- chunk, vector state


def _chunk_vector(v, log_decay, state, reset):
    decay = log_decay.exp()
    if reset is not None:
        decay = decay.masked_fill(reset[..., None], 0.0)
    if state is None:
        state = torch.zeros_like(v[:, 0])
    states = _Scan.apply(decay, v, state)
    return states, states[:, -1].clone()  # a view would keep all states as long as the last one


class _Scan(torch.autograd.Function):
    """h_t = decay_t * h_{t-1} + v_t over [B, T, D]. Products of decays only, so nothing overflows.

    Written as a Function because the gradient is the same scan run backwards (dh_t = do_t + decay_{t+1} dh_{t+1}):
    autograd through the loop would cost ten times as much. The backward is built from the same Function, hence
    differentiable in turn.
    """

    @staticmethod
    def forward(ctx, decay, v, state):
        states = _scan(decay, v, state)
        ctx.save_for_backward(decay, states, state)
        return states

    @staticmethod
    def backward(ctx, grad):
        decay, states, state = ctx.saved_tensors
        next_decay = torch.cat((decay[:, 1:], torch.zeros_like(decay[:, :1])), 1)
        grad_v = _Scan.apply(next_decay.flip(1), grad.flip(1), torch.zeros_like(state)).flip(1)
        previous = torch.cat((state[:, None], states[:, :-1]), 1)
        return grad_v * previous, grad_v, grad_v[:, 0] * decay[:, 0]


def _scan(decay_BTD, v_BTD, state_BD):
    """Sequential inside chunks, for all chunks at once; then sequential over the chunks' ends."""
    B, T, D = v_BTD.shape
    C = min(VECTOR_CHUNK_SIZE, T)
    N = -(-T // C)
    pad = N * C - T
    decay = F.pad(decay_BTD, (0, 0, 0, pad), value=1.0).view(B, N, C, D)
    v = F.pad(v_BTD, (0, 0, 0, pad)).view(B, N, C, D)
    inside, product = [v[:, :, 0]], [decay[:, :, 0]]
    for c in range(1, C):
        inside.append(torch.addcmul(v[:, :, c], decay[:, :, c], inside[-1]))
        product.append(product[-1] * decay[:, :, c])
    inside, product = torch.stack(inside, 2), torch.stack(product, 2)
    at_start = [state_BD]
    for n in range(N - 1):
        at_start.append(torch.addcmul(inside[:, n, -1], product[:, n, -1], at_start[-1]))
    return torch.addcmul(inside, product, torch.stack(at_start, 1)[:, :, None]).reshape(B, N * C, D)[:, :T]
