"""What a model costs: parameters, floating-point operations, and what the operations are worth on a device.

    python -m training.accounting --cell 340M-20B-GatedDeltaNet-hybrid-6-1
    python -m training.accounting --cell nano-7M-GLA-hybrid-3-1 --check-flops
    python -m training.accounting --cell 340M-20B-GLA-pure --check-memory --batch 8         (on the GPU, if there is one)

6 N per token, what most tools print, misses what a mixer does with its state. Here each mixer declares its weights and its
law in one row of MIXERS; the rest (MLP, attention, head) is the same for all.

**What is counted.** Multiplications and additions of: every projection, the MLPs, the head, attention, the short
convolution and the mixer's law. A law with a matrix state is counted in its chunk form, chunks of 64, since that is what
runs in training (fla-core's kernels and ``hybrid_models.recurrence`` alike); HGRN's is a scan. Only the pairs that causality
leaves are counted: query i of a chunk meets the i + 1 keys up to itself, and so in attention.

**What is not.** The half of a square that a causal mask throws away, padding, whatever a backward pass computes a second
time (flash attention's scores, fla's states, gradient checkpointing), norms, activations, gates, softmax, the loss, the
optimiser, and the embedding, which is a lookup. Everything that is counted must be computed by any implementation in this
form, at the most at the peak rate of matrix products, so a utilisation (MFU) made of it cannot pass 100 %. It is lower
than a number that counts attention's full square.

Sources: chunk forms of GLA (arXiv 2312.06635, section 4) and of the delta rule (arXiv 2406.06484, section 3); MFU as in
PaLM (arXiv 2204.02311, appendix B), which does count attention's full square.

    >>> from hybrid_models.suite import cell_config
    >>> config = cell_config("340M-20B-GatedDeltaNet-pure")
    >>> parameters(config)
    399531200
    >>> round(flops_per_token(config, 2048) / (6 * parameters(config)), 3)
    0.975
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from hybrid_models import HybridLinearConfig, HybridLinearForCausalLM
from hybrid_models.configuration_hybrid_linear import LinearDims
from hybrid_models.mixers import Gla
from hybrid_models.recurrence import CHUNK_SIZE, DELTA_CHUNK_SIZE
from hybrid_models.suite import cell_config


class Law(NamedTuple):
    """Forward operations of a mixer's law, over all heads of a layer."""

    token: float = 0  # with the state, per token: read it, write it
    pair: float = 0  # per pair of tokens of a chunk, a token with itself included
    solve: float = 0  # per pair of different tokens of a chunk: the triangular solve of the delta rule
    scan: float = 0  # per token, element by element: a vector state
    scan_backward: float = 0  # a product's backward is twice the product; a scan's is not twice the scan


class Mixer(NamedTuple):
    """A row of MIXERS. ``d`` is hidden_size; ``dims`` are a layer's heads H and widths K, V."""

    # Weights that every token is multiplied with, besides output gate, output projection and short convolution.
    projections: Callable[[int, LinearDims], int]
    # Parameters that no product sees: norms, biases, decays.
    others: Callable[[LinearDims], int]
    law: Callable[[LinearDims], Law]
    # Rows of lower_bounds (one per layer of the model, held by the model) are this wide; 0: there are none.
    bounds: Callable[[LinearDims], int] = lambda dims: 0


def _qkv(d: int, dims: LinearDims) -> int:
    query_key = (dims.num_query_heads + dims.num_key_heads) * dims.key_head_dim
    return d * (query_key + dims.num_value_heads * dims.value_head_dim)


def _added_writes(dims: LinearDims) -> Law:
    """q S and k v^T with the state (2 K V each); q k and scores v between tokens (2 K and 2 V)."""
    H, K, V = dims.num_heads, dims.key_head_dim, dims.value_head_dim
    return Law(token=H * 4 * K * V, pair=H * 2 * (K + V))


def _delta_writes(dims: LinearDims) -> Law:
    """As added writes, and: w S (2 K V), the keys' own products k k (2 K), and the solve for u and w (2 (K + V))."""
    H, K, V = dims.num_heads, dims.key_head_dim, dims.value_head_dim
    return Law(token=H * 6 * K * V, pair=H * 2 * (2 * K + V), solve=H * 2 * (K + V))


def _gla_gate(d: int, dims: LinearDims) -> int:
    return Gla.GATE_RANK * (d + dims.num_key_heads * dims.key_head_dim)


MIXERS: dict[str, Mixer] = {
    "hgrn": Mixer(
        projections=lambda d, dims: 2 * d * dims.value_head_dim,  # i, f
        others=lambda dims: dims.value_head_dim,
        # h = f h + u; backwards dh = do + f dh, and df = dh h.
        law=lambda dims: Law(scan=2 * dims.value_head_dim, scan_backward=3 * dims.value_head_dim),
        bounds=lambda dims: dims.value_head_dim,
    ),
    "retnet": Mixer(projections=_qkv, others=lambda dims: dims.value_head_dim, law=_added_writes),
    "gla": Mixer(
        projections=lambda d, dims: _qkv(d, dims) + _gla_gate(d, dims),
        others=lambda dims: dims.value_head_dim + dims.num_key_heads * dims.key_head_dim,
        law=_added_writes,
    ),
    "hgrn2": Mixer(  # q, f, i are as wide as q, k, v
        projections=_qkv,
        others=lambda dims: dims.num_heads * dims.value_head_dim,
        law=_added_writes,
        bounds=lambda dims: dims.num_heads * dims.key_head_dim,
    ),
    "delta_net": Mixer(
        projections=lambda d, dims: _qkv(d, dims) + d * dims.num_value_heads,  # beta
        others=lambda dims: dims.value_head_dim,
        law=_delta_writes,
    ),
    "gated_delta_net": Mixer(
        projections=lambda d, dims: _qkv(d, dims) + 2 * d * dims.num_value_heads,  # beta and a
        others=lambda dims: dims.value_head_dim + 2 * dims.num_value_heads,
        law=_delta_writes,
    ),
}
# The decay of every key channel by itself: torch's form meets pairs in halves, not in squares (see _executed_law).
DECAYS_PER_CHANNEL = {"gla", "hgrn2"}


@dataclass(frozen=True)
class Flops:
    """Forward operations per token, a multiplication and an addition counted as two. Backward: see ``training``."""

    projections: float = 0
    mlp: float = 0
    head: float = 0
    attention: float = 0
    law: float = 0
    convolution: float = 0
    backward_extra: float = 0  # what the backward does beyond twice the forward; negative where it does less

    @property
    def forward(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self)) - self.backward_extra

    @property
    def training(self) -> float:
        """Forward and backward. The gradients of a product are two products of its size."""
        return 3 * self.forward + self.backward_extra


def parameters(config: HybridLinearConfig) -> int:
    """Parameters of HybridLinearForCausalLM(config), from the table, without building it."""
    d = config.hidden_size
    total = (1 if config.tie_word_embeddings else 2) * config.vocab_size * d + d
    bounds = 0
    for i, (layer, kind) in enumerate(zip(config.per_layer_config, config.layer_types, strict=True)):
        total += 2 * d + _mlp(config)
        if kind == "full_attention":
            total += _attention_weights(layer, d)
            if layer.attention_bias:
                total += (layer.num_attention_heads + 2 * layer.num_key_value_heads) * layer.head_dim
            continue
        mixer, dims = MIXERS[config.mixers[i]], config.linear_dims(i)
        total += _linear_weights(config, i) + _convolution(config, i) + mixer.others(dims)
        if i > 0 and config.linear_use_lower_bound:
            bounds = bounds or config.num_hidden_layers * mixer.bounds(dims)
    return total + bounds


def forward_flops(config: HybridLinearConfig, sequence_length: int, executed: bool = False) -> Flops:
    """Operations per token of a forward over sequences of ``sequence_length`` tokens, by part.

    Args:
        executed: count what the torch back end hands to matrix products instead: whole squares where only a half is
            needed, chunks that padding fills, but neither triangular inverse, scan nor convolution, which are no products.
            This is what torch.utils.flop_counter sees with eager attention, and what the formulas are tested against.
    """
    d, T = config.hidden_size, sequence_length
    parts = dict.fromkeys(("projections", "attention", "law", "convolution", "backward_extra"), 0.0)
    for i, (layer, kind) in enumerate(zip(config.per_layer_config, config.layer_types, strict=True)):
        if kind == "full_attention":
            parts["projections"] += 2 * _attention_weights(layer, d)
            window = min(layer.sliding_window or T, T)
            seen = T if executed else window - window * (window - 1) / (2 * T)  # keys per query, on average
            parts["attention"] += 4 * layer.num_attention_heads * layer.head_dim * seen
            continue
        name, dims = config.mixers[i], config.linear_dims(i)
        law = MIXERS[name].law(dims)
        parts["projections"] += 2 * _linear_weights(config, i)
        if executed:
            forward, backward_extra = _executed_law(name, dims, law, T)
            parts["law"] += forward
            parts["backward_extra"] += backward_extra
            continue
        chunk = min(DELTA_CHUNK_SIZE if law.solve else CHUNK_SIZE, T)
        whole, rest = divmod(T, chunk)
        pairs = (whole * chunk * (chunk + 1) + rest * (rest + 1)) / (2 * T)  # per token, itself included
        parts["law"] += law.token + law.pair * pairs + law.solve * (pairs - 1) + law.scan
        parts["backward_extra"] += law.scan_backward - 2 * law.scan
        parts["convolution"] += 2 * _convolution(config, i)
    layers = config.num_hidden_layers
    return Flops(mlp=2 * layers * _mlp(config), head=2 * config.vocab_size * d, **parts)


def flops_per_token(config: HybridLinearConfig, sequence_length: int) -> float:
    """Operations of training, forward and backward, per token (see the module's docstring for what is counted)."""
    return forward_flops(config, sequence_length).training


def _mlp(config) -> int:
    return 3 * config.hidden_size * config.intermediate_size


def _attention_weights(layer, d: int) -> int:
    return 2 * d * (layer.num_attention_heads + layer.num_key_value_heads) * layer.head_dim


def _linear_weights(config, layer_idx: int) -> int:
    d, dims = config.hidden_size, config.linear_dims(layer_idx)
    out = d * dims.num_heads * dims.value_head_dim
    gate = out if config.uses_output_gate(layer_idx) else 0
    return MIXERS[config.mixers[layer_idx]].projections(d, dims) + gate + out


def _convolution(config, layer_idx: int) -> int:
    return config.conv_dim(layer_idx) * config.linear_conv_kernel_dim


def _executed_law(name: str, dims: LinearDims, law: Law, T: int) -> tuple[float, float]:
    """Per token, what ``recurrence.chunk`` hands to matrix products, and what its backward does beyond twice that.

    The delta rule inverts its triangle, which is no product, and multiplies; backwards it is another solve, and a product
    that gives the gradient of the triangle. The first chunk's state of zeros and the last chunk's write, after which
    nothing is read, need no gradient.
    """
    if law.scan:
        return 0.0, 0.0
    H, K, V = dims.num_heads, dims.key_head_dim, dims.value_head_dim
    chunk = min(DELTA_CHUNK_SIZE if law.solve else CHUNK_SIZE, 1 << (T - 1).bit_length())
    chunks = math.ceil(T / chunk)
    filled = chunks * chunk / T  # tokens with those that padding adds, per token
    pairs = (law.pair + law.solve) * chunk
    if name in DECAYS_PER_CHANNEL:  # a token with itself, and keys of neighbours, are taken element by element
        pairs = H * (K * max(chunk - 2, 0) + V * (chunk - 1))
    saved = 8 if law.solve else 6
    triangle = 2 * H * chunk**2 if law.solve else 0
    return filled * (law.token + pairs), filled * triangle - saved * H * K * V * filled / chunks


# ------------------------------------------------------------------------------------------------------------- devices

# Dense peak of matrix products in TFLOP/s, 16 bits with float32 sums, and float32 without TF32 (vendors' data sheets).
# The first name that a device's name contains counts, so the longer ones come first.
PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "GB200": (2500.0, 80.0),
    "B200": (2250.0, 75.0),
    "GH200": (989.4, 67.0),
    "H200 NVL": (835.5, 60.0),
    "H200": (989.4, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.5, 60.0),
    "H100": (989.4, 67.0),
    "H800": (989.4, 67.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "A10G": (70.0, 31.5),
    "L4": (121.0, 30.3),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "V100": (125.0, 15.7),
}


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Operations per second that ``torch.cuda.get_device_name()`` can do at the most; None for what is not in the table.

    Args:
        dtype: of the products: torch.bfloat16, torch.float16 or torch.float32 (TF32 off). A V100 has no bfloat16.
    """
    words = device_name.replace("-", " ").split()
    for name, (half, single) in PEAK_TFLOPS.items():
        wanted = name.split()
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            if dtype == torch.float32:
                return single * 1e12
            known = dtype == torch.float16 or (dtype == torch.bfloat16 and name != "V100")
            return half * 1e12 if known else None
    return None


# ------------------------------------------------------------------------------------------------------------- command


def count_flops(config: HybridLinearConfig, sequence_length: int, batch: int = 1) -> float:
    """Operations per token that torch's counter sees in one training step of a real model, torch back end, on the CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    model = HybridLinearForCausalLM._from_config(
        copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32
    )
    ids = torch.randint(3, config.vocab_size, (batch, sequence_length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    # The counter takes the gradient of a depthwise kernel for that of a dense one; convolutions are not counted (``executed``).
    products = (count for op, count in counter.get_flop_counts()["Global"].items() if "convolution" not in str(op))
    return sum(products) / ids.numel()


def report(config: HybridLinearConfig, sequence_length: int) -> dict:
    """Parameters and operations per token as plain numbers."""
    flops = forward_flops(config, sequence_length)
    n = parameters(config)
    return {
        "parameters": n,
        "sequence_length": sequence_length,
        "flops_per_token": {f.name: round(getattr(flops, f.name)) for f in fields(flops)},
        "training_flops_per_token": round(flops.training),
        "over_6n": round(flops.training / (6 * n), 4),
        "kv_bytes_per_token": config.kv_bytes_per_token(),
        "state_bytes": config.state_bytes(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.accounting",
        description="Parameters, operations and memory of a cell of the suite, as JSON; and checks of all three.",
        epilog="examples:\n"
        "  python -m training.accounting --cell 340M-20B-HGRN2-hybrid-6-1\n"
        "  python -m training.accounting --cell nano-7M-GLA-hybrid-3-1 --length 200 --check-flops\n"
        "  python -m training.accounting --cell 340M-20B-GLA-pure --check-memory --batch 8 --length 2048",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cell", required=True, help="a name of hybrid_models/suite.py")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence; default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step; default: %(default)s")
    parser.add_argument("--check-flops", action="store_true", help="run a step under torch's operation counter (CPU)")
    parser.add_argument("--check-memory", action="store_true", help="run steps and compare peak memory")
    parser.add_argument(
        "--precision", choices=("bf16", "float32"), help="for --check-memory; default: bf16 on CUDA, else float32"
    )
    parser.add_argument("--skip-logits", action="store_true", help="for --check-memory: the loss without logits")
    parser.add_argument("--checkpointing", action="store_true", help="for --check-memory: gradient checkpointing")
    options = parser.parse_args(argv)
    try:
        if min(options.length, options.batch) < 1:
            raise ValueError(f"--length={options.length} and --batch={options.batch} must be at least 1.")
        config = cell_config(options.cell)
    except ValueError as error:
        parser.error(str(error))
    found = {"cell": options.cell, **report(config, options.length)}
    if options.check_flops:
        counted = count_flops(config, options.length, options.batch)
        ours = forward_flops(config, options.length, executed=True).training
        found["check_flops"] = {"torch_counted": counted, "ours": ours, "ratio": ours / counted}
    if options.check_memory:
        from .memory import check_memory

        found["check_memory"] = check_memory(
            config, options.batch, options.length, options.precision, options.checkpointing, options.skip_logits
        )
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
