"""Small models that the tests share. Their parameters are random everywhere, so that each one shows in the logits."""

from __future__ import annotations

import torch

from hybrid_models import HybridLinearConfig, HybridLinearForCausalLM
from hybrid_models.configuration_hybrid_linear import MIXERS, RATIOS

VOCAB = 101
# The smallest depth at which a level's name means what it means at 24 layers (two groups where that is cheap).
DEPTH = {"pure": 3, "24-1": 24, "12-1": 12, "6-1": 6, "3-1": 6, "full": 2}
ARCHITECTURES = [(mixer, level) for mixer in MIXERS for level in RATIOS]
# One of each kind: conv and none, vector and matrix state, delta and gated, all-linear, mixed and all-attention.
REPRESENTATIVES = [
    ("hgrn", "pure"),
    ("retnet", "3-1"),
    ("gla", "pure"),
    ("hgrn2", "3-1"),
    ("delta_net", "pure"),
    ("gated_delta_net", "3-1"),
    ("gated_delta_net", "full"),
]


def tiny_config(mixer: str = "gated_delta_net", level: str = "3-1", **fields) -> HybridLinearConfig:
    """Hidden size 32, two heads where the mixer has heads, vocabulary 101, no end-of-sequence token."""
    defaults = dict(
        mixer=mixer,
        ratio=level,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=DEPTH.get(level, 6),
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=None,
        pad_token_id=0,
        linear_num_key_heads=None if mixer == "hgrn" else 2,
    )
    return HybridLinearConfig(**{**defaults, **fields})


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter away from its initial value by an amount that keeps logits of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            size = {"A_log": 1.0, "dt_bias": 1.0, "lower_bounds": 1.0}.get(name.rsplit(".", 1)[-1], 0.1)
            if "conv1d" in name or "gk_proj" in name:
                size = 0.5
            parameter.add_((size * noise).to(parameter.dtype))
    return model


def tiny_model(mixer: str = "gated_delta_net", level: str = "3-1", dtype=torch.float64, seed: int = 0, **fields):
    """A tiny HybridLinearForCausalLM in eval mode, the same for the same arguments."""
    torch.manual_seed(seed)
    model = HybridLinearForCausalLM(tiny_config(mixer, level, **fields))
    return randomize(model, seed).to(dtype).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random ids in 3..100: none is padding, beginning or end of sequence."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
