"""The six mixers. Each is: projections -> (short convolution) -> the law -> norm, gate, projection.

What they share, the order of things, padding, the cache, is in ``LinearAttention``; a mixer says which projections it
has, what it feeds the law, and how it normalises the output. A seventh is one class here and one row in the
configuration's ``MIXERS``. Formulas are those of flash-linear-attention 0.6, whose checkpoints load unchanged in value;
sources are named at each class.

Gates, decays, norms and the state are computed in float32 whatever the dtype of the weights (float64 in a float64 model).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .cache import Segment, conv_window
from .dense import dense
from .kernels import operations, recurrence
from .layout import TokenLayout
from .pointwise import full_precision


class KeepsFloat32(nn.Module):
    """A module whose own parameters and buffers stay in float32 when it is cast to 16 bits, as when it is loaded so.

    Decay parameters lose their meaning in bfloat16: exp(A_log) and rotary angles would be off by up to 0.4 %.
    """

    def _apply(self, fn, recurse=True):
        for child in self.children() if recurse else ():
            child._apply(fn)

        def keep(tensor):
            new = fn(tensor)
            narrowed = new.is_floating_point() and new.dtype.itemsize < tensor.dtype.itemsize and new.dtype.itemsize < 4
            return tensor.to(new.device, torch.float32) if narrowed else new

        return super()._apply(keep, recurse=False)


class HybridLinearRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 throughout, rounded once at the end."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = full_precision(x)  # written out: on the CPU torch's rms_norm takes twice as long forward and backward
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.to(wide.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


ONEDNN = torch.backends.mkldnn.is_available()  # without it torch's own convolution is slower than a tap at a time


class ShortConvolution(nn.Conv1d):
    """Causal depthwise convolution over time; the last tap is the current token. No bias, no activation."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, groups=channels, bias=False)

    def forward(
        self, x: torch.Tensor, window: torch.Tensor | None = None, reset: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: [B, T, C].
            window: [B, kernel - 1, C], the inputs before x; None for zeros.
            reset: [B, T] bool; no tap reaches back over a True.

        Returns:
            y [B, T, C] in float32 (float64 for float64), and the inputs it saw, [B, kernel - 1 + T, C].
        """
        B, T, C = x.shape
        width = self.kernel_size[0] - 1
        inputs = torch.cat((x.new_zeros(B, width, C) if window is None else window.to(x.dtype), x), 1)
        weight = full_precision(self.weight)
        wide = inputs.to(weight.dtype)
        plain = reset is None and T > 2 * width and wide.device.type == "cpu" and wide.dtype == torch.float32
        if plain and ONEDNN:
            # One pass by oneDNN, to which tokens are the pixels of an image one row high, channels last; a tap at a time
            # takes a pass each. (It has no float64, and elsewhere TF32 might be let in, as autocast would let in bfloat16.)
            with torch.autocast("cpu", enabled=False):
                y = F.conv2d(wide.transpose(1, 2).unsqueeze(2), weight.unsqueeze(2), groups=C)
            return y.squeeze(2).transpose(1, 2), inputs
        taps = weight[:, 0].t()  # [kernel, C]
        document = None if reset is None else F.pad(reset.cumsum(1), (width, 0))
        y = wide[:, width:] * taps[width]
        for w in range(width):
            past = wide[:, w : w + T]
            if document is not None:
                past = past * (document[:, w : w + T] == document[:, width:])[:, :, None]
            y = torch.addcmul(y, past, taps[w])
        return y, inputs


class LinearAttention(KeepsFloat32):
    """What all mixers do alike. ``layer_idx`` is the absolute index, attention layers counted."""

    # Projections of the input, in groups that one operation consumes together (see ``pointwise.project``). The short
    # convolution, where there is one, sees the projections named in ``mixed``, in the order of its channels.
    groups: tuple[tuple[str, ...], ...]
    mixed = ("q_proj", "k_proj", "v_proj")
    activates_mixed = False  # whether silu stays where the configuration leaves the convolution out

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.dims = dims = config.linear_dims(layer_idx)
        self.hidden_size = config.hidden_size
        self.eps = config.rms_norm_eps
        self.key_width, self.value_width = dims.key_head_dim, dims.value_head_dim
        self.conv1d = None
        if config.uses_short_conv(layer_idx):
            self.conv1d = ShortConvolution(config.conv_dim(layer_idx), config.linear_conv_kernel_dim)
        self.gate_activation = config.linear_output_gate_act
        self.build(config)
        if config.uses_output_gate(layer_idx):
            self.g_proj = self.project(dims.num_heads * dims.value_head_dim)
        else:
            self.g_proj = None
        self.o_proj = nn.Linear(dims.num_heads * dims.value_head_dim, config.hidden_size, bias=False)

    def project(self, width: int) -> nn.Linear:
        return nn.Linear(self.hidden_size, width, bias=False)

    def build(self, config) -> None:
        """Make the mixer's own projections, and ``o_norm``."""
        raise NotImplementedError

    def law_inputs(self, ops, parts, position_embeddings, lower_bounds):
        """q, k, v, log_decay, beta for the law (see ``recurrence.reference``).

        Args:
            ops: ``pointwise`` or ``fused``.
            parts: what ``ops.project`` made of ``groups``; the group of ``mixed`` has passed the convolution, by head.
        """
        raise NotImplementedError

    def conv_heads(self) -> list[tuple[int, int, str]]:
        """(heads, width, what follows the convolution) of each projection in ``mixed``."""
        widths = (self.key_width, self.key_width, self.value_width)
        return [(count, width, "silu") for count, width in zip(self.dims[:3], widths)]

    def heads(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """[B, T, count * width] -> [B, T, count, width]."""
        return x.unflatten(-1, (count, -1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values=None,
        layout: TokenLayout | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        lower_bounds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: [B, T, d], normed.
            past_key_values: a cache that ``cache.adopt`` has seen, or None.
            layout: padding and packing.
            position_embeddings: cos and sin [B, T, K], for RetNet.
            lower_bounds: [layers, H * K], the model's parameter, for HGRN and HGRN2.
        """
        layout = layout or TokenLayout()
        x = layout.compact(hidden_states)
        if position_embeddings is not None and layout.order is not None:
            position_embeddings = tuple(layout.compact(p.expand(x.shape[0], -1, -1)) for p in position_embeddings)
        tokens = x.shape[1]
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        window, state = (None, None) if cache is None else cache.read(x.shape[0], self.layer_idx)
        ops = operations(x)

        names = self.groups if self.g_proj is None else (*self.groups, ("g_proj",))
        parts = ops.project(x, *(tuple(map(self.get_submodule, group)) for group in names))
        gate = None if self.g_proj is None else parts.pop()
        conv_inputs = None
        if self.conv1d is not None or self.activates_mixed:
            parts[0], conv_inputs = ops.short_convolution(
                *(parts[0], self.conv1d, self.conv_heads(), window, layout), keep_inputs=cache is not None
            )
        q, k, v, log_decay, beta = self.law_inputs(ops, parts, position_embeddings, lower_bounds)
        o, new_state = recurrence(
            *(q, k, v, log_decay, beta, state),
            dtype=ops.compute_dtype(x),
            valid=layout.valid,
            reset=layout.reset,
            boundaries=layout.boundaries,
            final=cache is not None,
        )

        if cache is not None:
            segment = None
            if cache.record_past:
                segment = Segment(tokens, state, k, v, log_decay, beta, conv_inputs, layout.counts)
            window = None if conv_inputs is None else conv_window(conv_inputs, layout.lengths, tokens)
            cache.write(window, new_state, segment, tokens)
        return layout.restore(dense(self.o_proj, self.output(ops, o, ops.compute_dtype(x), gate)))

    def output(self, ops, o: torch.Tensor, dtype: torch.dtype, gate: torch.Tensor | None) -> torch.Tensor:
        """[B, T, H * V] for the last projection, from what the law read, [B, T, H, V]: norm per head, gate."""
        return ops.output_norm(self.o_norm, o, dtype, gate, self.gate_activation)


class Hgrn(LinearAttention):
    """HGRN (arXiv 2311.04823): f = sigmoid(W_f x) above a lower bound, h <- f h + (1 - f) silu(W_i x); no heads."""

    mixed = ("i_proj", "f_proj")
    groups = (mixed,)

    def build(self, config):
        self.i_proj = self.project(self.value_width)
        self.f_proj = self.project(self.value_width)
        self.o_norm = HybridLinearRMSNorm(self.value_width, self.eps)

    def conv_heads(self):
        return [(1, self.value_width, "nothing")] * 2

    def law_inputs(self, ops, parts, position_embeddings, lower_bounds):
        log_f, v = ops.forget_gate(parts[0], gate_bounds(lower_bounds, self.layer_idx), form="input")
        return None, None, v, log_f, None

    def output(self, ops, o, dtype, gate):
        return super().output(ops, o[:, :, None], dtype, gate)


class RetNet(LinearAttention):
    """RetNet's multi-scale retention (arXiv 2307.08621): one fixed decay per head, rotary queries and keys."""

    groups = (("q_proj", "k_proj"), ("v_proj",))

    def build(self, config):
        build_grouped_qkv(self)
        self.o_norm = HybridLinearRMSNorm(self.value_width, self.eps)

    def law_inputs(self, ops, parts, position_embeddings, lower_bounds):
        q, k = ops.rotate(parts[0], *position_embeddings, self.dims[:2])
        q, k, v = same_heads(q, k, self.heads(parts[1], self.dims.num_value_heads))
        heads = torch.arange(q.shape[2], device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
        log_gamma = torch.log1p(-torch.exp2(-5.0 - heads))
        return q, k, v, log_gamma.expand(*q.shape[:2], -1), None


class Gla(LinearAttention):
    """Gated linear attention (arXiv 2312.06635): a low-rank gate per key channel, logsigmoid / 16."""

    GATE_RANK = 16
    GATE_NORMALIZER = 16

    def build(self, config):
        build_grouped_qkv(self)
        self.gk_proj = nn.Sequential(
            self.project(self.GATE_RANK),
            nn.Linear(self.GATE_RANK, self.dims.num_key_heads * self.key_width, bias=True),
        )
        self.o_norm = HybridLinearRMSNorm(self.value_width, self.eps)

    @property
    def groups(self):
        mixed = [self.mixed] if self.conv1d is not None else [(name,) for name in self.mixed]
        return (*mixed, ("gk_proj.0",))

    def law_inputs(self, ops, parts, position_embeddings, lower_bounds):
        *mixed, rank = parts
        q, k, v = mixed[0] if self.conv1d is not None else map(self.heads, mixed, self.dims[:3])
        (gate,) = ops.forget_gate(rank, scale=1 / self.GATE_NORMALIZER, through=self.gk_proj[1])
        q, k, v = same_heads(q, k, v)
        return q, k, v, repeat_heads(self.heads(gate, self.dims.num_key_heads), q.shape[2]), None


class Hgrn2(LinearAttention):
    """HGRN2 (arXiv 2404.07904): the forget gate f, above a lower bound, is the decay, and 1 - f the key."""

    mixed = ("q_proj", "f_proj", "i_proj")
    NORM_EPS = 1e-5  # whatever rms_norm_eps says: fla's fused norm of this mixer never receives it

    def build(self, config):
        self.q_proj = self.project(self.dims.num_heads * self.key_width)
        self.f_proj = self.project(self.dims.num_heads * self.key_width)
        self.i_proj = self.project(self.dims.num_heads * self.value_width)
        self.o_norm = HybridLinearRMSNorm(self.dims.num_heads * self.value_width, self.NORM_EPS)

    @property
    def groups(self):
        return (self.mixed[:2], self.mixed[2:]) if self.conv1d is None else (self.mixed,)

    def conv_heads(self):
        widths = (self.key_width, self.key_width, self.value_width)
        return [(1, self.dims.num_heads * width, "nothing") for width in widths]

    def law_inputs(self, ops, parts, position_embeddings, lower_bounds):
        qf, v = parts if self.conv1d is None else (parts[0][:2], parts[0][2].flatten(2))
        log_f, q, k = ops.forget_gate(qf, gate_bounds(lower_bounds, self.layer_idx), form="key")
        return *(self.heads(part, self.dims.num_heads) for part in (q, k, v, log_f)), None

    def output(self, ops, o, dtype, gate):
        return super().output(ops, o.flatten(2)[:, :, None], dtype, gate)  # one norm over all heads, no gate


class DeltaNet(LinearAttention):
    """DeltaNet (arXiv 2406.06484): keys of length one, each write corrects what its key reads by a share beta."""

    groups = (LinearAttention.mixed, ("b_proj",))
    activates_mixed = True

    def build(self, config):
        dims = self.dims
        self.max_beta = 2.0 if config.linear_allow_neg_eigval else 1.0
        self.q_proj = self.project(dims.num_query_heads * self.key_width)
        self.k_proj = self.project(dims.num_key_heads * self.key_width)
        self.v_proj = self.project(dims.num_value_heads * self.value_width)
        self.b_proj = self.project(dims.num_value_heads)
        self.o_norm = HybridLinearRMSNorm(self.value_width, self.eps)

    def conv_heads(self):
        (q, k, v) = super().conv_heads()
        return [(*q[:2], "unit"), (*k[:2], "unit"), v]

    def law_inputs(self, ops, parts, position_embeddings, lower_bounds):
        beta = torch.sigmoid(full_precision(parts[1])) * self.max_beta
        return *same_heads(*parts[0]), None, beta


class GatedDeltaNet(DeltaNet):
    """GatedDeltaNet (arXiv 2412.06464): DeltaNet with a decay per head before each write."""

    groups = (LinearAttention.mixed, ("b_proj", "a_proj"))

    def build(self, config):
        super().build(config)
        self.a_proj = self.project(self.dims.num_value_heads)
        self.A_log = nn.Parameter(full_precision(torch.empty(self.dims.num_value_heads)))
        self.dt_bias = nn.Parameter(full_precision(torch.empty(self.dims.num_value_heads)))

    def law_inputs(self, ops, parts, position_embeddings, lower_bounds):
        b, a = ops.members(parts[1], [self.dims.num_value_heads] * 2)
        q, k, v, _, beta = super().law_inputs(ops, (parts[0], b), position_embeddings, lower_bounds)
        a = full_precision(a)
        rate, dt_bias = self.A_log.to(a.dtype).exp(), self.dt_bias.to(a.dtype)
        return q, k, v, -rate * F.softplus(a + dt_bias), beta

    def init_decay(self) -> None:
        """Decay rates A uniform in (0, 16), step sizes log-uniform in (0.001, 0.1), as Mamba-2 and fla start them."""
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(0, 16).log())
        low, high = math.log(1e-3), math.log(1e-1)
        step = torch.empty_like(self.dt_bias).uniform_(low, high).exp().clamp(min=1e-4)
        init.copy_(self.dt_bias, step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


MIXER_CLASSES = {
    "hgrn": Hgrn,
    "retnet": RetNet,
    "gla": Gla,
    "hgrn2": Hgrn2,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
}


def build_grouped_qkv(mixer: LinearAttention) -> None:
    dims = mixer.dims
    mixer.q_proj = mixer.project(dims.num_query_heads * dims.key_head_dim)
    mixer.k_proj = mixer.project(dims.num_key_heads * dims.key_head_dim)
    mixer.v_proj = mixer.project(dims.num_value_heads * dims.value_head_dim)


def same_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, T, heads, width] with one head count: heads that several of another kind share are repeated for them."""
    count = max(x.shape[2] for x in (q, k, v))
    return repeat_heads(q, count), repeat_heads(k, count), repeat_heads(v, count)


def repeat_heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[B, T, h, width] -> [B, T, count, width], each head repeated in place (head j comes from j // (count / h))."""
    return x if x.shape[2] == count else x.repeat_interleave(count // x.shape[2], dim=2)


def gate_bounds(lower_bounds: torch.Tensor | None, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The forget gate's lower bound of a layer, and one minus it (without the cancellation), each [H * K].

    The bound is the sum of rows 1 to layer_idx of softmax(lower_bounds, 0), over the rows of all layers
    (arXiv 2311.04823, 3.3); None, for no bound, at layer 0 or without the parameter. Each layer works it out from the
    parameter itself, so that checkpointing can recompute a layer on its own.
    """
    if lower_bounds is None or layer_idx == 0:
        return None
    share = full_precision(lower_bounds).softmax(0)
    return share[1 : layer_idx + 1].sum(0), share[0] + share[layer_idx + 1 :].sum(0)


__all__ = ["MIXER_CLASSES", "HybridLinearRMSNorm", "KeepsFloat32", "LinearAttention"]
