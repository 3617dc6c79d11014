"""The small stacks that are screened on MQAR: the package's own layers, without MLPs, with or without a convolution.

Whether a mixer can compare a key with the value after it depends on a token seeing its neighbour. DeltaNet and
GatedDeltaNet carry a short convolution for that, the other mixers do not, and this decides more about recall than the
update rule. So the screening puts the convolution behind one switch for every layer, linear or attention: where DeltaNet
has it, after the projections that the law sees.

    >>> import torch
    >>> from evaluation.mqar_model import MqarModel
    >>> model = MqarModel("HGRN+attention", conv="none", vocab_size=64, hidden_size=32)
    >>> model(torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.bool)).shape
    torch.Size([16, 64])
"""

from __future__ import annotations

import torch
from torch import nn

from hybrid_models import HybridLinearConfig, HybridLinearModel
from hybrid_models.mixers import ShortConvolution
from hybrid_models.suite import MIXERS

ATTENTION = "attention"
CONV = ("none", "linear", "all")  # in no layer, in the linear ones, in every layer
KERNEL = 4
QKV = ("q_proj", "k_proj", "v_proj")  # of attention; a mixer's ``mixed`` names its own


def parse_stack(stack: str) -> list[str]:
    """Layers of a stack: "DeltaNet+attention" -> ["DeltaNet", "attention"].

    Raises:
        ValueError: a layer is neither a mixer of the suite nor "attention".
    """
    layers = stack.split("+")
    for layer in layers:
        if layer not in MIXERS and layer != ATTENTION:
            raise ValueError(f"stack {stack!r}: {layer!r} is not a layer: use {', '.join(MIXERS)} or {ATTENTION}.")
    return layers


def stack_config(stack: str, vocab_size: int, hidden_size: int, heads: int) -> HybridLinearConfig:
    """Layers of one width and head count whose mixers have no convolution of their own.

    Raises:
        ValueError: as ``parse_stack``, or from the configuration.
    """
    layers = parse_stack(stack)
    mixers = [MIXERS.get(layer, "gated_delta_net") for layer in layers]  # attention's entry is not read
    linear = {mixer for layer, mixer in zip(layers, mixers) if layer != ATTENTION}
    return HybridLinearConfig(
        mixer=mixers if len(linear) > 1 else next(iter(linear), mixers[0]),
        layer_types=["full_attention" if layer == ATTENTION else "linear_attention" for layer in layers],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        intermediate_size=hidden_size,  # not used: the MLPs are taken out
        num_attention_heads=heads,
        linear_num_key_heads=None if "hgrn" in linear else heads,
        linear_use_short_conv=False,
        bos_token_id=None,
        eos_token_id=None,
    )


class ConvolvedProjection(nn.Module):
    """A projection, then a causal depthwise convolution of KERNEL taps: [B, T, d] -> [B, T, out_features]."""

    def __init__(self, projection: nn.Linear):
        super().__init__()
        self.projection = projection
        # It starts with random taps, as nn.Conv1d does. From an identity, the neighbour is not found in time.
        self.conv1d = ShortConvolution(projection.out_features, KERNEL)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1d(self.projection(x))[0].to(x.dtype)


class NoMlp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


class NoPositions(nn.Module):
    """Rotary angles of zero."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_ones(1, 1, 1), x.new_zeros(1, 1, 1)


class MqarModel(nn.Module):
    """Embedding, layers, norm, and the embedding again as head.

    Each layer is h + mixer(norm(h)). Attention has no positions, as in the published screening (RetNet keeps its
    rotary keys: they are part of it). Otherwise layers are those of HybridLinearModel, so what is screened is what the
    suite is made of.

    Args:
        stack: layers, as ``parse_stack`` reads them.
        conv: one of CONV.
        heads: of every layer but HGRN's, which has none.
    """

    def __init__(self, stack: str, conv: str, vocab_size: int, hidden_size: int = 64, heads: int = 2):
        super().__init__()
        if conv not in CONV:
            raise ValueError(f"conv={conv!r} is not known: use one of {', '.join(CONV)}.")
        config = stack_config(stack, vocab_size, hidden_size, heads)
        self.decoder = HybridLinearModel(config)
        for i, (layer, kind) in enumerate(zip(self.decoder.layers, config.layer_types)):
            layer.mlp, layer.post_attention_layernorm = NoMlp(), nn.Identity()
            mixer = layer.self_attn if kind == "full_attention" else layer.linear_attn
            if conv == "all" or (conv == "linear" and kind == "linear_attention"):
                for name in getattr(mixer, "mixed", QKV):
                    setattr(mixer, name, ConvolvedProjection(getattr(mixer, name)))
            if kind == "full_attention":
                # A module of its own: a RetNet of the same head width shares the one that is there.
                self.decoder.rotary_index[i] = len(self.decoder.rotary_embs)
                self.decoder.rotary_embs.append(NoPositions())
        self.state_floats = config.state_bytes() // 4

    def forward(self, ids: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Logits [number of True, vocabulary] at the places that asked [B, T] marks: 2 to 25 % of them."""
        hidden = self.decoder(ids, use_cache=False).last_hidden_state
        return hidden[asked] @ self.decoder.embed_tokens.weight.t()


__all__ = ["CONV", "MqarModel", "parse_stack"]
