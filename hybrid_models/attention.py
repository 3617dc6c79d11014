"""Full attention and rotary positions, through transformers' attention interface and rope types."""

from __future__ import annotations

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .configuration_hybrid_linear import HybridLinearConfig
from .dense import dense
from .kernels import operations
from .mixers import KeepsFloat32


class RotaryPositions(KeepsFloat32):
    """cos and sin [1 or B, T, head_dim] of ``position_ids``, in float32 (float64 in a float64 model).

    Args:
        rope_parameters: transformers' dictionary; any of its rope types.
        head_dim: channels that are turned, in pairs j and j + head_dim / 2.
    """

    def __init__(self, config: HybridLinearConfig, rope_parameters: dict, head_dim: int):
        super().__init__()
        self.rope_parameters, self.head_dim = dict(rope_parameters), head_dim
        self.rope_type = self.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        if self.rope_type != "default":  # the library's functions read the configuration of a whole model
            self.config = type(config)(
                hidden_size=head_dim,
                num_attention_heads=1,
                rope_parameters=self.rope_parameters,
                max_position_embeddings=config.max_position_embeddings,
            )
        inv_freq, self.attention_scaling = self.initial_frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def initial_frequencies(self) -> tuple[torch.Tensor, float]:
        if self.rope_type != "default":
            return ROPE_INIT_FUNCTIONS[self.rope_type](self.config)
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        return 1.0 / self.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        half = position_ids[..., None].to(dtype) * self.inv_freq.to(device=x.device, dtype=dtype)
        angles = torch.cat((half, half), -1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


class HybridLinearAttention(nn.Module):
    """Causal softmax attention with rotary positions, through transformers' attention interface.

    ``config`` is the layer's own (``per_layer_config``): layers may differ in heads, biases, window and rotary base.
    """

    def __init__(self, config: HybridLinearConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.sliding_window
        self.is_causal = True
        query_width, key_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ops = operations(hidden_states)
        qk, v = ops.project(hidden_states, (self.q_proj, self.k_proj), (self.v_proj,))
        q, k = ops.rotate(qk, *position_embeddings, (self.config.num_attention_heads, self.config.num_key_value_heads))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v.unflatten(-1, (-1, self.head_dim))))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        # The implementation may be switched on the model's config after construction, which the layer's config shares.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        o, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return dense(self.o_proj, o.flatten(2)), weights


__all__ = ["HybridLinearAttention", "RotaryPositions"]
