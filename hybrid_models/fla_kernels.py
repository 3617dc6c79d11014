"""The law's chunk form on fla-core's CUDA kernels: training and prefill in 16 bits.

Same signature as ``recurrence.chunk``. q, k and v are rounded to ``dtype``, what the kernels multiply in, and what the
outputs come back in; gates, their sums and the states stay in float32. fla-core is imported at the first call.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

from .recurrence import _drop_invalid, _scale
from .recurrence import chunk as torch_chunk
from .triton_kernels import triton

MAX_KEY_WIDTH = 256  # of the delta rules' kernels
CHUNK = 64  # tokens; fla's own


def why_not(
    device: torch.device, dtype: torch.dtype, delta: bool = False, key_width: int = 0, packed: bool = False
) -> str | None:
    """Why fla-core does not serve such a call, or None if it does."""
    if device.type != "cuda":
        return f"it needs CUDA tensors, these are on {device.type}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 runs kernels on the CPU"
    if importlib.util.find_spec("fla") is None:
        return "fla-core is not installed (pip install 'hybrid-models[gpu]')"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} stays in torch, where products are not rounded to TF32"
    if packed:
        return "packed documents that continue a state stay in torch"
    if delta and key_width > MAX_KEY_WIDTH:
        return f"its delta rule takes key heads of at most {MAX_KEY_WIDTH}, these have {key_width}"
    return None


def _is_fixed(log_decay: torch.Tensor) -> bool:
    """Whether a [B, T, H] decay is one [H] expanded (RetNet's)."""
    return log_decay.stride(1) == 0 and (log_decay.shape[0] == 1 or log_decay.stride(0) == 0)


def _miscompiles_gated_backward() -> bool:
    """Triton 3.4 to 3.7.0 computes the gradient of fla's per-head gates wrongly on Hopper cards (fla issue 640)."""
    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
    return torch.cuda.get_device_capability()[0] == 9 and (3, 4, 0) <= version < (3, 7, 1)


def refuse_miscompiled_backward() -> None:
    """Raise where the gradient would be wrong, before any time is spent.

    Raises:
        RuntimeError: see ``_miscompiles_gated_backward``, and there is no tilelang to take Triton's place.
    """
    if _miscompiles_gated_backward() and importlib.util.find_spec("tilelang") is None:
        raise RuntimeError(
            f"Triton {triton.__version__} computes the gradient of the gated delta rule wrongly on this card "
            f"({torch.cuda.get_device_name()}): pip install tilelang, or use Triton 3.7.1 or later, or set "
            "HYBRID_LINEAR_BACKEND=torch."
        )


def chunk(
    q,
    k,
    v,
    log_decay=None,
    beta=None,
    initial_state=None,
    *,
    dtype=torch.bfloat16,
    scale=None,
    valid=None,
    boundaries=None,
    final=True,
):
    """As ``recurrence.chunk``, and:

    Args:
        dtype: what q, k and v are rounded to.
        boundaries: [documents + 1] instead of ``reset``: where packed documents begin in the flattened batch.
        final: whether the final state is wanted; its gradient costs memory traffic.
    """
    if valid is not None:
        v, k, log_decay = _drop_invalid(valid, v, k, log_decay)
    per_token = log_decay is not None and log_decay.dim() == 3 and k is not None and not _is_fixed(log_decay)
    if per_token and beta is None and torch.is_grad_enabled() and _miscompiles_gated_backward():
        # RetNet with padding: the fixed decay has an unaffected kernel, which cannot skip tokens.
        return torch_chunk(q, k, v, log_decay, beta, initial_state, scale=scale)
    with torch.autocast("cuda", enabled=False):
        if boundaries is None:
            return _call(q, k, v, log_decay, beta, initial_state, dtype, _scale(k, scale), final=final)
        # The kernels know where documents begin in one long row.
        B, T = v.shape[:2]
        fixed = log_decay is not None and log_decay.dim() == 3 and k is not None and _is_fixed(log_decay)
        if fixed:
            log_decay = log_decay[:1, :1].expand(1, B * T, -1)
        row = [None if x is None else x if fixed and x is log_decay else x.reshape(1, B * T, *x.shape[2:])
               for x in (q, k, v, log_decay, beta)]  # fmt: skip
        o, state = _call(*row, None, dtype, _scale(k, scale), boundaries, final)
        # The state after a row is its last document's.
        last = torch.searchsorted(boundaries, torch.arange(1, B + 1, device=v.device) * T) - 1
        return None if o is None else o.unflatten(1, (B, T))[0], None if state is None else state[last]


def _call(q, k, v, log_decay, beta, state, dtype, scale, boundaries=None, final=True):
    state = None if state is None else state.float()
    if k is None:
        return _vector(v.to(dtype), log_decay.float(), state, boundaries)
    wanted = q is not None
    q, k, v = (k if q is None else q).to(dtype), k.to(dtype), v.to(dtype)
    shared = dict(q=q, k=k, v=v, scale=scale, initial_state=state, output_final_state=final, cu_seqlens=boundaries)
    if beta is None and log_decay is not None and log_decay.dim() == 4:
        kernel = _kernel("chunk_gla", k.shape[-1], v.shape[-1])
        shared["g"] = log_decay.float()
    elif beta is None:
        kernel = _kernel("chunk_simple_gla", k.shape[-1], v.shape[-1])
        if log_decay is not None and _is_fixed(log_decay):
            # The parts below the public functions are those of 0.6, and may mean something else in another version.
            known = sys.modules["fla"].__version__.startswith("0.6.")
            kernel = _fixed_decay if known else kernel
            shared["g_gamma"] = log_decay[0, 0].float()
        else:
            shared["g"] = None if log_decay is None else log_decay.float().contiguous()
    elif log_decay is None:
        kernel = _kernel("chunk_delta_rule", k.shape[-1], v.shape[-1])
        shared["beta"] = beta.to(dtype)
    else:
        if torch.is_grad_enabled():
            refuse_miscompiled_backward()
        kernel = _kernel("chunk_gated_delta_rule", k.shape[-1], v.shape[-1])
        shared |= dict(g=log_decay.float(), beta=beta.float())
    o, state = kernel(**shared)
    return (o if wanted else None), state


@torch.compiler.disable
def _fixed_decay(q, k, v, g_gamma, scale, initial_state, output_final_state, cu_seqlens):
    """``chunk_simple_gla`` with ``g_gamma`` [H] in less memory traffic."""
    with torch.cuda.device(q.device):
        return _FixedDecay.apply(q, k, v, g_gamma, scale, initial_state, output_final_state, cu_seqlens)


class _FixedDecay(torch.autograd.Function):
    """fla's kernels for one decay per head, but what the backward keeps of the states is in q's dtype, not in float32.

    A state for every 64 tokens is most of what that backward moves. The kernels that read the stored states round them to
    q's dtype before they multiply, so nothing changes, to the bit on Hopper (where shared memory is scarcer fla's tiles follow
    the dtype, and sums their order); the states that are carried from chunk to chunk stay in float32. (With
    gates, the products of states that their gradient sums are not rounded: there fla's own float32 stays.)
    """

    @staticmethod
    def forward(ctx, q, k, v, log_decay, scale, state, final, boundaries):
        _, outputs, chunks_of = _parts()
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # the kernels go by shapes alone
        state = None if state is None else state.contiguous()
        rate = log_decay * (1 / math.log(2))  # the kernels take powers of two
        kept = dict(g_gamma=rate, cu_seqlens=boundaries, chunk_size=CHUNK)
        indices = None if boundaries is None else chunks_of(boundaries, CHUNK)
        states, last = _states(k, v, state, kept, final)
        o = outputs.chunk_fwd_o(q=q, k=k, v=v, h=states, scale=scale, chunk_indices=indices, **kept)
        ctx.save_for_backward(q, k, v, state, indices)
        ctx.scale, ctx.kept = scale, kept
        return o, last

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_last):
        carried, outputs, _ = _parts()
        q, k, v, state, indices = ctx.saved_tensors
        _limit_search("chunk_simple_gla", k.shape[-1], v.shape[-1])  # layers above may have left their own
        grad, grad_last = grad.contiguous(), None if grad_last is None else grad_last.contiguous()
        shared = dict(q=q, k=k, do=grad, scale=ctx.scale, **ctx.kept)
        states, _ = _states(k, v, state, ctx.kept, False)
        grads, first = carried.chunk_bwd_dh(v=v, h0=state, dht=grad_last, states_in_fp32=False, **shared)
        dq, dk, _, _ = outputs.chunk_bwd_dqkwg(v=v, h=states, dh=grads, chunk_indices=indices, **shared)
        dv = outputs.chunk_bwd_dv(dh=grads, chunk_indices=indices, **shared)
        return dq, dk, dv, None, None, first, None, None


def _states(k, v, state, kept: dict, final: bool):
    """The state before each chunk [B, T / CHUNK, H, K, V] in k's dtype, and the last one in float32 or None."""
    return _parts()[0].chunk_fwd_h(k=k, v=v, h0=state, output_final_state=final, states_in_fp32=False, **kept)


def _parts():
    """Below fla's public functions: the modules of the states and of the outputs, and what finds chunks in packed rows."""
    try:
        from fla.ops.common import chunk_h, chunk_o
        from fla.ops.utils import prepare_chunk_indices
    except ImportError as error:
        raise _broken(error) from error
    return chunk_h, chunk_o, prepare_chunk_indices


def _broken(error: ImportError) -> RuntimeError:
    return RuntimeError(f"fla-core does not import ({error}): reinstall it, or set HYBRID_LINEAR_BACKEND=torch.")


def _kernel(name: str, key_width: int = 0, value_width: int = 0):
    """One of fla-core's functions; inside try, or fla-core would be a requirement of every checkpoint that ships this."""
    try:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.gla import chunk_gla
        from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise _broken(error) from error
    _limit_search(name, key_width, value_width)
    return {
        "chunk_delta_rule": chunk_delta_rule,
        "chunk_gated_delta_rule": chunk_gated_delta_rule,
        "chunk_gla": chunk_gla,
        "chunk_hgrn": chunk_hgrn,
        "chunk_simple_gla": chunk_simple_gla,
        "fused_recurrent_hgrn": fused_recurrent_hgrn,
    }[name]


# What fla's search found on an H100 and an H200 for the 340M models (benchmarks/results/fla_configurations.json): keyword
# arguments, warps, stages. Where heads with more than 128 key channels, or GLA's gates per channel, want something else, it
# stands in WIDE and PER_CHANNEL. LARGE is beyond fla's own choices, and for heads that such tiles fill: states carried from
# chunk to chunk in fewer pieces, so that keys and values are read less often (two to four per cent of the whole law).
TUNED = {
    "chunk_bwd_kernel_dh": (dict(BK=32, BV=64), 4, 2),
    "chunk_bwd_kernel_dqkwg": ({}, 4, 2),
    "chunk_bwd_kernel_dv": ({}, 4, 4),
    "chunk_bwd_kernel_dv_local": ({}, 4, 2),
    "chunk_fwd_kernel_h": (dict(BK=64, BV=64), 8, 2),
    "chunk_fwd_kernel_o": (dict(BK=64, BV=64), 4, 3),
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": (dict(BV=64), 4, 3),
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": (dict(BV=64), 4, 3),
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel": (dict(BK=64), 1, 3),
    "chunk_hgrn_bwd_kernel_h": (dict(BD=128), 1, 3),
    "chunk_hgrn_fwd_kernel_h": (dict(BD=128), 1, 3),
    "chunk_local_cumsum_scalar_kernel": ({}, 2, 3),
    "chunk_scaled_dot_kkt_fwd_kernel": (dict(BK=128), 8, 4),
    "merge_16x16_to_64x64_inverse_kernel": (dict(DOT_PRECISION="ieee"), 2, 5),
    "prepare_wy_repr_bwd_kernel": ({}, 2, 2),
    "recompute_w_u_fwd_kernel": ({}, 4, 3),
}
PER_CHANNEL = {
    "chunk_bwd_kernel_dh": (dict(BK=64, BV=64), 4, 2),
    "chunk_fwd_kernel_h": (dict(BK=64, BV=64), 4, 2),
    "chunk_gla_bwd_kernel_dA": ({}, 4, 3),
    "chunk_gla_bwd_kernel_dv": (dict(BK=32, BV=64), 8, 3),
    "chunk_gla_bwd_kernel_inter": (dict(BK=64, BV=64), 4, 2),
    "chunk_gla_bwd_kernel_intra": ({}, 1, 2),
    "chunk_gla_fwd_A_kernel_intra_sub_inter": (dict(BK=32), 1, 3),
    "chunk_gla_fwd_A_kernel_intra_sub_intra": ({}, 2, 3),
    "chunk_gla_fwd_kernel_o": (dict(BK=64, BV=128), 4, 3),
    "chunk_local_cumsum_vector_kernel": (dict(BS=64), 2, 3),
}
LARGE = {
    "chunk_bwd_kernel_dh": (dict(BK=128, BV=128), 8, 3),
    "chunk_fwd_kernel_h": (dict(BK=128, BV=128), 4, 3),
}
WIDE = {
    "chunk_bwd_kernel_dv": ({}, 4, 2),  # more stages do not fit the shared memory
    "chunk_bwd_kernel_dv_local": ({}, 4, 3),
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": (dict(BV=32), 4, 2),
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": (dict(BV=32), 4, 3),
    "prepare_wy_repr_bwd_kernel": ({}, 4, 4),
    "recompute_w_u_fwd_kernel": ({}, 4, 4),
}


def _limit_search(name: str, key_width: int, value_width: int) -> None:
    """Leave every autotuned kernel of fla the tuned configuration; on cards where none was tuned, a choice of at most three.

    Trying all of them takes four minutes before the first training step; HYBRID_LINEAR_SEARCH=1 keeps the search, for
    long runs on other cards.
    """
    hopper = torch.cuda.get_device_capability()[0] == 9  # where the tables are from
    large = hopper and key_width > 0 and key_width % 128 == 0 and value_width % 128 == 0
    now = (name == "chunk_gla", key_width > 128, large, len(sys.modules))
    if os.environ.get("HYBRID_LINEAR_SEARCH") == "1" or now == _limited:
        return
    if now not in _chosen:
        wanted = TUNED | (PER_CHANNEL if now[0] else {}) | (WIDE if now[1] else {})
        _chosen[now] = choices(wanted, LARGE if large else None, alternatives=not hopper)
    configure(_chosen[now], now)


def choices(
    wanted: dict[str, tuple[dict, int, int]],
    beyond: dict[str, tuple[dict, int, int]] | None = None,
    alternatives: bool = False,
) -> list[tuple]:
    """Every autotuned kernel of fla that is imported, with the configurations that it is to have.

    Args:
        wanted: by the kernel's name; the ``nearest`` of fla's own is taken.
        beyond: by name, before ``wanted``, what fla's own need not contain.
        alternatives: add the usual one and the smallest, for the autotuner to try: what fits one card's shared memory may
            be too much for another's, and the autotuner passes over what does not fit.
    """
    chosen = []
    for kernel in autotuners():
        name, configs = kernel.base_fn.__name__, _all_configs.setdefault(id(kernel), kernel.configs)
        kwargs, warps, stages = (beyond or {}).get(name, ({}, 4, 2))
        if kwargs and all(config.kwargs.keys() == kwargs.keys() for config in configs):
            kept = [triton.Config(dict(kwargs), num_warps=warps, num_stages=stages)]
        else:
            kept = [nearest(configs, wanted.get(name))]
        if alternatives:
            kept += [nearest(configs, None), min(configs, key=_size)]
        chosen.append((kernel, list({id(config): config for config in kept}.values())))
    return chosen


def _size(config) -> tuple[int, int]:
    """What its shared memory grows with: elements of a tile, stages."""
    return math.prod(value for value in config.kwargs.values() if isinstance(value, int)), config.num_stages


def configure(chosen: list[tuple], state: tuple | None = None) -> None:
    """Put ``choices`` in place; the next call of ``chunk`` puts its own, unless they are these (``state``)."""
    global _limited
    for kernel, configs in chosen:
        kernel.configs = configs
    _limited = state


def autotuners() -> Iterator:
    """Every autotuned kernel of fla that is imported, each once."""
    seen = set()
    for module in [module for name, module in list(sys.modules.items()) if name.startswith("fla.")]:
        for kernel in list(vars(module).values()):
            while kernel is not None and not isinstance(kernel, type):  # Heuristics and Autotuner wrap each other
                if isinstance(kernel, triton.runtime.Autotuner) and id(kernel) not in seen:
                    seen.add(id(kernel))
                    yield kernel
                kernel = getattr(kernel, "fn", None)


def nearest(configs, wanted):
    """The configuration with these (keyword arguments, warps, stages), else the one nearest to 4 warps and 2 stages."""
    if wanted is not None:
        for config in configs:
            if (config.kwargs, config.num_warps, config.num_stages) == wanted:
                return config
    return min(configs, key=lambda c: (abs(c.num_warps - 4), abs(c.num_stages - 2)))


_limited: tuple | None = None  # what _limit_search decided by at the last time
_chosen: dict[tuple, list[tuple]] = {}
_all_configs: dict[int, list] = {}


def _vector(v, log_decay, state, boundaries):
    if state is None and boundaries is None:
        o, _ = _kernel("chunk_hgrn")(x=v, g=log_decay)
        # The states are the output; chunk_hgrn drops the gradient of the one that it returns apart.
        return o, o[:, -1].float()
    o, state = _kernel("fused_recurrent_hgrn")(
        x=v, g=log_decay, initial_state=state, output_final_state=True, cu_seqlens=boundaries
    )
    return o, state.float()


__all__ = ["chunk", "refuse_miscompiled_backward", "why_not"]
