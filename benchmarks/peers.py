"""The peers: fla's own model of a cell of the suite, and transformers' Llama of the same size.

fla searches the configurations of its kernels for four minutes a model before its first step. That is done once, by
``benchmarks.tune_fla``, and its finds are put in place of the search: the peer then runs at the speed that a user of fla
gets after the wait. fla's hybrids do not build without flash-attn; where it is missing, torch's SDPA stands in for it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from hybrid_models.fla_config import config_to_fla
from hybrid_models.fla_kernels import TUNED, autotuners, choices, configure
from hybrid_models.suite import MIXERS, cell_config, parse_cell

TABLE = Path(__file__).parent / "results" / "fla_configurations.json"


def fla(cell: str, dtype: torch.dtype = torch.bfloat16, use_cache: bool = False):
    """fla's model of a cell on CUDA, in training mode, with its defaults (fused norms, SwiGLU and cross-entropy)."""
    import fla.models  # noqa: F401  (registers fla's configurations)
    from fla.layers import attn
    from transformers import AutoConfig, AutoModelForCausalLM

    if attn.flash_attn_func is None:
        attn.flash_attn_func, attn.flash_attn_varlen_func = _attend, _attend_rows
    fields = config_to_fla(cell_config(cell))
    kind = fields.pop("model_type")
    config = AutoConfig.for_model(kind, **(fields | {"attn_mode": "chunk", "use_cache": use_cache}))
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(dtype).train()


def llama(cell: str, dtype: torch.dtype = torch.bfloat16, use_cache: bool = False):
    """transformers' Llama on CUDA with the widths, depth and heads of a cell, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = cell_config(cell)
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in names}, use_cache=use_cache))
    return model.to(dtype).train()


def for_inference(who: str, cell: str):
    """ "fla" or "llama" of a cell with its cache, its kernels configured."""
    model = {"fla": fla, "llama": llama}[who](cell, use_cache=True).eval()
    if who == "fla":
        replay(cell)
    return model


def _attend(q, k, v, **_):
    """flash_attn_func without padding: q [B, T, H, D] of one query, or as many as keys; causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True).transpose(1, 2)


def _attend_rows(q, k, v, cu_seqlens_q, **_):
    """flash_attn_varlen_func for rows of one length."""
    rows = len(cu_seqlens_q) - 1
    return _attend(*(x.unflatten(0, (rows, -1)) for x in (q, k, v))).flatten(0, 1)


def found() -> dict[str, list[dict]]:
    """What the search of this process has found: {kernel: [{"key", "kwargs", "num_warps", "num_stages"}]}."""
    table = {}
    for kernel in autotuners():
        for key, config in kernel.cache.items():
            row = {"key": list(map(str, key)), "kwargs": dict(config.kwargs)}
            row |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
            table.setdefault(kernel.base_fn.__name__, []).append(row)
    return table


def replay(cell: str) -> bool:
    """Give every kernel one configuration: that which the search found for the 340M model of the cell's mixer.

    Returns:
        whether TABLE has the mixer; if not, the configurations are those that our own calls of fla's kernels use, which
        are found elsewhere in it, else 4 warps and 2 stages.
    """
    table = json.loads(TABLE.read_text())["mixers"] if TABLE.exists() else {}
    rows = table.get(MIXERS.get(parse_cell(cell).mixer), {})
    wanted = {name: (row["kwargs"], row["num_warps"], row["num_stages"]) for name, (*_, row) in rows.items()}
    configure(choices(TUNED | wanted))
    return bool(rows)
