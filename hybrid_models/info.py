"""What `hybrid-linear info` knows: this environment, and what a model costs.

A hybrid is chosen for its memory: attention layers keep keys and values of every token, linear layers a state of fixed
size. Here that is said in bytes, from the configuration alone (no weights are read), beside a Transformer of the same
width and depth; ``cache_bytes`` measures a real cache, so that the formulas can be held against it.

    >>> from hybrid_models import HybridLinearConfig
    >>> from hybrid_models.info import describe
    >>> facts = describe(HybridLinearConfig(ratio="6-1"))
    >>> facts.layer_picture, facts.linear_to_full, facts.cache[32768].kv, facts.transformer_cache[32768].kv
    ('LLLLLALLLLLALLLLLALLLLLA', '5:1', 1073741824, 6442450944)
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache

from .configuration_hybrid_linear import HybridLinearConfig
from .modeling_hybrid_linear import HybridLinearForCausalLM

CONTEXTS = (2048, 32768, 131072)
PACKAGES = (
    "torch transformers tokenizers safetensors huggingface-hub accelerate datasets peft trl triton fla-core flash-attn"
).split()


class CacheBytes(NamedTuple):
    """Memory of one sequence's cache, in bytes."""

    kv: int  # keys and values of the full-attention layers; grows with the context
    state: int  # recurrent states and convolution windows of the linear layers; does not

    @property
    def total(self) -> int:
        return self.kv + self.state


@dataclass(frozen=True)
class ModelFacts:
    """What a configuration says about its model; every cache figure is for one sequence."""

    mixers: tuple[str, ...]  # of the linear layers, in order of first use; empty for a Transformer
    layer_picture: str  # L for linear attention, A for full attention
    linear_layers: int
    full_layers: int
    parameters: int
    dtype: str
    kv_bytes_per_token: int
    state_bytes: int
    cache: dict[int, CacheBytes]  # by context length
    transformer_cache: dict[int, CacheBytes]  # the same with attention at every layer

    @property
    def linear_to_full(self) -> str:
        """Linear to full-attention layers in lowest terms: a "6-1" model is 5:1, as each sixth layer attends."""
        divisor = math.gcd(self.linear_layers, self.full_layers)
        return f"{self.linear_layers // divisor}:{self.full_layers // divisor}"


def describe(config: HybridLinearConfig, contexts: tuple[int, ...] = CONTEXTS) -> ModelFacts:
    """Layers, parameters and cache sizes of the model that ``config`` describes, without allocating it.

    Cache figures are for the dtype of the configuration (float32 where it names none); recurrent states are float32 in
    any 16- or 32-bit model.
    """
    dtype = config.dtype or torch.float32
    kinds = config.layer_types
    mixers = [mixer for mixer, kind in zip(config.mixers, kinds) if kind == "linear_attention"]
    with torch.device("meta"):
        parameters = HybridLinearForCausalLM(config).num_parameters()
    return ModelFacts(
        mixers=tuple(dict.fromkeys(mixers)),
        layer_picture=config.layer_picture(),
        linear_layers=kinds.count("linear_attention"),
        full_layers=kinds.count("full_attention"),
        parameters=parameters,
        dtype=str(dtype).removeprefix("torch."),
        kv_bytes_per_token=config.kv_bytes_per_token(dtype.itemsize),
        state_bytes=config.state_bytes(dtype.itemsize),
        cache={tokens: expected_cache_bytes(config, tokens, dtype) for tokens in contexts},
        transformer_cache={
            tokens: expected_cache_bytes(transformer_of_same_size(config), tokens, dtype) for tokens in contexts
        },
    )


def transformer_of_same_size(config: HybridLinearConfig) -> HybridLinearConfig:
    """The configuration with full attention at every layer: same width, depth, MLP and attention heads."""
    fields = config.to_dict()
    fields["layer_types"] = ["full_attention"] * config.num_hidden_layers
    return type(config).from_dict(fields)


def expected_cache_bytes(config: HybridLinearConfig, tokens: int, dtype: torch.dtype = torch.float32) -> CacheBytes:
    """Cache of one sequence of ``tokens`` tokens in a model of ``dtype``, from the configuration's formulas."""
    return CacheBytes(tokens * config.kv_bytes_per_token(dtype.itemsize), config.state_bytes(dtype.itemsize))


def cache_bytes(cache: Cache) -> CacheBytes:
    """Bytes of the tensors that ``cache`` holds now, over the whole batch."""
    kv = state = 0
    for layer in cache.layers:
        kv += _nbytes(getattr(layer, "keys", None)) + _nbytes(getattr(layer, "values", None))
        for slot in ("recurrent_states", "conv_states"):
            state += sum(_nbytes(tensor) for tensor in getattr(layer, slot, {}).values())
    return CacheBytes(kv, state)


def _nbytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def human_bytes(count: int) -> str:
    """``count`` bytes in binary units, three digits: 66.0 KiB, 4.50 MiB, 512 MiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    value = float(count)
    while value >= 1000 and power < len(units) - 1:
        value, power = value / 1024, power + 1
    return f"{count} B" if power == 0 else f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f} {units[power]}"


def environment() -> list[tuple[str, str]]:
    """Versions of what matters here and the devices at hand, as (name, what was found)."""
    rows = [
        ("hybrid_models", sys.modules[__package__].__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    for package in PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    rows.append(("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"))
    if not torch.cuda.is_available():
        rows.append(("cuda", "not available"))
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{device.name}, {human_bytes(device.total_memory)}"))
    return rows


__all__ = [
    "CacheBytes",
    "ModelFacts",
    "cache_bytes",
    "describe",
    "environment",
    "expected_cache_bytes",
    "human_bytes",
    "transformer_of_same_size",
]
