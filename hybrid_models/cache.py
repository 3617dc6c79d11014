"""The recurrent layer of transformers' own caches.

``DynamicCache`` and ``StaticCache`` already build one layer per entry of ``config.layer_types``; what they put at a
linear-attention layer forgets the state of mixers without a convolution, cannot be repeated, selected or rolled back,
and knows no length. ``adopt`` replaces those layers, while they are unused, by ``RecurrentLayer``; the containers stay
the library's. Both generate() and a plain forward call it, so users pass the caches they know:

    >>> from transformers import DynamicCache
    >>> cache = DynamicCache(config=model.config)                      # doctest: +SKIP
    >>> model(input_ids, past_key_values=cache)                        # doctest: +SKIP

What the layer stores, per sequence: the law's state in float32 ([heads, K, V], or [D] for HGRN) and, with a short
convolution, the last ``kernel - 1`` inputs of it. While ``record_past`` is on (assisted decoding switches it on) it also
keeps what the last forwards wrote, so that ``crop(-n)`` recomputes the state as if the last n tokens had never been seen.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
)

from .kernels import recurrence

# Tokens that stay undoable after a crop. An assistant with a tokenizer of its own spells the text anew every round and
# may take back some of what it had settled in earlier ones: generate() looks back 10 tokens unless told otherwise.
TOKENS_KEPT_UNDOABLE = 32


@dataclass
class Segment:
    """What one forward wrote, enough to replay a part of it. Batch first in every tensor."""

    tokens: int  # columns of the forward, padding included
    state: torch.Tensor | None  # before the forward; None: it was the first
    k: torch.Tensor | None
    v: torch.Tensor
    log_decay: torch.Tensor | None
    beta: torch.Tensor | None
    conv_inputs: torch.Tensor | None  # [B, kernel - 1 + tokens, C]: the window before the forward, then its inputs
    counts: torch.Tensor | None  # [B, tokens]: valid tokens up to a column; None: all are

    def apply(self, function) -> None:
        """Replace every tensor by ``function(tensor)``, which acts on the batch dimension."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                setattr(self, field.name, function(value))

    def head(self, tokens: int) -> Segment:
        """The segment of a forward that had seen the first ``tokens`` columns alone."""
        k, v, log_decay, beta, counts = (
            None if x is None else x[:, :tokens] for x in (self.k, self.v, self.log_decay, self.beta, self.counts)
        )
        conv_inputs = None if self.conv_inputs is None else self.conv_inputs[:, : tokens - self.tokens]
        return Segment(tokens, self.state, k, v, log_decay, beta, conv_inputs, counts)

    def replay(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """State and convolution window after the segment."""
        lengths = valid = None
        if self.counts is not None:
            lengths = self.counts[:, -1]
            valid = torch.arange(self.tokens, device=lengths.device) < lengths[:, None]
        _, state = recurrence(None, self.k, self.v, self.log_decay, self.beta, self.state, valid=valid)
        return state, None if self.conv_inputs is None else conv_window(self.conv_inputs, lengths, self.tokens)


def conv_window(inputs: torch.Tensor, lengths: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """The convolution's window [B, W - 1, C] after ``lengths`` [B] of ``tokens`` inputs (None: after all of them).

    Args:
        inputs: [B, W - 1 + tokens, C], the window before, then the inputs, valid ones first.
    """
    width = inputs.shape[1] - tokens
    if lengths is None:
        return inputs[:, tokens:].clone()  # a view would keep the whole prompt's inputs in memory
    index = lengths[:, None] + torch.arange(width, device=inputs.device)
    return inputs.gather(1, index[:, :, None].expand(-1, -1, inputs.shape[2]))


class RecurrentLayer(LinearAttentionLayer):
    """State of one linear-attention layer (see the module's docstring).

    ``conv_states[0]`` is [B, kernel - 1, C] and ``recurrent_states[0]`` [B, H, K, V] (or [B, D]); both are None before
    the first forward. In a static cache they live at fixed addresses and are written in place.
    """

    # A marker instead of isinstance: a checkpoint's own copy of this file and the installed package may meet in one
    # process, and their caches are the same thing.
    is_hybrid_linear = True

    def __init__(self, static: bool = False, counts_tokens: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.static = static
        # A dynamic one has fixed shapes too, but saying so would compile every generate() of an all-linear model.
        self.is_compileable = static
        # Attention layers know how many tokens were seen. Only where there is none must this layer count: a tensor in
        # static caches, where a Python number would recompile the graph at every token.
        self.counts_tokens = counts_tokens
        self.seen_tokens: int | torch.Tensor = torch.tensor(0) if static else 0
        self.segments: list[Segment] = []
        # Containers that are iterated (DataParallel's gather) ask every layer for these.
        self.keys = self.values = None

    # ------------------------------------------------------------------------------------------------ used by the mixers

    def read(self, batch_size: int, layer_idx: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Convolution window and state to continue from, None and None before the first forward.

        Raises:
            ValueError: the cache holds another number of sequences.
        """
        if not self.has_previous_state[0]:
            return None, None
        held = self.recurrent_states[0].shape[0]
        if held != batch_size:
            raise ValueError(
                f"past_key_values holds {held} sequences (layer {layer_idx}), but the batch has {batch_size}: pass a "
                "cache of this batch, or change it with batch_repeat_interleave or batch_select_indices."
            )
        return self.conv_states[0], self.recurrent_states[0]

    def write(self, window: torch.Tensor | None, state: torch.Tensor, segment: Segment | None, tokens: int) -> None:
        """Store what the next forward continues from. ``segment``: see ``Segment``; needed while recording."""
        if self.record_past:
            self.segments.append(segment)
        else:
            self.segments.clear()  # they end before this forward, so nothing can be undone from them any more
        self.device = state.device
        self.dtype = state.dtype if window is None else window.dtype
        self._store(self.conv_states, self.is_conv_states_initialized, window)
        self._store(self.recurrent_states, self.is_recurrent_states_initialized, state)
        self.has_previous_state[0] = True
        if self.counts_tokens and self.static:
            self.seen_tokens.add_(tokens)
        elif self.counts_tokens:
            self.seen_tokens += tokens

    def _store(self, slot: dict, initialized: dict, value: torch.Tensor | None) -> None:
        if value is None:
            return
        if not self.static:
            slot[0] = value  # not in place: autograd, deep copies and inference mode stay possible
        elif not initialized[0]:
            slot[0] = _at_fixed_address(value.detach().clone(memory_format=torch.contiguous_format))
            self.seen_tokens = _at_fixed_address(self.seen_tokens.to(value.device))
        else:
            slot[0].copy_(value)
        initialized[0] = True

    # ---------------------------------------------------------------------------------------------- used by transformers

    @property
    def batch_size(self) -> int:
        if not self.is_recurrent_states_initialized[0]:
            raise AttributeError("batch_size is not known before the first forward")  # hasattr() must say no
        return self.recurrent_states[0].shape[0]

    @property
    def is_croppable(self) -> bool:
        return not self.static

    def activate_past_recording(self) -> None:
        if self.static:
            raise ValueError(
                "A static cache cannot take tokens back, which assisted, prompt-lookup and early-exit decoding need: "
                "use the default dynamic cache."
            )
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (columns, padding included), and the older part of the record.

        Raises:
            ValueError: a positive number.
            RuntimeError: more tokens than are recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative number.")
        remove = -tokens_to_remove
        if not self.has_previous_state[0]:
            return
        recorded = sum(segment.tokens for segment in self.segments)
        if remove > recorded:
            raise RuntimeError(
                f"crop({tokens_to_remove}) asks for more tokens than the {recorded} that are recorded: call "
                "cache.activate_past_recording() before the forward whose tokens may be taken back. (After a crop, the "
                f"last {TOKENS_KEPT_UNDOABLE} tokens stay recorded.)"
            )
        if self.counts_tokens:
            self.seen_tokens -= remove
        while remove:
            segment = self.segments.pop()
            if remove < segment.tokens:
                segment = segment.head(segment.tokens - remove)
                self.recurrent_states[0], self.conv_states[0] = segment.replay()
                self.segments.append(segment)
                remove = 0
            else:
                remove -= segment.tokens
                self.recurrent_states[0] = segment.state
                if segment.conv_inputs is not None:
                    self.conv_states[0] = segment.conv_inputs[:, : -segment.tokens]
                if segment.state is None:
                    self._forget()
        recorded = sum(segment.tokens for segment in self.segments)
        while self.segments and recorded - self.segments[0].tokens >= TOKENS_KEPT_UNDOABLE:
            recorded -= self.segments.pop(0).tokens

    def stop_recording(self) -> None:
        self.record_past = False
        self.segments.clear()

    def reset(self) -> None:
        self._forget()
        self.segments.clear()
        if self.static:
            self.seen_tokens.zero_()
        else:
            self.seen_tokens = 0

    def _forget(self) -> None:
        self.has_previous_state[0] = False
        for slot, initialized in (
            (self.conv_states, self.is_conv_states_initialized),
            (self.recurrent_states, self.is_recurrent_states_initialized),
        ):
            if self.static and initialized[0]:
                slot[0].zero_()
            else:
                slot[0], initialized[0] = None, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._apply(lambda x: x[indices.to(x.device) if isinstance(indices, torch.Tensor) else indices])

    def _apply(self, function) -> None:
        """Act on the batch dimension of everything that is stored."""
        for slot, initialized in (
            (self.conv_states, self.is_conv_states_initialized),
            (self.recurrent_states, self.is_recurrent_states_initialized),
        ):
            if initialized[0]:
                new = function(slot[0])
                if self.static and new.shape == slot[0].shape:
                    slot[0].copy_(new)
                else:
                    slot[0] = new
        for segment in self.segments:
            segment.apply(function)


def _at_fixed_address(x: torch.Tensor) -> torch.Tensor:
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
    return x


class _LengthOfRecurrentLayers:
    """What a cache answers about lengths when none of its layers attends (the library's raises)."""

    def get_seq_length(self, layer_idx: int = 0) -> int | torch.Tensor:
        """Tokens seen, padding included."""
        if any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            return super().get_seq_length(layer_idx)
        return self.layers[0].seen_tokens if self.layers else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        if any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            return super().get_mask_sizes(query_length, layer_idx)
        return self.get_seq_length() + query_length, 0


class RecurrentDynamicCache(_LengthOfRecurrentLayers, DynamicCache):
    """A DynamicCache whose layers are all recurrent."""


class RecurrentStaticCache(_LengthOfRecurrentLayers, StaticCache):
    """A StaticCache whose layers are all recurrent."""


def adopt(cache: Cache | None, config) -> None:
    """Make ``cache`` one that this model can use, in place: put a RecurrentLayer at every linear-attention layer.

    Raises:
        ValueError: the cache was made for another model, or a linear-attention layer of it is already in use by one. It
            is left as it was.
    """
    if cache is None:
        return
    kinds = config.layer_types[: config.num_hidden_layers]
    lazy = getattr(cache, "layer_class_to_replicate", None) is not None  # DynamicCache() without a config
    if "linear_attention" not in kinds and (lazy or not isinstance(cache, Cache)):
        return  # attention layers alone: the library's business
    if not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, which cannot hold recurrent states: pass a transformers Cache, "
            "such as DynamicCache(config=model.config)."
        )
    if lazy and cache.layers:
        raise ValueError(
            "past_key_values already holds keys and values for layers that have none (as PEFT's prefix tuning passes "
            "them): a linear-attention layer has a state instead. Pass an empty cache, and tune prompts or LoRA."
        )
    if lazy:
        cache.layers = DynamicCache(config=config).layers
        cache.layer_class_to_replicate = None
    if len(cache.layers) != len(kinds):
        raise ValueError(
            f"past_key_values has {len(cache.layers)} layers, but the model has {len(kinds)}: it was made for another "
            "model. Pass DynamicCache(config=model.config)."
        )
    static = any(isinstance(layer, StaticLayer) for layer in cache.layers) or isinstance(cache, StaticCache)
    attends = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    layers = list(cache.layers)
    for i, (layer, kind) in enumerate(zip(cache.layers, kinds)):
        if getattr(layer, "is_hybrid_linear", False) == (kind == "linear_attention"):
            continue
        if kind == "full_attention" and isinstance(layer, CacheLayerMixin):
            continue
        if kind == "full_attention" or type(layer) is not LinearAttentionLayer or _in_use(layer):
            raise ValueError(
                f"past_key_values has a {'used ' if _in_use(layer) else ''}{type(layer).__name__} at layer {i}, which is "
                f"a {kind} layer: it was made for another model. Pass DynamicCache(config=model.config). (If this is PEFT's "
                "prefix tuning: a linear-attention layer has no keys and values, so tune prompts or LoRA.)"
            )
        layers[i] = RecurrentLayer(static=static, counts_tokens=not attends)
        layers[i].record_past = layer.record_past
    cache.layers = layers
    if not attends:
        if type(cache) is DynamicCache:
            cache.__class__ = RecurrentDynamicCache
        elif type(cache) is StaticCache:
            cache.__class__ = RecurrentStaticCache


def _in_use(layer) -> bool:
    return getattr(layer, "is_initialized", False) or any(getattr(layer, "has_previous_state", {}).values())


def stop_recording(cache: Cache) -> None:
    """Drop what a used cache recorded for rollback. One that comes back from assisted decoding would grow for ever."""
    for layer in cache.layers:
        if getattr(layer, "is_hybrid_linear", False) and layer.has_previous_state[0]:
            layer.stop_recording()


def sizes_per_sequence(config) -> list[list[tuple[int, ...]]]:
    """For every layer the shapes of what a cache holds of one sequence: the state, and the convolution window if there is
    one; for an attention layer heads and width of the keys."""
    sizes = []
    for i, (layer, kind) in enumerate(zip(config.per_layer_config, config.layer_types)):
        if kind == "full_attention":
            sizes.append([(layer.num_key_value_heads, layer.head_dim)])
            continue
        dims = config.linear_dims(i)
        state = (dims.num_heads, dims.key_head_dim, dims.value_head_dim)
        sizes.append([state[2:] if config.mixers[i] == "hgrn" else state])
        if config.uses_short_conv(i):
            sizes[i].append((config.linear_conv_kernel_dim - 1, config.conv_dim(i)))
    return sizes


def refuse_other_sizes(cache: Cache, batch_size: int, sizes: list[list[tuple[int, ...]]]) -> None:
    """Raise, before a forward changes anything, where a used cache holds another batch or another model's tensors.

    Args:
        sizes: see ``sizes_per_sequence``.
    """
    for i, (layer, wanted) in enumerate(zip(cache.layers, sizes)):
        if getattr(layer, "is_hybrid_linear", False):
            tensors = [x for x in (layer.recurrent_states[0], layer.conv_states[0]) if x is not None]
            found = [tuple(x.shape[1:]) for x in tensors]
            same = found == wanted
        else:
            # Quantised layers keep their tensors elsewhere. Tensor parallelism leaves a share of the heads here.
            tensors = [x for x in [getattr(layer, "keys", None)] if x is not None and x.dim() == 4 and x.shape[2]]
            found = [(x.shape[1], x.shape[3]) for x in tensors]
            same = all(wanted[0][0] % heads == 0 and width == wanted[0][1] for heads, width in found)
        if not tensors:
            continue
        held = tensors[0].shape[0]
        if not same:
            raise ValueError(
                f"past_key_values holds tensors of sizes {found} per sequence at layer {i}, where this model has {wanted}: "
                "it was filled by another model. Pass DynamicCache(config=model.config)."
            )
        if held != batch_size:
            raise ValueError(
                f"past_key_values holds {held} sequences (layer {i}), but the batch has {batch_size}: pass a cache of this "
                "batch, or change it with batch_repeat_interleave or batch_select_indices."
            )


__all__ = [
    "RecurrentLayer",
    "Segment",
    "adopt",
    "conv_window",
    "refuse_other_sizes",
    "sizes_per_sequence",
    "stop_recording",
]
