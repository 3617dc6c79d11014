"""HybridLinearConfig: what it fills in, what survives a round trip, and that the costs it states are the costs measured."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from hybrid_models import HybridLinearConfig, HybridLinearForCausalLM, layer_types_from_ratio
from hybrid_models.configuration_hybrid_linear import MIXERS, RATIOS

from .common import ARCHITECTURES, REPRESENTATIVES, tiny_config, tiny_model, tokens

# Indices of the attention layers of 24, as the suite's names mean them.
ATTENTION_OF_24 = {
    "pure": [],
    "24-1": [23],
    "12-1": [11, 23],
    "6-1": [5, 11, 17, 23],
    "3-1": [2, 5, 8, 11, 14, 17, 20, 23],
    "full": list(range(24)),
}


@pytest.mark.parametrize("ratio", RATIOS)
def test_layer_types_of_24_layers(ratio):
    kinds = layer_types_from_ratio(ratio, 24)
    assert len(kinds) == 24 and set(kinds) <= {"linear_attention", "full_attention"}
    assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == ATTENTION_OF_24[ratio]
    assert HybridLinearConfig(ratio=ratio, num_hidden_layers=24).layer_types == kinds


def test_layer_types_of_other_depths():
    def attention(ratio, depth):
        return [i for i, kind in enumerate(layer_types_from_ratio(ratio, depth)) if kind == "full_attention"]

    assert attention("3-1", 8) == [2, 5]  # an incomplete last group has none
    assert attention("1-1", 3) == [0, 1, 2] and attention("5-1", 5) == [4]
    # Without ratio and layer_types: every sixth, or the last of a smaller model; a single layer is linear.
    for depth, picture in ((1, "L"), (2, "LA"), (5, "LLLLA"), (6, "LLLLLA"), (8, "LLLLLALL"), (12, "LLLLLALLLLLA")):
        assert HybridLinearConfig(num_hidden_layers=depth).layer_picture() == picture


# Head counts and widths of a linear layer, and the MLP's width, as flash-linear-attention builds them by default.
DEFAULTS = {
    ("hgrn", 1024): ((1, 1, 1, 1, 1024), 2816),
    ("retnet", 1024): ((8, 8, 8, 128, 256), 1536),
    ("gla", 1024): ((4, 4, 4, 128, 256), 2816),
    ("hgrn2", 1024): ((8, 8, 8, 128, 128), 2816),
    ("delta_net", 1024): ((8, 8, 8, 128, 128), 2816),
    ("gated_delta_net", 1024): ((4, 4, 4, 256, 256), 2816),
    ("hgrn", 2048): ((1, 1, 1, 1, 2048), 5632),
    ("retnet", 2048): ((8, 8, 8, 256, 512), 2816),
    ("gla", 2048): ((4, 4, 4, 256, 512), 5632),
    ("hgrn2", 2048): ((16, 16, 16, 128, 128), 5632),
    ("delta_net", 2048): ((16, 16, 16, 128, 128), 5632),
    ("gated_delta_net", 2048): ((8, 8, 8, 256, 256), 5632),
    ("gla", 64): ((1, 1, 1, 32, 64), 256),
    ("gated_delta_net", 96): ((1, 1, 1, 96, 96), 256),
    ("retnet", 768): ((6, 6, 6, 128, 256), 1024),
    ("hgrn2", 320): ((2, 2, 2, 160, 160), 1024),
}


@pytest.mark.parametrize("mixer, hidden_size", DEFAULTS)
def test_defaults(mixer, hidden_size):
    config = HybridLinearConfig(mixer=mixer, hidden_size=hidden_size)
    dims, intermediate_size = DEFAULTS[mixer, hidden_size]
    assert tuple(config.linear_dims(0)) == dims and config.intermediate_size == intermediate_size
    assert config.num_attention_heads * config.head_dim == hidden_size
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.linear_use_short_conv == (mixer in ("delta_net", "gated_delta_net"))
    assert config.linear_use_output_gate == (mixer not in ("hgrn2", "delta_net"))
    # Written down, so that config.json says it all.
    assert config.linear_num_key_heads == dims[1] and config.linear_value_head_dim == dims[4]


@pytest.mark.parametrize("hidden_size", [16, 48, 100, 256, 1000])
@pytest.mark.parametrize("mixer", MIXERS)
def test_any_sensible_size_works_without_more_words(mixer, hidden_size):
    config = HybridLinearConfig(mixer=mixer, hidden_size=hidden_size, num_hidden_layers=2, vocab_size=7)
    with torch.no_grad():
        assert HybridLinearForCausalLM(config).eval()(tokens(1, 3) % 7).logits.isfinite().all()


def test_the_class_is_constructible_without_arguments():
    config = HybridLinearConfig()
    assert (config.mixer, config.model_type, config.layer_picture()) == (
        "gated_delta_net",
        "hybrid_linear",
        "LLLLLA" * 4,
    )


# ----------------------------------------------------------------------------------------------------------- round trips

VARIANTS = {
    **{f"{mixer}-{level}": lambda m=mixer, lv=level: tiny_config(m, lv) for mixer, level in ARCHITECTURES},
    "list of mixers": lambda: tiny_config(
        ["gla", "hgrn", "retnet"], "3-1", num_hidden_layers=3, linear_num_key_heads=None
    ),
    "per layer": lambda: tiny_config(per_layer_config={2: {"sliding_window": 7}}),
    "rope": lambda: tiny_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}),
    "tied": lambda: tiny_config(tie_word_embeddings=True, eos_token_id=[2, 3]),
    "dtype": lambda: tiny_config(dtype="bfloat16"),
    "labels": lambda: tiny_config(num_labels=3),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trips(name, tmp_path):
    config = VARIANTS[name]()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is HybridLinearConfig
    drop = {"_name_or_path", "auto_map", "transformers_version"}
    want = {key: value for key, value in config.to_dict().items() if key not in drop}
    for other in (
        loaded,
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        HybridLinearConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
    ):
        assert {key: value for key, value in other.to_dict().items() if key not in drop} == want
        assert other.per_layer_config[-1].sliding_window == config.per_layer_config[-1].sliding_window
        assert other.state_bytes() == config.state_bytes()
        assert other.kv_bytes_per_token() == config.kv_bytes_per_token()
    # Saving writes what was filled in: nothing has to be derived again, by whatever version reads it.
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["layer_types"] == config.layer_types and saved["intermediate_size"] == 48 and "ratio" not in saved


def test_ratio_and_the_same_layer_types_go_together():
    kinds = layer_types_from_ratio("3-1", 6)
    assert HybridLinearConfig(ratio="3-1", layer_types=kinds, num_hidden_layers=6).layer_types == kinds


# ---------------------------------------------------------------------------------------------------- layers that differ


def logits(seed: int = 0, **fields):
    model = tiny_model("gla", "3-1", num_hidden_layers=6, seed=seed, **fields)
    with torch.no_grad():
        return model, model(tokens(2, 12)).logits


def test_a_layer_with_a_window_of_its_own():
    """Layer 2 sees three tokens, layer 5 everything: neither all narrow nor all wide."""
    _, mixed = logits(per_layer_config={2: {"sliding_window": 3}})
    _, wide = logits()
    _, narrow = logits(sliding_window=3)
    torch.testing.assert_close(mixed[:, :3], wide[:, :3])  # within the window nothing differs
    assert not torch.allclose(mixed[:, 3:], wide[:, 3:]) and not torch.allclose(mixed[:, 3:], narrow[:, 3:])
    model, _ = logits(per_layer_config={2: {"sliding_window": 3}, 5: {"sliding_window": 3}})
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(2, 12)).logits, narrow)


def test_a_layer_with_a_rotary_base_of_its_own():
    base = {"rope_type": "default", "rope_theta": 100.0}
    _, plain = logits()
    model, mixed = logits(per_layer_config={5: {"rope_parameters": base}})
    _, both = logits(rope_parameters=base)
    assert len(model.model.rotary_embs) == 2
    assert not torch.allclose(mixed, plain) and not torch.allclose(mixed, both)
    # Cached decoding and beams know nothing of it, and must agree all the same.
    prompt = tokens(1, 6)
    greedy = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(greedy, model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False))


def test_a_layer_with_heads_and_biases_of_its_own():
    model, _ = logits(per_layer_config={5: {"num_key_value_heads": 2, "attention_bias": True}})
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["model.layers.2.self_attn.k_proj.weight"] == (16, 32)
    assert shapes["model.layers.5.self_attn.k_proj.weight"] == (32, 32)
    assert "model.layers.2.self_attn.k_proj.bias" not in shapes and shapes["model.layers.5.self_attn.k_proj.bias"] == (
        32,
    )
    prompt = tokens(1, 6)
    for kwargs in ({}, {"cache_implementation": "static"}):
        greedy = model.generate(prompt, max_new_tokens=6, do_sample=False, **kwargs)
        assert torch.equal(greedy, model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False))


def test_layers_with_mixers_of_their_own():
    mixers = ["gla", "hgrn", "gated_delta_net", "delta_net", "hgrn2", "retnet"]
    config = tiny_config(mixers, "pure", num_hidden_layers=6, linear_num_key_heads=None)
    assert [tuple(config.linear_dims(i))[3:] for i in (0, 1, 5)] == [(16, 32), (1, 32), (32, 64)]
    model = tiny_model(mixers, "pure", num_hidden_layers=6, linear_num_key_heads=None)
    prompt = tokens(2, 6)
    greedy = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(greedy, model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False))
    assert not greedy[:, 6:].eq(greedy[:, 6:7]).all()


# ------------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"linear_use_short_conv": True, "linear_conv_kernel_dim": 3},
        {"per_layer_config": {2: {"num_key_value_heads": 2}}},
    ],
    ids=["plain", "convolution", "per layer"],
)
@pytest.mark.parametrize("arch", REPRESENTATIVES, ids="-".join)
def test_stated_bytes_are_measured_bytes(arch, fields):
    """Of a bfloat16 model, whose keys, values and convolution windows are in 16 bits and whose states are not."""
    if "linear_use_short_conv" in fields and arch[0] == "retnet":
        fields = {}  # has none
    if "per_layer_config" in fields and "full_attention" not in tiny_config(*arch).layer_types[2:3]:
        fields = {}
    model = tiny_model(*arch, dtype=torch.float32, **fields).to(torch.bfloat16)
    for columns in (3, 11):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens(2, columns), past_key_values=cache)
        kv = state = 0
        for layer in cache.layers:
            if getattr(layer, "is_hybrid_linear", False):
                held = [x for x in (layer.recurrent_states[0], layer.conv_states[0]) if x is not None]
                state += sum(x.nbytes for x in held)
            else:
                kv += layer.keys.nbytes + layer.values.nbytes
        assert kv == 2 * columns * model.config.kv_bytes_per_token()
        assert state == 2 * model.config.state_bytes()


def test_stated_bytes_of_a_published_size():
    """The 1.3B GatedDeltaNet 6-1: 4 layers of 32 heads of 64; 20 layers of 8 states of 256 x 256, windows of 3 x 6144."""
    config = HybridLinearConfig(ratio="6-1", hidden_size=2048, num_attention_heads=32)
    assert config.kv_bytes_per_token() == 4 * 2 * 32 * 64 * 2
    assert config.state_bytes() == 20 * (8 * 256 * 256 * 4 + 3 * 6144 * 2)
    assert config.kv_bytes_per_token(bytes_per_element=4) == 2 * config.kv_bytes_per_token()
