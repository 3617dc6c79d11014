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
from transformers.models.llama.modeling_llama import rotate_half

from .cache import Segment, conv_window
from .kernels import recurrence
from .layout import TokenLayout

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """float32 for 16-bit tensors; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
        taps = full_precision(self.weight)[:, 0].t()  # [kernel, C]
        wide = inputs.to(taps.dtype)
        if reset is None:
            y = wide[:, width:] * taps[width]
            for w in range(width):
                y = torch.addcmul(y, wide[:, w : w + T], taps[w])
            return y, inputs
        document = F.pad(reset.cumsum(1), (width, 0))
        y = wide[:, width:] * taps[width]
        for w in range(width):
            same = document[:, w : w + T] == document[:, width:]
            y = torch.addcmul(y, wide[:, w : w + T] * same[:, :, None], taps[w])
        return y, inputs


class LinearAttention(KeepsFloat32):
    """What all mixers do alike. ``layer_idx`` is the absolute index, attention layers counted."""

    # Projections that the short convolution sees, in the order of its channels. The last one is written (v).
    mixed = ("q_proj", "k_proj", "v_proj")

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

    def law_inputs(self, x, mixed, position_embeddings, lower_bounds):
        """q, k, v, log_decay, beta for the law (see ``recurrence.reference``) from x [B, T, d] and the ``mixed`` ones."""
        raise NotImplementedError

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
        if position_embeddings is not None:
            position_embeddings = tuple(layout.compact(p.expand(x.shape[0], -1, -1)) for p in position_embeddings)
        tokens = x.shape[1]
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        window, state = (None, None) if cache is None else cache.read(x.shape[0], self.layer_idx)

        mixed = [getattr(self, name)(x) for name in self.mixed]
        conv_inputs = None
        if self.conv1d is not None:
            widths = [part.shape[-1] for part in mixed]
            convolved, conv_inputs = self.conv1d(torch.cat(mixed, -1), window, layout.reset)
            mixed = convolved.split(widths, -1)
        q, k, v, log_decay, beta = self.law_inputs(x, mixed, position_embeddings, lower_bounds)
        o, new_state = recurrence(
            q, k, v, log_decay, beta, state, dtype=x.dtype, valid=layout.valid, reset=layout.reset
        )

        if cache is not None:
            segment = None
            if cache.record_past:
                segment = Segment(tokens, state, k, v, log_decay, beta, conv_inputs, layout.counts)
            window = None if conv_inputs is None else conv_window(conv_inputs, layout.lengths, tokens)
            cache.write(window, new_state, segment, tokens)
        return layout.restore(self.output(o, x))

    def output(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Norm per head, gate, projection. o is [B, T, H, V] in float32."""
        o = self.o_norm(o).flatten(2)
        if self.g_proj is not None:
            o = o * ACTIVATIONS[self.gate_activation](full_precision(self.g_proj(x)))
        return self.o_proj(o.to(x.dtype))


class Hgrn(LinearAttention):
    """HGRN (arXiv 2311.04823): f = sigmoid(W_f x) above a lower bound, h <- f h + (1 - f) silu(W_i x); no heads."""

    mixed = ("i_proj", "f_proj")

    def build(self, config):
        self.i_proj = self.project(self.value_width)
        self.f_proj = self.project(self.value_width)
        self.o_norm = HybridLinearRMSNorm(self.value_width, self.eps)

    def law_inputs(self, x, mixed, position_embeddings, lower_bounds):
        i, f = map(full_precision, mixed)
        log_f = bounded_log_sigmoid(f, lower_bounds, self.layer_idx)
        return None, None, F.silu(i) * -torch.expm1(log_f), log_f, None

    def output(self, o, x):
        return super().output(o[:, :, None], x)


class RetNet(LinearAttention):
    """RetNet's multi-scale retention (arXiv 2307.08621): one fixed decay per head, rotary queries and keys."""

    def build(self, config):
        build_grouped_qkv(self)
        self.o_norm = HybridLinearRMSNorm(self.value_width, self.eps)

    def law_inputs(self, x, mixed, position_embeddings, lower_bounds):
        q, k, v = grouped_qkv(self, mixed)
        cos, sin = (p[:, :, None] for p in position_embeddings)
        q, k = (full_precision(z) * cos + rotate_half(full_precision(z)) * sin for z in (q, k))
        heads = torch.arange(q.shape[2], device=q.device, dtype=q.dtype)
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

    def law_inputs(self, x, mixed, position_embeddings, lower_bounds):
        if self.conv1d is not None:
            mixed = [F.silu(part) for part in mixed]
        q, k, v = grouped_qkv(self, mixed)
        gate = self.heads(F.logsigmoid(full_precision(self.gk_proj(x))) / self.GATE_NORMALIZER, self.dims.num_key_heads)
        return q, k, v, repeat_heads(gate, q.shape[2]), None


class Hgrn2(LinearAttention):
    """HGRN2 (arXiv 2404.07904): the forget gate f, above a lower bound, is the decay, and 1 - f the key."""

    mixed = ("q_proj", "f_proj", "i_proj")
    NORM_EPS = 1e-5  # whatever rms_norm_eps says: fla's fused norm of this mixer never receives it

    def build(self, config):
        self.q_proj = self.project(self.dims.num_heads * self.key_width)
        self.f_proj = self.project(self.dims.num_heads * self.key_width)
        self.i_proj = self.project(self.dims.num_heads * self.value_width)
        self.o_norm = HybridLinearRMSNorm(self.dims.num_heads * self.value_width, self.NORM_EPS)

    def law_inputs(self, x, mixed, position_embeddings, lower_bounds):
        q, f, v = mixed
        log_f = bounded_log_sigmoid(full_precision(f), lower_bounds, self.layer_idx)
        parts = (F.silu(full_precision(q)), -torch.expm1(log_f), v, log_f)
        return *(self.heads(part, self.dims.num_heads) for part in parts), None

    def output(self, o, x):
        return self.o_proj(self.o_norm(o.flatten(2)).to(x.dtype))  # one norm over all heads, no gate


class DeltaNet(LinearAttention):
    """DeltaNet (arXiv 2406.06484): keys of length one, each write corrects what its key reads by a share beta."""

    def build(self, config):
        dims = self.dims
        self.max_beta = 2.0 if config.linear_allow_neg_eigval else 1.0
        self.q_proj = self.project(dims.num_query_heads * self.key_width)
        self.k_proj = self.project(dims.num_key_heads * self.key_width)
        self.v_proj = self.project(dims.num_value_heads * self.value_width)
        self.b_proj = self.project(dims.num_value_heads)
        self.o_norm = HybridLinearRMSNorm(self.value_width, self.eps)

    def law_inputs(self, x, mixed, position_embeddings, lower_bounds):
        q, k, v = (
            self.heads(F.silu(full_precision(part)), count) for part, count in zip(mixed, self.dims[:3], strict=True)
        )
        q, k = (repeat_heads(z * torch.rsqrt(z.square().sum(-1, keepdim=True) + 1e-6), v.shape[2]) for z in (q, k))
        beta = torch.sigmoid(full_precision(self.b_proj(x))) * self.max_beta
        return q, k, v, None, beta


class GatedDeltaNet(DeltaNet):
    """GatedDeltaNet (arXiv 2412.06464): DeltaNet with a decay per head before each write."""

    def build(self, config):
        super().build(config)
        self.a_proj = self.project(self.dims.num_value_heads)
        self.A_log = nn.Parameter(full_precision(torch.empty(self.dims.num_value_heads)))
        self.dt_bias = nn.Parameter(full_precision(torch.empty(self.dims.num_value_heads)))

    def law_inputs(self, x, mixed, position_embeddings, lower_bounds):
        q, k, v, _, beta = super().law_inputs(x, mixed, position_embeddings, lower_bounds)
        a = full_precision(self.a_proj(x))
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


def grouped_qkv(mixer: LinearAttention, mixed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v with one head count: key and value heads are repeated for the query heads that share them."""
    q, k, v = (mixer.heads(part, count) for part, count in zip(mixed, mixer.dims[:3], strict=True))
    return q, repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])


def repeat_heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[B, T, h, width] -> [B, T, count, width], each head repeated in place (head j comes from j // (count / h))."""
    return x if x.shape[2] == count else x.repeat_interleave(count // x.shape[2], dim=2)


def bounded_log_sigmoid(f: torch.Tensor, lower_bounds: torch.Tensor | None, layer_idx: int) -> torch.Tensor:
    """log(lb + (1 - lb) sigmoid(f)) in the log domain; layer 0, or no bounds: lb = 0.

    lb is the sum of rows 1 to layer_idx of softmax(lower_bounds, 0), over the rows of all layers (arXiv 2311.04823, 3.3).
    Each layer works it out from the parameter itself, so that checkpointing can recompute a layer on its own.
    """
    log_f = F.logsigmoid(f)
    if lower_bounds is None or layer_idx == 0:
        return log_f
    bound, rest = gate_bounds(lower_bounds.to(f.dtype), layer_idx)
    return torch.logaddexp(bound.log(), rest.log() + log_f)


def gate_bounds(lower_bounds: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The forget gate's lower bound of a layer, and one minus it (without the cancellation), each [H * K]."""
    share = full_precision(lower_bounds).softmax(0)
    return share[1 : layer_idx + 1].sum(0), share[0] + share[layer_idx + 1 :].sum(0)


__all__ = ["MIXER_CLASSES", "HybridLinearRMSNorm", "KeepsFloat32", "LinearAttention", "full_precision"]
