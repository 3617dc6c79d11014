"""Checkpoints of flash-linear-attention: the recorded ones give fla's numbers, and damaged ones are refused by name."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_models import HybridLinearForCausalLM, checkpoint
from hybrid_models.convert import convert
from hybrid_models.fla_config import config_from_fla, config_to_fla
from hybrid_models.fla_format import from_fla
from hybrid_models.kernels import use_law
from hybrid_models.recurrence import reference

from .common import tiny_config, tiny_model, tokens
from .fla import CASES, FIXTURES, add_tokenizer, copy_of, expected, shard

TOLERANCE = 3e-4  # float32: a right implementation stays below 1e-4, the mistakes that were tried cost units
GDN, OLD, HGRN, GLA = "gated_deltanet-hybrid", "gated_deltanet-old-format", "hgrn-pure", "gla-hybrid"

# -------------------------------------------------------------------------------------------------------- fla's numbers


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(model in float32, what fla computed)"""
    return from_fla(FIXTURES / request.param, dtype=torch.float32), expected(request.param)


@torch.no_grad()
def test_logits_of_one_forward(case):
    model, want = case
    assert (model(want["input_ids"]).logits - want["logits"]).abs().max() < TOLERANCE


@torch.no_grad()
def test_logits_step_by_step(case):
    model, want = case
    ids, start = want["input_ids"], want["input_ids"].shape[1] - want["step_logits"].shape[1]
    out = model(ids[:, :start], use_cache=True)
    for t in range(start, ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        assert (out.logits[:, 0] - want["step_logits"][:, t - start]).abs().max() < TOLERANCE, t


@torch.no_grad()
def test_logits_with_left_padding(case):
    model, want = case
    mask = want["padded_attention_mask"]
    logits = model(want["padded_input_ids"], attention_mask=mask).logits
    assert ((logits - want["padded_logits"]).abs() * mask[:, :, None]).max() < TOLERANCE


def test_greedy_tokens(case):
    model, want = case
    for ids, mask, tokens_ in (
        (want["input_ids"], None, want["greedy"]),
        (want["padded_input_ids"], want["padded_attention_mask"], want["padded_greedy"]),
    ):
        mask = torch.ones_like(ids) if mask is None else mask
        out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens_.shape[1], do_sample=False, pad_token_id=0)
        assert torch.equal(out[:, ids.shape[1] :], tokens_)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_float64_agrees_with_the_law(name):
    model, want = from_fla(FIXTURES / name, dtype=torch.float64), expected(name)
    logits = model(want["input_ids"]).logits
    with use_law(reference):
        assert (logits - model(want["input_ids"]).logits).abs().max() < 1e-10
    assert (logits - want["logits"]).abs().max() < TOLERANCE


# ------------------------------------------------------------------------------------------------------------- loading


def test_from_pretrained_arguments(tmp_path):
    folder = shard(copy_of(GDN, tmp_path))
    model, info = from_fla(folder, dtype="bfloat16", device_map="cpu", pad_token_id=0, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.pad_token_id == 0 and model.name_or_path == str(folder)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16), name
    eager = from_fla(folder.parent, subfolder=folder.name, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert next(from_fla(FIXTURES / GDN, dtype="auto").parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match="config: from_fla reads it"):
        from_fla(folder, config=tiny_config())


@torch.no_grad()
def test_device_map_with_disk(tmp_path):
    want = expected(GLA)
    devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.layers": "disk", "lm_head": "cpu"}
    devices |= {"model.rotary_embs": "cpu"}
    model = from_fla(FIXTURES / GLA, device_map=devices, offload_folder=tmp_path)
    assert (model(want["input_ids"]).logits - want["logits"]).abs().max() < TOLERANCE


def test_hub_revision(tmp_path):
    """A repository in the Hub's cache, at two commits: the revision chooses, and provenance.json tells which it was."""
    repo, commits = tmp_path / "models--org--name", {"main": "a" * 40, "early": "b" * 40}
    for (ref, commit), name in zip(commits.items(), (GDN, HGRN), strict=True):
        copy_of(name, repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    options = dict(cache_dir=tmp_path, local_files_only=True)
    assert from_fla("org/name", **options).config.mixer == "gated_delta_net"
    assert from_fla("org/name", revision="early", **options).config.mixer == "hgrn"
    convert("org/name", tmp_path / "native", revision="early", **options)
    source = json.loads((tmp_path / "native" / "provenance.json").read_text())["source"]
    assert (source["name"], source["revision"]) == ("org/name", "b" * 40)


def test_native_checkpoints_are_not_fla(tmp_path):
    tiny_model("gla", "pure").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a native checkpoint"):
        from_fla(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        from_fla(tmp_path / "absent")


# ------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "raw, fields",
    [
        ({"model_type": "gated_deltanet"}, {"num_hidden_layers": 21, "linear_num_key_heads": 6, "linear_value_head_dim": 512}),
        ({"model_type": "retnet"}, {"intermediate_size": 2816, "linear_key_head_dim": 256, "linear_value_head_dim": 512}),
        ({"model_type": "retnet", "use_short_conv": True, "feature_map": None}, {"linear_use_short_conv": False}),
        ({"model_type": "gla", "hidden_size": 1024}, {"intermediate_size": 2816, "linear_key_head_dim": 128}),
        ({"model_type": "gla", "num_kv_heads": 2}, {"linear_num_query_heads": 4, "linear_num_value_heads": 2}),
        ({"model_type": "hgrn2", "expand_ratio": None, "num_heads": 8}, {"linear_key_head_dim": 256, "linear_num_key_heads": 8}),
        ({"model_type": "hgrn2", "num_heads": 3}, {"linear_key_head_dim": 128, "linear_num_key_heads": 16}),
        ({"model_type": "hgrn", "expand_ratio": 2, "num_heads": 7}, {"linear_value_head_dim": 4096, "linear_num_key_heads": 1}),
        ({"model_type": "delta_net", "allow_neg_eigval": True}, {"linear_allow_neg_eigval": True, "linear_use_short_conv": True}),
        (
            {"model_type": "gated_deltanet", "num_v_heads": 12, "output_gate_activation": "sigmoid", "use_short_conv": False},
            {"linear_num_value_heads": 12, "linear_output_gate_act": "sigmoid", "linear_use_short_conv": False},
        ),
        (
            {"model_type": "gla", "attn_mode": "fused_chunk", "use_gv": True, "share_conv_kernel": True, "_name_or_path": "x"}
            | {"fuse_something_new": 3, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6, "id2label": {}},
            {"dtype": torch.bfloat16},
        ),
    ],
)  # fmt: skip
def test_config(raw, fields):
    config = config_from_fla(raw)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"model_type": "rwkv7"}, "model_type='rwkv7'"),
        ({"model_type": "gla", "sparsity": 0.5}, "sparsity=0.5"),
        ({"model_type": "gla", "feature_map": "elu"}, "feature_map='elu'"),
        ({"model_type": "gla", "clamp_min": -3}, "clamp_min=-3"),
        ({"model_type": "gla", "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "gla", "attnres_block_size": 4}, "attnres_block_size=4"),
        ({"model_type": "gla", "use_short_conv": True, "share_conv_kernel": True}, "share_conv_kernel=True"),
        ({"model_type": "gla", "num_heads": 3}, "num_heads=3"),
        ({"model_type": "gla", "rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        ({"model_type": "delta_net", "qk_norm": "sum"}, "qk_norm='sum'"),
        ({"model_type": "delta_net", "qk_activation": "elu"}, "qk_activation='elu'"),
        ({"model_type": "delta_net", "use_beta": False}, "use_beta=False"),
        ({"model_type": "delta_net", "norm_first": True}, "norm_first=True"),
        ({"model_type": "gated_deltanet", "output_gate_activation": "relu"}, "output_gate_activation='relu'"),
        ({"model_type": "gla", "hidden_size": "big"}, "hidden_size='big'"),
        ({"model_type": "hgrn", "expand_ratio": None}, "expand_ratio=None"),
        ({"model_type": "gla", "attn": "all"}, "attn in config.json holds 'all'"),
        ({"model_type": "gla", "attn": {"layers": 3, "num_heads": 8}}, "a list of layers"),
        ({"model_type": "gla", "attn": {"layers": [1]}}, "lacks num_heads"),
        ({"model_type": "gla", "attn": {"layers": [1], "num_heads": 8, "qk_norm": True}}, "unknown keys: qk_norm"),
        ({"model_type": "gla", "attn": {"layers": [1, 1], "num_heads": 8}}, "1 twice"),
        ({"model_type": "gla", "attn": [{"layers": [1], "num_heads": 8}, {"layers": [1], "num_heads": 4}]}, "1 twice"),
        ({"model_type": "gla", "attn": {"layers": [1], "num_heads": 7}}, "attn.num_heads=7"),
        ({"model_type": "gla", "attn": {"layers": [24], "num_heads": 8}, "attnres_block_size": None}, "holds 24"),
    ],
)
def test_config_that_is_refused(raw, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        config_from_fla(raw)


def test_layers_out_of_range_in_an_old_file_are_dropped(caplog):
    """Older fla trained without them, so the model is what it is; newer ones refuse such a file (see above)."""
    with caplog.at_level(logging.WARNING):
        config = config_from_fla({"model_type": "gla", "attn": {"layers": [12, 24], "num_heads": 8}})
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [12]
    assert "layer 24 does not exist" in caplog.text


# ------------------------------------------------------------------------------------------------- damaged checkpoints


def refused(folder, *words):
    """from_fla and convert must raise ValueError with all ``words``, and convert must leave nothing behind."""
    with pytest.raises(ValueError) as error:
        from_fla(folder)
    for word in words:
        assert word in str(error.value)
    destination = folder.parent / "converted"
    with pytest.raises(ValueError):
        convert(folder, destination)
    assert not destination.exists() and not destination.with_name("converted.partial").exists()


def test_truncated_shard(tmp_path):
    folder = shard(copy_of(GDN, tmp_path / "x"))
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "model-00002-of-00002.safetensors", "damaged")


def test_missing_shard(tmp_path):
    folder = shard(copy_of(GDN, tmp_path / "x"))
    (folder / "model-00001-of-00002.safetensors").unlink()
    refused(folder, "lacks model-00001-of-00002.safetensors")


def test_index_that_disagrees_with_the_shards(tmp_path):
    folder = shard(copy_of(GDN, tmp_path / "x"))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))
    refused(folder, "disagree about")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", 3])
def test_path_traversal_in_the_index(tmp_path, name):
    folder = shard(copy_of(GDN, tmp_path / "x"))
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "outside.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    refused(folder, repr(name), "Only a plain name")


def test_pickled_weights(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'exploded')!r}, 'w')",))

    folder = copy_of(GDN, tmp_path / "x")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(folder, "pytorch_model.bin", "refused")
    assert not (tmp_path / "exploded").exists()


def test_no_weights_and_no_config(tmp_path):
    folder = copy_of(GDN, tmp_path / "x")
    (folder / "model.safetensors").write_bytes(b"not a safetensors file at all, but long enough")
    refused(folder, "damaged")
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no weights")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "is not JSON")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        from_fla(folder)


def _drop(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def _set(name, value):
    return lambda weights: weights | {name: value}


LAYER = "model.layers.0.attn."
DAMAGED = {
    "missing tensor": (GDN, {}, _drop(LAYER + "dt_bias"), ["missing: " + LAYER + "dt_bias"]),
    "missing A_log": (GDN, {}, _drop(LAYER + "A_log"), ["missing: " + LAYER + "A_log"]),
    "missing conv": (GDN, {}, _drop(LAYER + "k_conv1d.weight"), [LAYER + "k_conv1d.weight"]),
    "missing up_proj": (GDN, {}, _drop("model.layers.0.mlp.up_proj.weight"), ["model.layers.0.mlp.up_proj.weight"]),
    "unexpected tensor": (GDN, {}, _set("model.extra", torch.ones(3)), ["not expected: model.extra"]),
    "wrong shape": (GDN, {}, _set(LAYER + "o_proj.weight", torch.ones(64, 31)), [LAYER + "o_proj.weight", "[64, 31]", "[64, 32]"]),
    "wrong split of the conv": (
        GDN,
        {},
        lambda w: w | {LAYER + "q_conv1d.weight": torch.ones(31, 1, 4), LAYER + "k_conv1d.weight": torch.ones(33, 1, 4)},
        [LAYER + "q_conv1d.weight", "[31, 1, 4]", LAYER + "k_conv1d.weight", "[33, 1, 4]"],
    ),
    "vocabulary": (GDN, {"vocab_size": 102}, None, ["model.embeddings.weight", "lm_head.weight", "[102, 64]"]),
    "layer out of range": (GDN, {"attn": {"layers": [2, 6], "num_heads": 4}}, None, ["holds 6", "0 to 5"]),
    "attention elsewhere": (GDN, {"attn": {"layers": [2, 4], "num_heads": 4}}, None, ["model.layers.5.attn.A_log"]),
    "no attention": (GDN, {"attn": None}, None, ["model.layers.2.attn.A_log"]),
    "conv against the config": (GDN, {"use_short_conv": False}, None, ["not expected", LAYER + "q_conv1d.weight"]),
    "no conv": ("gla-pure", {"use_short_conv": True}, None, ["missing", LAYER + "q_conv1d.weight"]),
    "NaN in A_log": (GDN, {}, _set(LAYER + "A_log", torch.tensor([0.0, float("nan")])), ["A_log has 1 values"]),
    "Inf in dt_bias": (GDN, {}, _set(LAYER + "dt_bias", torch.tensor([0.0, float("inf")])), ["dt_bias has 1 values"]),
    "D is not zero": (OLD, {}, _set(LAYER + "D", torch.ones(2)), [LAYER + "D is not zero"]),
    "no lower bounds": (HGRN, {}, _drop("model.lower_bounds"), ["missing: model.lower_bounds"]),
    "unexpected lower bounds": (HGRN, {"use_lower_bound": False}, None, ["not expected: model.lower_bounds"]),
    "bias in the norm": ("hgrn2-pure", {}, _set(LAYER + "g_norm.bias", torch.ones(64)), ["g_norm.bias", "HGRN2 before August 2024"]),
    "norms inside": (GDN, {}, _set(LAYER + "norm.weight", torch.ones(64)), [LAYER + "norm.weight", "norm_first"]),
    "norm of the other name": (GLA, {"fuse_norm": False}, None, [LAYER + "g_norm.weight", LAYER + "g_norm_swish_gate.weight"]),
    "tied to another": ("hgrn2-hybrid", {}, _set("lm_head.weight", torch.ones(101, 64)), ["tie_word_embeddings", "differs"]),
    "integer weights": (GDN, {}, _set("model.norm.weight", torch.ones(64, dtype=torch.int8)), ["dtype I8", "model.norm.weight"]),
    "unknown key": (GDN, {"window": 3}, None, ["window=3"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged(tmp_path, damage):
    name, config, tensors, words = DAMAGED[damage]
    refused(copy_of(name, tmp_path / "x", config, tensors), *words)


# ----------------------------------------------------------------------------------------------------------- old files


def test_D_is_dropped_with_one_line(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hybrid_models"):
        from_fla(FIXTURES / OLD)
    assert [record.message.count("attn.D") for record in caplog.records] == [3]


@torch.no_grad()
def test_fused_mlp(tmp_path):
    def fuse(weights):
        for i in range(4):
            gate, up = (f"model.layers.{i}.mlp.{name}_proj.weight" for name in ("gate", "up"))
            weights[gate] = torch.cat([weights[gate], weights.pop(up)])

    want = expected(OLD)
    folder = copy_of(OLD, tmp_path / "fused", {}, fuse)
    assert (from_fla(folder)(want["input_ids"]).logits - want["logits"]).abs().max() < TOLERANCE
    convert(convert(folder, tmp_path / "native"), tmp_path / "fla", to="fla")
    assert_same(tmp_path / "fla", FIXTURES / OLD)  # comes back in two matrices


@torch.no_grad()
def test_tied_with_an_equal_head(tmp_path):
    folder = copy_of(
        "hgrn2-hybrid", tmp_path / "x", {}, lambda w: w | {"lm_head.weight": w["model.embeddings.weight"].clone()}
    )
    want = expected("hgrn2-hybrid")
    assert (from_fla(folder)(want["input_ids"]).logits - want["logits"]).abs().max() < TOLERANCE
    round_trip(folder, tmp_path)


# ---------------------------------------------------------------------------------------------------------- converting


def assert_same(a, b):
    """Two checkpoints hold the same tensors, dtypes included."""
    a, b = (
        {k: v for f in folder.glob("*.safetensors") if f.name[0] == "m" for k, v in load_file(f).items()}
        for folder in (a, b)
    )
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def round_trip(folder, tmp_path):
    convert(folder, tmp_path / "native", max_shard_size="100KB")
    convert(tmp_path / "native", tmp_path / "back", to="fla")
    assert_same(folder, tmp_path / "back")
    assert config_from_fla(json.loads((tmp_path / "back" / "config.json").read_text())).to_dict() == (
        config_from_fla(json.loads((folder / "config.json").read_text())).to_dict()
    )


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_round_trip_and_native_logits(tmp_path, name):
    round_trip(FIXTURES / name, tmp_path)
    ids = expected(name)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert torch.equal(model(ids).logits, from_fla(FIXTURES / name)(ids).logits)


@pytest.mark.parametrize(
    "name, config, tensors",
    [
        ("retnet-pure", {"elementwise_affine": False}, lambda w: {k: v for k, v in w.items() if "g_norm" not in k}),
        ("gla-pure", {"fuse_norm": False}, lambda w: {k.replace("_swish_gate", ""): v for k, v in w.items()}),
        (OLD, {"torch_dtype": "bfloat16"}, lambda w: {k: v if "A_log" in k else v.bfloat16() for k, v in w.items()}),
        ("hgrn-hybrid", {"dtype": "bfloat16"}, lambda w: {k: v.bfloat16() for k, v in w.items()}),
    ],
    ids=["norms without weight", "norm of the other name", "bfloat16", "bfloat16 bounds"],
)
def test_round_trip_of_variants(tmp_path, name, config, tensors):
    round_trip(copy_of(name, tmp_path / "x", config, tensors), tmp_path)
    for file in (tmp_path / "native").glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            assert tensor.dtype == torch.float32 or not key.endswith(("A_log", "dt_bias", "lower_bounds"))


def test_norm_weights_that_were_trained_survive(tmp_path):
    """elementwise_affine=false comes back only while the weights that it leaves out are ones."""
    source = copy_of(
        "retnet-pure",
        tmp_path / "x",
        {"elementwise_affine": False},
        lambda w: {k: v for k, v in w.items() if "g_norm" not in k},
    )
    convert(source, tmp_path / "native")
    weights = load_file(tmp_path / "native" / "model.safetensors")
    weights["model.layers.1.linear_attn.o_norm.weight"] *= 1.5
    save_file(weights, tmp_path / "native" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "native", tmp_path / "back", to="fla")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert (back["model.layers.1.attn.g_norm_swish_gate.weight"] == 1.5).all()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["elementwise_affine"] is True


NATIVE = {
    "gated_delta_net with grouped heads": ("gated_delta_net", dict(linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12)),
    "gated_delta_net without gate and conv": ("gated_delta_net", dict(linear_use_output_gate=False, linear_use_short_conv=False)),
    "gated_delta_net sigmoid": ("gated_delta_net", dict(linear_output_gate_act="sigmoid", linear_allow_neg_eigval=True)),
    "delta_net gated": ("delta_net", dict(linear_use_output_gate=True, linear_allow_neg_eigval=True, linear_conv_kernel_dim=3)),
    "gla with conv and shared heads": ("gla", dict(linear_num_query_heads=4, linear_use_short_conv=True, tie_word_embeddings=True)),
    "gla without gate": ("gla", dict(linear_use_output_gate=False)),
    "retnet with shared heads": ("retnet", dict(linear_num_query_heads=4, rms_norm_eps=1e-4)),
    "hgrn with conv": ("hgrn", dict(linear_use_short_conv=True, linear_value_head_dim=48)),
    "hgrn without bounds": ("hgrn", dict(linear_use_lower_bound=False)),
    "hgrn2 with conv": ("hgrn2", dict(linear_use_short_conv=True)),
    "two kinds of attention": ("gla", dict(attention_bias=True, per_layer_config={5: {"sliding_window": 4, "num_key_value_heads": 2}})),
    "attention only": ("gated_delta_net", dict(ratio="full", num_hidden_layers=2)),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", NATIVE)
def test_native_models_go_to_fla_and_back(tmp_path, name):
    """A model trained here, without a record of an fla checkpoint."""
    mixer, fields = NATIVE[name]
    model = tiny_model(mixer, dtype=torch.float32, **fields)
    model.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "fla", to="fla")
    ids = tokens(2, 20)
    assert torch.equal(from_fla(tmp_path / "fla")(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "mixer, fields, message",
    [
        (["gla"] * 3 + ["hgrn"] * 3, {}, "mixer="),
        (
            "gla",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters of layer 2",
        ),
        ("gla", {"head_dim": 8}, "head_dim of layer 2=8"),
        ("hgrn2", {"linear_key_head_dim": 8}, "heads and widths of layer 0"),
    ],
)
def test_models_that_fla_cannot_express(mixer, fields, message):
    config = tiny_config("gla", layer_types=None, **fields) if isinstance(mixer, list) else tiny_config(mixer, **fields)
    if isinstance(mixer, list):
        config.mixer = mixer
    with pytest.raises(ValueError, match=message):
        config_to_fla(config)


def test_native_checkpoint_is_complete(tmp_path):
    """As if the model had saved itself, and with a tokenizer that pads on the left and gives the ids it was made for."""
    source = add_tokenizer(copy_of(GDN, tmp_path / "src", {"vocab_size": 400}, grow(400)), 400, llama=True)
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "do_sample": True}))
    native = convert(source, tmp_path / "native")
    model = from_fla(source)
    assert (model.generation_config.temperature, model.generation_config.do_sample) == (0.7, True)
    model.save_pretrained(tmp_path / "saved")
    ours, theirs = ({path.name for path in folder.iterdir()} for folder in (native, tmp_path / "saved"))
    assert ours - theirs == {"provenance.json", "tokenizer.json", "tokenizer_config.json"} and theirs <= ours
    a, b = (json.loads((folder / "config.json").read_text()) for folder in (native, tmp_path / "saved"))
    assert a == b | {"pad_token_id": 0}
    assert_same(native, tmp_path / "saved")

    tokenizer = AutoTokenizer.from_pretrained(native)
    assert (tokenizer.pad_token, tokenizer.padding_side, tokenizer.pad_token_id) == ("<unk>", "left", 0)
    plain = Tokenizer.from_file(str(native / "tokenizer.json"))
    assert (native / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    for text in (" = Robert", "Robert", "  two spaces"):
        assert tokenizer(text, add_special_tokens=False).input_ids == plain.encode(text, add_special_tokens=False).ids
    generation = json.loads((native / "generation_config.json").read_text())
    assert (generation["temperature"], generation["pad_token_id"]) == (0.7, 0)

    provenance = json.loads((native / "provenance.json").read_text())
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert provenance["source"]["files"]["model.safetensors"]["sha256"] == digest
    assert provenance["source"]["name"] == "src" and str(tmp_path) not in json.dumps(provenance)
    assert provenance["repairs"] == [] and provenance["versions"]["torch"]
    assert provenance["tokenizer"] == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<unk>",
        "padding_side": "left",
    }


def grow(vocab_size):
    """More rows for embeddings and head."""

    def change(weights):
        for name in ("model.embeddings.weight", "lm_head.weight"):
            weights[name] = weights[name].repeat(vocab_size // 101 + 1, 1)[:vocab_size].contiguous()

    return change


def test_native_to_native(tmp_path):
    convert(FIXTURES / GDN, tmp_path / "a", dtype="bfloat16", max_shard_size="50KB")
    convert(tmp_path / "a", tmp_path / "b")
    assert_same(tmp_path / "a", tmp_path / "b")
    weights = load_file(tmp_path / "b" / "model.safetensors")
    for name, tensor in weights.items():
        assert tensor.dtype == (torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16), name
    assert next(HybridLinearForCausalLM.from_pretrained(tmp_path / "b").parameters()).dtype == torch.bfloat16
    provenance = json.loads((tmp_path / "b" / "provenance.json").read_text())
    assert provenance["fla"]["config"]["model_type"] == "gated_deltanet"  # still known, for the way back


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C in the middle; then a run that was killed and left its unfinished folder; then one that finishes."""
    written = []

    def interrupt(path, shard, progress, write=checkpoint._write_safetensors):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, shard, progress)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_safetensors", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(FIXTURES / GDN, tmp_path / "out", max_shard_size="100KB")
    assert written and not any(tmp_path.iterdir())

    left = tmp_path / "out.partial"
    left.mkdir()
    (left / "model-00001-of-00005.safetensors").write_bytes(b"half")
    convert(FIXTURES / GDN, tmp_path / "out", max_shard_size="100KB")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    HybridLinearForCausalLM.from_pretrained(tmp_path / "out")

    with pytest.raises(FileExistsError, match="exists already"):
        convert(FIXTURES / GDN, tmp_path / "out")
    convert(FIXTURES / HGRN, tmp_path / "out", overwrite=True)
    assert HybridLinearForCausalLM.from_pretrained(tmp_path / "out").config.mixer == "hgrn"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_conversion_leaves_nothing_that_looks_complete(tmp_path):
    code = (
        "import sys, time; from hybrid_models import checkpoint, convert; write = checkpoint._write_safetensors\n"
        "def slow(*args): write(*args); print('written', flush=True); time.sleep(60)\n"
        "checkpoint._write_safetensors = slow\n"
        "convert.convert(sys.argv[1], sys.argv[2], max_shard_size='100KB')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(FIXTURES / GDN), str(tmp_path / "out")], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"written\n"
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    assert [path.suffix for path in (tmp_path / "out.partial").iterdir()] == [".safetensors"]
    convert(FIXTURES / GDN, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "text, size", [("5GB", 5_000_000_000), (123, 123), ("1.5 MB", 1_500_000), ("2KiB", 2048), ("7", 7)]
)
def test_sizes(text, size):
    assert checkpoint.size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 apples", 0])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="max_shard_size"):
        checkpoint.size_in_bytes(text)


def test_a_full_disk_is_known_before(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="are free there"):
        convert(FIXTURES / GDN, tmp_path / "out")
    assert not any(tmp_path.iterdir())
