"""The layers of a decode step: buffers at fixed addresses, and the launches of one token.

A layer takes over what a dynamic cache holds for it (``load``), computes a token for the whole batch from the step's hidden
states into them (``run``), and gives the cache what it would hold by then (``store``).
"""

from __future__ import annotations

from .mixers import Gla, Hgrn, Hgrn2, LinearAttention, RetNet, gate_bounds
from .triton_attention import attend, attention_splits
from .triton_kernels import linear_rows
from .triton_steps import delta_step, gated_step, vector_step


class LinearLayer:
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

    def moving(self) -> list:
        return [self.state] if self.window is None else [self.state, self.window]

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


class AttentionLayer:
    """A full-attention layer over a static key/value buffer."""

    def __init__(self, base, index, batch, max_len, zeros):
        attention = base.layers[index].self_attn
        config, dtype = attention.config, base.embed_tokens.weight.dtype
        self.heads, heads, width = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        self.keys, self.values = (zeros(batch, heads, max_len, width, dtype=dtype) for _ in range(2))
        self.partial = zeros(batch * self.heads * attention_splits(batch * self.heads, max_len), width + 2)
        self.weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        self.width, self.out_width = sum(w.shape[0] for w in self.weights), self.heads * width
        self.rotary = base.rotary_embs[base.rotary_index[index]]

    def load(self, held):
        length = held.keys.shape[2]
        self.keys[:, :, :length], self.values[:, :, :length] = held.keys, held.values

    def moving(self) -> list:
        return []

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


__all__ = ["AttentionLayer", "LinearLayer"]
