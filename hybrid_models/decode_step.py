"""One token for a whole batch, as a fixed list of Triton launches that a CUDA graph replays.

generate() opens a session around the library's own sampling loop: the prompt goes through the model as always, into a
dynamic cache; the session copies that into buffers at fixed addresses, and every further token is one replay of the
graph. At the end what a caller may see, a returned or a user's cache, is copied back. Tokens, scores, processors and
streamers are the library's business, unchanged.

The first token after a session opens runs without a graph, which compiles the kernels; the second one is captured. Steps
are kept per model and shape (see ``MAX_STEPS``) and given back with the model, or by ``release``.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from .mixers import Gla, Hgrn, Hgrn2, HybridLinearRMSNorm, LinearAttention, RetNet, ShortConvolution, gate_bounds
from .triton_attention import attend
from .triton_kernels import FEW_ROWS, linear_rows, triton
from .triton_steps import delta_step, gated_step, vector_step

MAX_STEPS = 2  # shapes (batch, length) whose buffers and graph are kept, the least recently used goes first
MAX_EOS = 8  # end-of-sequence ids that greedy search on the device knows
STEPS_BETWEEN_CHECKS = 16
_PLAIN = (nn.Linear, nn.Embedding, HybridLinearRMSNorm, ShortConvolution)
SPLITS = 16  # shares of the keys per head; a power of two


class DecodeStep:
    """Buffers, launches and graph for ``batch`` rows of at most ``max_len`` columns.

    Attributes:
        ids, positions: [batch] int64, the step's inputs; valid: [batch, max_len] bool; length: columns so far.
        logits: [batch, vocab], the step's output, in the model's dtype.
    """

    def __init__(self, model: nn.Module, batch: int, max_len: int):
        self.model, self.batch, self.max_len = model, batch, max_len
        config, weight = model.config, model.lm_head.weight
        device, dtype = weight.device, weight.dtype

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.ids, self.positions = zeros(batch, dtype=torch.long), zeros(batch, dtype=torch.long)
        self.length, self.valid = zeros((), dtype=torch.long), zeros(batch, max_len, dtype=torch.bool)
        self.h, self.logits = zeros(batch, config.hidden_size, dtype=dtype), zeros(batch, weight.shape[0], dtype=dtype)
        self.act = zeros(batch, config.intermediate_size, dtype=dtype if batch > FEW_ROWS else torch.float32)
        self.layers = [
            (_LinearLayer if hasattr(layer, "linear_attn") else _AttentionLayer)(model.model, i, batch, max_len, zeros)
            for i, layer in enumerate(model.model.layers)
        ]
        self.y = zeros(batch, max(layer.width for layer in self.layers))
        self.o = zeros(batch, max(layer.out_width for layer in self.layers))
        self.graphs: dict = {}  # function: its graph, or None after the first, eager run
        # For greedy search that stays on the device: the tokens, how many, who has finished, and what ends a row.
        self.tokens, self.produced = zeros(batch, max_len, dtype=torch.long), zeros(1, dtype=torch.long)
        self.finished = zeros(batch, dtype=torch.bool)
        self.eos, self.pad = zeros(MAX_EOS, dtype=torch.long), zeros((), dtype=torch.long)
        self.pointers = _pointers(model)

    def load(self, cache, mask: torch.Tensor | None) -> None:
        """Take over what a dynamic cache holds. mask: [batch, columns] of the prompt, or None."""
        self.length.fill_(cache.get_seq_length())
        self.valid.fill_(True)
        if mask is not None:
            self.valid[:, : mask.shape[1]] = mask.bool()
        for layer, held in zip(self.layers, cache.layers, strict=True):
            layer.load(held)

    def store(self, cache, tokens: int) -> None:
        """Give the dynamic cache what it would hold after the ``tokens`` that this step computed for it."""
        for layer, held in zip(self.layers, cache.layers, strict=True):
            layer.store(held, int(self.length), tokens)

    def run(self) -> None:
        """The launches of one token."""
        self.h.copy_(self.model.model.embed_tokens.weight[self.ids])
        for block, layer in zip(self.model.model.layers, self.layers, strict=True):
            layer.run(self, block)
            norm, mlp = block.post_attention_layernorm, block.mlp
            weights = [mlp.gate_proj.weight, mlp.up_proj.weight]
            linear_rows(self.h, weights, self.act, norm=norm.weight, eps=norm.eps, swiglu=True)
            linear_rows(self.act, [mlp.down_proj.weight], self.h, residual=True)
        norm = self.model.model.norm
        linear_rows(self.h, [self.model.lm_head.weight], self.logits, norm=norm.weight, eps=norm.eps)
        self.length.add_(1)

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [batch, vocab] after one more token per row; valid until the next call."""
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self._replay(self.run)
        return self.logits

    def run_greedy(self) -> None:
        """One token of greedy search: the model on ``ids``, and the best next ones into ``ids`` and ``tokens``."""
        self.run()
        best = torch.where(self.finished, self.pad, self.logits.float().argmax(-1))
        self.tokens.index_copy_(1, self.produced, best[:, None])
        self.finished.logical_or_((best[:, None] == self.eos).any(1))
        self.ids.copy_(best)
        self.positions.add_(1)
        self.produced.add_(1)

    def greedy(
        self, first: torch.Tensor, positions: torch.Tensor, limit: int, eos: torch.Tensor | None, pad
    ) -> torch.Tensor:
        """Tokens [batch, n], n <= limit, of greedy search that begins with ``first`` [batch].

        Args:
            positions: [batch] rotary positions of ``first``.
            eos: token ids that end a row, or None; pad: what a finished row goes on with.
        """
        self.ids.copy_(first)
        self.positions.copy_(positions)
        self.eos.fill_(-1)
        if eos is not None:
            self.eos[: len(eos)] = eos
            self.pad.copy_(pad)
        self.tokens[:, 0] = first
        self.produced.fill_(1)
        self.finished.copy_((first[:, None] == self.eos).any(1))
        done = 1
        while done < limit and not (eos is not None and bool(self.finished.all())):
            # Asking the device whether all rows have finished waits for it; so only once in a while.
            block = min(STEPS_BETWEEN_CHECKS, limit - done)
            for _ in range(block):
                self._replay(self.run_greedy)
            done += block
        tokens = self.tokens[:, :done].clone()
        if eos is None:
            return tokens
        ended = (tokens[:, :, None] == self.eos).any(2).int().cummax(1).values.bool().all(0)
        return tokens[:, : int(ended.int().argmax()) + 1] if bool(ended.any()) else tokens

    def _replay(self, function) -> None:
        key = function.__name__
        if not self.ids.is_cuda or key not in self.graphs:
            function()  # the first time compiles kernels, which must not happen during a capture
            self.graphs[key] = None
            return
        if self.graphs[key] is None:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                function()
            self.graphs[key] = graph
        self.graphs[key].replay()


class _LinearLayer:
    """A recurrent layer: projections and convolution, the law, output."""

    def __init__(self, base, index, batch, max_len, zeros):
        mixer: LinearAttention = base.layers[index].linear_attn
        self.mixer, dims = mixer, mixer.dims
        self.index, self.base = index, base
        vector = isinstance(mixer, Hgrn)
        self.state = zeros(
            batch, *((mixer.value_width,) if vector else (dims.num_heads, mixer.key_width, mixer.value_width))
        )
        self.window = None
        if mixer.conv1d is not None:
            conv = mixer.conv1d
            dtype = base.embed_tokens.weight.dtype
            self.window = zeros(batch, conv.kernel_size[0] - 1, conv.in_channels, dtype=dtype)
        names = list(mixer.mixed)
        names += [name for name in ("b_proj", "a_proj", "g_proj") if getattr(mixer, name, None) is not None]
        projections = [getattr(mixer, name) for name in names]
        if isinstance(mixer, Gla):
            names.insert(3, "low")
            projections.insert(3, mixer.gk_proj[0])
        self.weights = [projection.weight for projection in projections]
        starts, self.width = {}, 0
        for name, weight in zip(names, self.weights, strict=True):
            starts[name], self.width = self.width, self.width + weight.shape[0]
        self.starts = starts
        self.out_width = dims.num_heads * mixer.value_width
        self.bounds = None
        if isinstance(mixer, (Hgrn, Hgrn2)) and base.lower_bounds is not None and index > 0:
            self.bounds = [zeros(base.lower_bounds.shape[1]) for _ in range(2)]

    def load(self, held):
        self.state.copy_(held.recurrent_states[0])
        if self.window is not None:
            self.window.copy_(held.conv_states[0])
        if self.bounds is not None:
            for mine, now in zip(self.bounds, gate_bounds(self.base.lower_bounds, self.index), strict=True):
                mine.copy_(now)

    def store(self, held, length, tokens):
        held.recurrent_states[0] = self.state.clone()
        if self.window is not None:
            held.conv_states[0] = self.window.clone()
        if held.counts_tokens:
            held.seen_tokens += tokens

    def run(self, step, block):
        mixer, at = self.mixer, self.starts
        norm = block.input_layernorm
        taps = None if mixer.conv1d is None else mixer.conv1d.weight
        linear_rows(step.h, self.weights, step.y, norm=norm.weight, eps=norm.eps, window=self.window, taps=taps)
        bound, rest = self.bounds or (None, None)
        if isinstance(mixer, Hgrn):
            vector_step(step.y, self.state, step.o, bound, rest)
        elif isinstance(mixer, Hgrn2):
            columns = (at["q_proj"], at["f_proj"], at["i_proj"])
            gated_step(step.y, self.state, step.o, "hgrn2", mixer.dims, columns, bound, rest, bounded=bound is not None)
        elif isinstance(mixer, RetNet):
            columns = (at["q_proj"], at["k_proj"], at["v_proj"])
            rotary = self.base.rotary_embs[self.base.rotary_index[self.index]]
            gated_step(
                step.y, self.state, step.o, "retnet", mixer.dims, columns, rotary.inv_freq, position=step.positions
            )
        elif isinstance(mixer, Gla):
            columns = (at["q_proj"], at["k_proj"], at["v_proj"], at["low"])
            up = mixer.gk_proj[1]
            silu = mixer.conv1d is not None
            gated_step(step.y, self.state, step.o, "gla", mixer.dims, columns, up.weight, up.bias, silu=silu)
        else:
            columns = [at[name] for name in ("q_proj", "k_proj", "v_proj", "b_proj", "a_proj") if name in at]
            a_log, dt_bias = getattr(mixer, "A_log", None), getattr(mixer, "dt_bias", None)
            delta_step(step.y, self.state, step.o, mixer.dims.num_key_heads, columns, mixer.max_beta, a_log, dt_bias)
        gate = None
        if mixer.g_proj is not None:
            gate = step.y[:, at["g_proj"] : at["g_proj"] + self.out_width]
        o_norm = mixer.o_norm
        linear_rows(
            step.o[:, : self.out_width],
            [mixer.o_proj.weight],
            step.h,
            norm=o_norm.weight,
            eps=o_norm.eps,
            head=0 if o_norm.weight.shape[0] == self.out_width else o_norm.weight.shape[0],
            gate=gate,
            gate_act=mixer.gate_activation,
            residual=True,
        )


class _AttentionLayer:
    """A full-attention layer over a static key/value buffer."""

    def __init__(self, base, index, batch, max_len, zeros):
        attention = base.layers[index].self_attn
        config, dtype = attention.config, base.embed_tokens.weight.dtype
        self.heads, heads, width = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        self.keys, self.values = (zeros(batch, heads, max_len, width, dtype=dtype) for _ in range(2))
        self.partial = zeros(batch * self.heads * SPLITS, width + 2)
        self.weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        self.width, self.out_width = sum(w.shape[0] for w in self.weights), self.heads * width
        self.rotary = base.rotary_embs[base.rotary_index[index]]

    def load(self, held):
        length = held.keys.shape[2]
        self.keys[:, :, :length], self.values[:, :, :length] = held.keys, held.values

    def store(self, held, length, tokens):
        held.keys, held.values = self.keys[:, :, :length].clone(), self.values[:, :, :length].clone()

    def run(self, step, block):
        norm = block.input_layernorm
        linear_rows(step.h, self.weights, step.y, norm=norm.weight, eps=norm.eps)
        attend(
            step.y,
            self.keys,
            self.values,
            step.valid,
            step.length,
            step.positions,
            self.rotary.inv_freq,
            self.partial,
            step.o,
            self.heads,
            self.rotary.attention_scaling,
        )
        linear_rows(step.o[:, : self.out_width], [block.self_attn.o_proj.weight], step.h, residual=True)


# ------------------------------------------------------------------------------------------------------------- sessions


class _Session:
    """A step at work on one cache during one generate()."""

    def __init__(self, step: DecodeStep, model: nn.Module, cache):
        self.step, self.model, self.cache, self.tokens = step, model, cache, 0
        self.prefilling = False  # a prompt, or a chunk of one, may be a single token too, and it may be padding

    def serves(self, model, input_ids, cache) -> bool:
        if self.prefilling or model is not self.model or cache is not self.cache:
            return False
        return input_ids is not None and input_ids.shape[1] == 1

    def greedy(self, first, positions, attention_mask, limit, eos, pad) -> torch.Tensor:
        """As ``DecodeStep.greedy``; attention_mask [batch, columns of the prompt] or None."""
        self.step.load(self.cache, attention_mask)
        self.tokens += 1
        return self.step.greedy(first, positions, limit, eos, pad)

    def __call__(self, input_ids, position_ids, attention_mask) -> torch.Tensor:
        """Logits [batch, 1, vocab]."""
        if not self.tokens:
            self.step.load(self.cache, None if attention_mask is None else attention_mask[:, :-1])
        self.tokens += 1
        return self.step(input_ids[:, 0], position_ids[:, -1].expand(self.step.batch))[:, None]


@contextmanager
def prefilling():
    """Inside, forwards are a prompt's and take the plain path."""
    current = _session.get()
    if current is None:
        yield
        return
    current.prefilling = True
    try:
        yield
    finally:
        current.prefilling = False


_session: ContextVar[_Session | None] = ContextVar("hybrid_linear_decode_session", default=None)
_steps: weakref.WeakKeyDictionary[nn.Module, OrderedDict] = weakref.WeakKeyDictionary()


def active_session() -> _Session | None:
    return None if torch.compiler.is_compiling() else _session.get()


@contextmanager
def session(model: nn.Module, cache, batch: int, max_length: int, keep_cache: bool):
    """Serve one-token forwards of ``model`` on ``cache`` by a DecodeStep inside the ``with`` block.

    Args:
        max_length: columns that the cache may come to hold.
        keep_cache: leave ``cache`` as if the model itself had run; otherwise it is left as it was after the prompt.
    """
    current = _Session(_step_for(model, batch, max_length), model, cache)
    token = _session.set(current)
    try:
        yield current
    finally:
        _session.reset(token)
        if keep_cache and current.tokens:
            current.step.store(cache, current.tokens)


def _step_for(model: nn.Module, batch: int, max_length: int) -> DecodeStep:
    # Rounded up, so that calls of about the same length share a graph.
    grain = 256 if max_length <= 2048 else 2048
    max_len = -(-max_length // grain) * grain
    steps = _steps.setdefault(model, OrderedDict())
    for key in [key for key, step in steps.items() if step.pointers != _pointers(model)]:
        del steps[key]  # the weights moved
    step = steps.pop((batch, max_len), None)
    if step is None:
        while len(steps) >= MAX_STEPS:
            steps.popitem(last=False)
        step = DecodeStep(_Weak(model), batch, max_len)
    steps[batch, max_len] = step
    return step


class _Weak:
    """The model as a step sees it: a weak reference, or the model would be kept alive by its own steps."""

    def __init__(self, model):
        self._model = weakref.ref(model)

    def __getattr__(self, name):
        return getattr(self._model(), name)


def release(model: nn.Module) -> None:
    """Free the buffers and graphs that generate() kept for ``model``."""
    _steps.pop(model, None)


def _pointers(model) -> tuple[int, ...]:
    return tuple(parameter.data_ptr() for parameter in model.parameters())


def why_not(model: nn.Module, batch: int = 1, max_length: int = 0) -> str | None:
    """Why this model's decode step cannot be captured, or None if it can.

    Args:
        batch, max_length: rows and columns to reserve; by default the memory is not looked at.
    """
    weight = model.lm_head.weight
    if triton is None:
        return "Triton is not installed"
    if weight.device.type != "cuda":
        return f"the model is on {weight.device.type}"
    free, _ = torch.cuda.mem_get_info(weight.device)
    free += torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
    wanted = batch * max_length * model.config.kv_bytes_per_token(weight.element_size())
    if wanted > free // 2:  # the prompt's own cache is there at the same time
        return f"buffers for {batch} x {max_length} tokens take {wanted / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free"
    return why_not_shape(model)


def why_not_shape(model: nn.Module) -> str | None:
    """As ``why_not``, leaving the device aside."""
    if model.lm_head.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the weights are {model.lm_head.weight.dtype}"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is spread over several devices"
    if torch.is_autocast_enabled(model.lm_head.weight.device.type):
        return "autocast is on"
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            return f"{name} is offloaded"
        # The step reads weights past their modules, so none of these may do more than its plain class does.
        if not module._modules and module._parameters and type(module) not in _PLAIN:
            return f"{name} is a {type(module).__name__}, not a plain layer (merge the adapter, or dequantise)"
        if type(module).__module__.startswith("peft"):
            return f"{name} carries an adapter: merge it first"
        if isinstance(module, nn.Linear) and not module.weight.is_contiguous():
            return f"{name}.weight is not contiguous"
    config = model.config
    for i, (layer, kind) in enumerate(zip(config.per_layer_config, config.layer_types)):
        if kind == "full_attention" and (layer.attention_bias or layer.sliding_window):
            return f"layer {i} has attention biases or a sliding window"
        dims = config.linear_dims(i)
        per_head_norm = kind == "linear_attention" and config.mixers[i] not in ("hgrn", "hgrn2")
        if per_head_norm and triton.next_power_of_2(dims.value_head_dim) != dims.value_head_dim:
            return f"layer {i} has value heads of {dims.value_head_dim}, not a power of two"
    return None


__all__ = ["DecodeStep", "active_session", "prefilling", "release", "session", "why_not"]
