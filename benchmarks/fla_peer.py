"""fla's own models as peers: built for a cell of the suite, with the kernel configurations that fla's search finds.

The search takes fla four minutes a model before its first step, so it is done once, by ``benchmarks.tune_fla``, and its
finds are put in place of it: the peer then runs at the speed that a user of fla gets after the wait.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hybrid_models.fla_config import config_to_fla
from hybrid_models.fla_kernels import TUNED, autotuners, nearest
from hybrid_models.suite import cell_config

TABLE = Path(__file__).parent / "results" / "fla_configurations.json"


def build(cell: str, dtype: torch.dtype = torch.bfloat16):
    """fla's model of a pure cell on CUDA, in training mode, with its defaults (fused norms, SwiGLU and cross-entropy)."""
    import fla.models  # noqa: F401  (registers fla's configurations)
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = config_to_fla(cell_config(cell))
    kind = fields.pop("model_type")
    config = AutoConfig.for_model(kind, **(fields | {"attn_mode": "chunk", "use_cache": False}))
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(dtype).train()


def found() -> dict[str, list[dict]]:
    """What the search of this process has found: {kernel: [{"key", "kwargs", "num_warps", "num_stages"}]}."""
    table = {}
    for kernel in autotuners():
        for key, config in kernel.cache.items():
            row = {"key": list(map(str, key)), "kwargs": dict(config.kwargs)}
            row |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
            table.setdefault(kernel.base_fn.__name__, []).append(row)
    return table


def replay(mixer: str) -> bool:
    """Give every kernel one configuration: that which the search found for this mixer's 340M model.

    Returns:
        whether TABLE has the mixer; if not, the configurations are those that our own calls of fla's kernels use, which
        are found elsewhere in it, else 4 warps and 2 stages.
    """
    table = json.loads(TABLE.read_text())["mixers"] if TABLE.exists() else {}
    rows = table.get(mixer, {})
    for kernel in autotuners():
        name = kernel.base_fn.__name__
        found = [(row["kwargs"], row["num_warps"], row["num_stages"]) for row in rows.get(name, [])]
        kernel.configs = [nearest(kernel.configs, found[-1] if found else TUNED.get(name))]
    return bool(rows)
