"""Memory of a training step, predicted without a device and without allocating anything.

    python -m training.accounting --cell 340M-20B-GatedDeltaNet-hybrid-6-1 --check-memory --batch 8

What autograd keeps for the backward pass follows from the code, and a formula written beside the code goes stale with the
next fused kernel. So the code is run: one layer of each kind, and the head with the loss, on tensors that have shapes but
no memory (torch's fake tensors), while ``LiveBytes`` adds up the storages that are alive. A model's peak is put together
from these pieces, layer by layer, in the order in which a step allocates and frees.

For a CUDA device the code is the fused one. Its kernels, and fla-core's, cannot run here: the launches are left out, which
changes no tensor's size, and ``fla_law`` stands for fla-core's and keeps what they keep. Their temporaries inside a layer
(the states at chunk borders) are left out, as are the allocator's rounding, the libraries' work spaces and the CUDA
context; a device's own report is therefore a few percent higher for small models.

    >>> from hybrid_models.suite import cell_config
    >>> from hybrid_models.info import human_bytes
    >>> one = training_memory(cell_config("340M-20B-GLA-hybrid-6-1"), batch=8, sequence_length=2048)
    >>> one.parameters == 4 * parameters(cell_config("340M-20B-GLA-hybrid-6-1"))
    True
"""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybrid_models import (
    HybridLinearConfig,
    HybridLinearForCausalLM,
    attention,
    fused,
    fused_kernels,
    kernels,
    loss,
    mixers,
    modeling_hybrid_linear,
)
from hybrid_models.modeling_hybrid_linear import HybridLinearDecoderLayer
from hybrid_models.recurrence import CHUNK_SIZE

from .accounting import parameters

PRECISIONS = ("bf16", "float32")
WEIGHT_BYTES = 4  # float32 master weights; bf16 is autocast over them
ADAM_BYTES = 8  # two float32 moments
CHECKED_STEPS = 3


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one training step on one device. ``peak`` is the most that is alive at once."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int  # alive after the forward pass, before the loss
    head: int  # the most that the head and the loss add to that
    peak: int


class Trace(NamedTuple):
    """Bytes of one module's forward and backward."""

    kept: int  # alive after the forward, the output included, the input not
    forward: int  # the most alive in the forward
    backward: int  # the most that the backward adds to what is alive at its start; the weights' gradients included


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages made while it is on, until they are freed: ``now``, and the ``peak`` so far.

    Args:
        known: tensors whose storages do not count (weights, inputs).
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._known = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in known)}
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known or id(storage) in self._seen:
            return
        self._seen.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, id(storage), storage.nbytes()).atexit = False

    def _gone(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.now -= size


class _KeptByKernel(torch.autograd.Function):
    """A kernel of ``inputs``: results of the right shapes, ``kept`` for the backward, gradients like the inputs."""

    @staticmethod
    def forward(ctx, output, state, kept, *inputs):
        ctx.save_for_backward(*kept)
        ctx.like = [(x.shape, x.dtype) for x in inputs]
        return output, state

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, None, *(torch.empty(shape, dtype=dtype) for shape, dtype in ctx.like)


def fla_law(q, k, v, log_decay=None, beta=None, initial_state=None, **options):
    """In place of the law: results of the right shapes, while autograd keeps what fla-core 0.6's chunk kernels keep.

    hgrn: gate and output. retnet: q, k, v. gla, hgrn2: q, k, v, the gate's sums over a chunk (as large as the gate), and the
    pairs' scores in float32. delta_net: q, k, v, beta, and the solved matrix of the pairs. gated_delta_net: that, and the
    gate's sums.
    """
    dtype = torch.bfloat16
    v = v.to(dtype)
    log_decay = None if log_decay is None else log_decay.float()
    o = torch.empty_like(v)
    if k is None:
        o, _ = _KeptByKernel.apply(o, None, (log_decay, o), log_decay, v)
        return o, o[:, -1].float()
    q, k = q.to(dtype), k.to(dtype)
    B, T, H, V = v.shape
    inputs = [q, k, v]
    kept = [q, k, v]
    fixed = beta is None and log_decay is not None and log_decay.dim() == 3  # RetNet's decays are H numbers
    if log_decay is not None and not fixed:
        inputs.append(log_decay)
        kept.append(log_decay)
    if beta is not None:
        beta = beta.to(dtype) if log_decay is None else beta.float()
        inputs.append(beta)
        kept += [beta, v.new_empty(B, T, H, CHUNK_SIZE)]
    elif not fixed:
        kept.append(v.new_empty(B, T, H, CHUNK_SIZE, dtype=torch.float32))
    state = v.new_empty(B, H, k.shape[-1], V, dtype=torch.float32)
    return _KeptByKernel.apply(o, state, kept, *inputs)


@contextmanager
def _code_of(device: str, law: str):
    """Inside, models on fake tensors take the code of a device, without what only real tensors, or a device, can do."""
    with ExitStack() as stack:
        put = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        for module in (fused, loss):  # a fake weight is no plain tensor; its layer is plain all the same
            put(
                module,
                "is_plain",
                lambda linear, bias=False: type(linear) is nn.Linear and (linear.bias is None) != bias,
            )
        for module in (loss, modeling_hybrid_linear):
            put(module, "check_targets", lambda *_: lambda: None)  # there are no values to check
        put(loss, "linear_cross_entropy", _linear_cross_entropy)
        if device == "cuda":
            _leave_out_kernels(put)
            put(loss, "is_transformed", lambda: True)  # the loss of logits is the library's
            stack.enter_context(mock.patch.dict(loss.BLOCK_ELEMENTS, cpu=loss.BLOCK_ELEMENTS["cuda"]))
            stack.enter_context(kernels.use_law(fla_law) if law == "fla" else nullcontext())
        yield


def _linear_cross_entropy(hidden, weight, targets, count, checked):
    count = torch.as_tensor(count, dtype=torch.float32)
    return loss._LinearCrossEntropy.apply(hidden, weight, targets, count, fused.compute_dtype(hidden))


def _leave_out_kernels(put) -> None:
    """``put(module, name, value)`` what stands for the operations of a CUDA device."""

    def block(logits, targets, scale, gradient):  # of the loss: the gradient takes the logits' place
        return torch.empty(len(logits), dtype=torch.float32), logits

    for module in (attention, mixers, modeling_hybrid_linear):
        put(module, "operations", lambda *args, **kwargs: fused.OPERATIONS)
    for name, kernel in list(vars(fused).items()):
        if callable(kernel) and vars(fused_kernels).get(name) is kernel:
            put(fused, name, _NoKernel())
    # Triton's own, which need no Triton.
    numbers = SimpleNamespace(cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length())
    put(fused, "triton", numbers)
    put(loss, "_block", block)


class _NoKernel:
    """A Triton kernel that is launched and does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def training_memory(
    config: HybridLinearConfig,
    batch: int,
    sequence_length: int,
    precision: str = "bf16",
    *,
    device: str = "cuda",
    law: str | None = None,
    checkpointing: bool = False,
    skip_logits: bool = False,
    accumulated: bool = False,
    shards: int = 1,
) -> TrainingMemory:
    """Memory of a step of ``batch`` sequences on one device, AdamW, float32 master weights.

    Args:
        precision: "bf16" (autocast) or "float32".
        device: "cuda" (fused operations) or "cpu" (plain torch).
        law: "fla" for what fla-core's kernels keep, "torch" for the chunk form in torch. Default: what serves there.
        checkpointing: every layer is computed again in the backward pass.
        skip_logits: the model's loss without logits.
        accumulated: gradients of an earlier micro-batch are there (gradient accumulation, or DDP's buckets).
        shards: devices that share weights, gradients and moments evenly (FSDP2); activations are not shared. The layer at
            work is there as a whole, in the precision of its products, and so are embedding and head.

    Raises:
        ValueError: a precision or law that is not known.
    """
    law = law or ("fla" if device == "cuda" and precision == "bf16" else "torch")
    for name, value, known in (
        ("precision", precision, PRECISIONS),
        ("device", device, ("cuda", "cpu")),
        ("law", law, ("fla", "torch")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not known: use {' or '.join(known)}.")
    d, n = config.hidden_size, parameters(config)
    weights, moments = WEIGHT_BYTES * n // shards, ADAM_BYTES * n // shards
    shape = (batch, sequence_length, precision, device, law)
    traces = [_trace_layer(*_signature(config, i), *shape) for i in range(config.num_hidden_layers)]
    ends = 2 * config.vocab_size * d  # embedding and head; tied ones are one tensor
    layer_weights = (n - ends) // config.num_hidden_layers
    stream = 4 * batch * sequence_length * d
    head = _trace_head(_signature(config, 0)[0], *shape, skip_logits)

    base = weights + moments + (WEIGHT_BYTES * n // shards if accumulated else 0)
    if shards > 1:  # gathered: what is at work, and its gradient before it is scattered
        gathered = 2 if precision == "bf16" else 4
        base += gathered * (2 * layer_weights + ends)
    live = peak = base + stream
    for trace in traces:
        peak = max(peak, live + trace.forward)
        live += stream if checkpointing else trace.kept
    activations = live - base
    peak = max(peak, live + head.forward)
    live += 0 if accumulated else WEIGHT_BYTES * ends // 2 // shards
    for trace in reversed(traces):
        again = trace.kept if checkpointing else 0
        peak = max(peak, live + max(trace.forward, again + trace.backward) if again else live + trace.backward)
        live -= stream if checkpointing else trace.kept
        live += 0 if accumulated else WEIGHT_BYTES * layer_weights // shards
    peak = max(peak, base + (0 if accumulated else WEIGHT_BYTES * n // shards))
    return TrainingMemory(weights, WEIGHT_BYTES * n // shards, moments, activations, head.forward, peak)


def _signature(config: HybridLinearConfig, layer_idx: int) -> tuple[str, str, bool]:
    """What a layer's memory depends on: shared by the layers, and by the cells, that it is the same for."""
    fields = config.to_dict()
    for name in ("layer_types", "dtype", "architectures", "auto_map", "_name_or_path"):
        fields.pop(name, None)
    fields["mixer"] = config.mixers[layer_idx]
    if config.layer_types[layer_idx] == "full_attention":  # the same whatever the others are
        fields = {name: value for name, value in fields.items() if name != "mixer" and not name.startswith("linear_")}
    bounded = layer_idx > 0 and config.linear_use_lower_bound and config.mixers[layer_idx] in ("hgrn", "hgrn2")
    return json.dumps(fields, sort_keys=True, default=str), config.layer_types[layer_idx], bounded


def _one_layer_config(fields: str, kind: str) -> HybridLinearConfig:
    fields = {**json.loads(fields), "num_hidden_layers": 1, "layer_types": [kind]}
    config = HybridLinearConfig.from_dict(fields)
    config._attn_implementation = "sdpa"
    return config


def _autocast(precision: str):
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


@functools.cache
def _trace_layer(
    fields: str, kind: str, bounded: bool, batch: int, tokens: int, precision: str, device: str, law: str
) -> Trace:
    config = _one_layer_config(fields, kind)
    with FakeTensorMode():
        layer = HybridLinearDecoderLayer(config, 0)
        width = config.head_dim
        bounds = None
        if kind == "linear_attention":
            layer.linear_attn.layer_idx = int(bounded)  # layer 0 has no bound
            dims = config.linear_dims(0)
            width = dims.key_head_dim
            if bounded:
                keys = dims.value_head_dim if config.mixer == "hgrn" else dims.num_heads * dims.key_head_dim
                bounds = torch.empty(config.num_hidden_layers + 1, keys, requires_grad=True)
        x = torch.empty(batch, tokens, config.hidden_size, requires_grad=True)
        rotary = (torch.empty(1, tokens, width), torch.empty(1, tokens, width))
        known = [x, *rotary, *layer.parameters(), *([] if bounds is None else [bounds])]
        with LiveBytes(known) as live:
            with _autocast(precision), _code_of(device, law):
                y = layer(x, position_embeddings=rotary, lower_bounds=bounds)
                kept, forward = live.now, live.peak
                gradient = torch.empty_like(y)
                live.peak = start = live.now
                y.backward(gradient)
            return Trace(kept, forward, live.peak - start)


@functools.cache
def _trace_head(
    fields: str, batch: int, tokens: int, precision: str, device: str, law: str, skip_logits: bool
) -> Trace:
    """Final norm, head and loss as the model's forward computes them; forward and backward in ``forward``."""
    config = _one_layer_config(fields, "full_attention")
    with FakeTensorMode():
        model = HybridLinearForCausalLM(config)
        model.model.layers = nn.ModuleList()
        x = torch.empty(batch, tokens, config.hidden_size, requires_grad=True)
        labels = torch.empty(batch, tokens, dtype=torch.long)
        with LiveBytes([x, labels, *model.parameters(), *model.buffers()]) as live:
            with _autocast(precision), _code_of(device, law):
                # The mean's divisor is passed, as the Trainer does: counting the labels would need their values.
                options = dict(use_cache=False, num_items_in_batch=batch * tokens)
                if skip_logits:
                    options["skip_logits"] = True
                model(inputs_embeds=x, labels=labels, **options).loss.backward()
            return Trace(0, live.peak, 0)


# --------------------------------------------------------------------------------------------------------------- check


def check_memory(
    config: HybridLinearConfig,
    batch: int,
    sequence_length: int,
    precision: str | None = None,
    checkpointing: bool = False,
    skip_logits: bool = False,
) -> dict:
    """Predicted and measured peak of training steps, where this machine can run them.

    On CUDA what the allocator reports; on the CPU, which reports nothing, ``LiveBytes`` over a whole step of the real model
    on real memory. Random tokens, AdamW.

    Returns:
        device, batch, precision, law, predicted and measured bytes, their ratio, and the prediction's parts.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision or ("bf16" if device.type == "cuda" else "float32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    law = kernels.select(device, dtype, sequence_length, *_kind_of_law(config)).name
    how = dict(checkpointing=checkpointing, skip_logits=skip_logits)
    predicted = training_memory(config, batch, sequence_length, precision, device=device.type, law=law, **how)
    measured = _measure(config, batch, sequence_length, dtype, device, **how)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "batch": batch,
        "precision": precision,
        "law": law,
        **how,
        "predicted_bytes": predicted.peak,
        "measured_bytes": measured,
        "ratio": predicted.peak / measured,
        "parts": asdict(predicted),
    }


def _kind_of_law(config: HybridLinearConfig) -> tuple[bool, int]:
    """delta and key_width, as ``kernels.select`` takes them, of the first linear layer."""
    linear = [i for i, kind in enumerate(config.layer_types) if kind == "linear_attention"]
    if not linear:
        return False, 0
    return "delta" in config.mixers[linear[0]], config.linear_dims(linear[0]).key_head_dim


def _measure(config, batch, tokens, dtype, device, checkpointing: bool, skip_logits: bool) -> int:
    model = HybridLinearForCausalLM(config).to(device).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (batch, tokens), generator=generator).to(device)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            options = {"skip_logits": True} if skip_logits else {}
            value = model(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=ids.numel(), **options).loss
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the moments, and compiles what is compiled
    if device.type != "cuda":
        with LiveBytes([*model.parameters(), *model.buffers(), ids, *_moments(optimizer)]) as live:
            step()
        return live.peak + (WEIGHT_BYTES + ADAM_BYTES) * sum(p.numel() for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    for _ in range(CHECKED_STEPS):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _moments(optimizer) -> list[torch.Tensor]:
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]


__all__ = ["LiveBytes", "Trace", "TrainingMemory", "check_memory", "fla_law", "training_memory"]
