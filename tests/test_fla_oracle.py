"""Hyperparameters of which there are no recorded outputs of fla, against fla's formulas written down a second time."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from hybrid_models.convert import convert
from hybrid_models.fla_format import from_fla

from . import fla_oracle
from .fla import CASES, FIXTURES, expected

ATTN = {"layers": [1], "num_heads": 4}
VARIANTS = {
    "hgrn, conv, expand 2": dict(model_type="hgrn", expand_ratio=2, use_short_conv=True, conv_size=3),
    "hgrn, no bounds, hybrid": dict(model_type="hgrn", expand_ratio=1, use_short_conv=False, use_lower_bound=False, attn=ATTN),
    "hgrn, bounds unused": dict(model_type="hgrn", expand_ratio=1, use_short_conv=False, attn=ATTN | {"layers": [1, 2]}),
    "hgrn, no norm weight": dict(model_type="hgrn", expand_ratio=1, use_short_conv=False, elementwise_affine=False),
    "retnet, no gate": dict(model_type="retnet", num_heads=3, expand_k=1, expand_v=2, use_output_gate=False, use_short_conv=True),
    "retnet, one shared head": dict(model_type="retnet", num_heads=4, num_kv_heads=1, expand_k=0.5, expand_v=1, norm_eps=1e-2),
    "retnet, no norm weight": dict(model_type="retnet", num_heads=2, expand_k=1, expand_v=2, elementwise_affine=False),
    "gla, no gate, wide": dict(model_type="gla", num_heads=2, expand_k=1, expand_v=2, use_output_gate=False, use_short_conv=False),
    "gla, conv, tied, norm apart": dict(
        model_type="gla", num_heads=3, expand_k=0.5, expand_v=1, use_short_conv=True, tie_word_embeddings=True, fuse_norm=False
    ),
    "gla, shared heads, two attentions": dict(
        model_type="gla", num_heads=4, num_kv_heads=2, expand_k=0.5, expand_v=2, use_short_conv=False,
        attn=[ATTN | {"window_size": 3, "qkv_bias": True}, {"layers": [2], "num_heads": 2, "num_kv_heads": 1, "rope_theta": 50.0}],
    ),
    "hgrn2, conv": dict(model_type="hgrn2", expand_ratio=24, use_short_conv=True),
    "hgrn2, by heads, tied": dict(
        model_type="hgrn2", expand_ratio=None, num_heads=3, use_short_conv=False, norm_eps=1e-2, tie_word_embeddings=True
    ),
    "hgrn2, no bounds": dict(model_type="hgrn2", expand_ratio=16, use_short_conv=False, use_lower_bound=False, attn=ATTN),
    "delta_net, no conv": dict(model_type="delta_net", num_heads=3, expand_k=1, expand_v=1, use_gate=False, use_short_conv=False),
    "delta_net, negative eigenvalues, gate": dict(
        model_type="delta_net", num_heads=2, expand_k=0.5, expand_v=2, use_gate=True, use_short_conv=True, allow_neg_eigval=True
    ),
    "gated_deltanet, value heads": dict(
        model_type="gated_deltanet", num_heads=2, num_v_heads=6, head_dim=10, expand_v=2, use_gate=True, use_short_conv=True,
        allow_neg_eigval=True, attn=ATTN | {"num_kv_heads": 2},
    ),
    "gated_deltanet, sigmoid, no conv": dict(
        model_type="gated_deltanet", num_heads=3, head_dim=8, expand_v=1.5, use_gate=True, use_short_conv=False,
        output_gate_activation="sigmoid", tie_word_embeddings=True,
    ),
    "gated_deltanet, no gate": dict(
        model_type="gated_deltanet", num_heads=2, head_dim=16, expand_v=1, use_gate=False, use_short_conv=True, conv_size=2
    ),
    "attention only": dict(
        model_type="gated_deltanet", num_heads=2, head_dim=16, expand_v=1, use_gate=True, use_short_conv=True,
        attn=ATTN | {"layers": [0, 1, 2]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_formulas_give_fla_s_numbers(case):
    """Otherwise they would prove nothing."""
    config = json.loads((FIXTURES / case / "config.json").read_text())
    want = expected(case)
    got = fla_oracle.logits(config, load_file(FIXTURES / case / "model.safetensors"), want["input_ids"][:1])
    assert (got - want["logits"][:1]).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_variant(tmp_path, name):
    config, tensors = fla_oracle.make(tmp_path / "fla", **VARIANTS[name])
    ids = torch.randint(0, 61, (2, 23), generator=torch.Generator().manual_seed(1))
    want = fla_oracle.logits(config, tensors, ids)
    got = from_fla(tmp_path / "fla").double()(ids).logits
    assert want.std() > 0.5
    assert (got - want).abs().max() < 1e-10
    convert(convert(tmp_path / "fla", tmp_path / "native"), tmp_path / "back", to="fla")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    # Bounds that no layer reads are dropped, and come back as zeros.
    unused = {"model.lower_bounds"} if name == "hgrn, bounds unused" else set()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items() if key not in unused)
