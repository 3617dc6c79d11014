"""Bad input: refused early, with the field, its value and what to do; and nothing that was passed in is changed.

The configuration's fields, the model's inputs, checkpoints on disk, and the environment, in this order. Caches of another
model or batch have their own tests beside the cache (test_cache).
"""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from hybrid_models import (
    HybridLinearConfig,
    HybridLinearForCausalLM,
    HybridLinearForQuestionAnswering,
    HybridLinearForSequenceClassification,
    HybridLinearForTokenClassification,
    HybridLinearModel,
)

from .common import VOCAB, tiny_config, tiny_model, tokens

# ------------------------------------------------------------------------------------------------------ the configuration

CONFIGS = {
    "mixer, misspelt": (dict(mixer="gla2"), "mixer='gla2' is not known.*retnet.*did you mean 'gla'"),
    "mixer, as fla spells it": (dict(mixer="gated_deltanet"), "mixer='gated_deltanet'.*did you mean 'gated_delta_net'"),
    "mixer, one of a list": (dict(mixer=["gla", "mamba", "gla"], num_hidden_layers=3), "mixer='mamba' is not known"),
    "mixer, too short a list": (dict(mixer=["gla"], num_hidden_layers=3), "mixer has 1 entries.*num_hidden_layers=3"),
    "ratio, misspelt": (dict(ratio="6:1"), "ratio='6:1' is not known: use one of pure, 24-1.*'N-1'"),
    "ratio, reversed": (dict(ratio="1-6"), "ratio='1-6' is not known"),
    "ratio, zero": (dict(ratio="0-1"), "ratio='0-1' is not known"),
    "ratio, a number": (dict(ratio=6), "ratio=6 is not known"),
    "ratio, longer than the model": (dict(ratio="24-1", num_hidden_layers=12), "every 24th layer.*num_hidden_layers=12"),
    "ratio and layer_types": (
        dict(ratio="pure", num_hidden_layers=1, layer_types=["full_attention"]), "pass only one of them",
    ),
    "layer_types, too short": (
        dict(layer_types=["linear_attention"] * 3, num_hidden_layers=4), "layer_types has 3 entries.*num_hidden_layers=4",
    ),
    "layer_types, wrong value": (
        dict(layer_types=["linear_attention", "attention"], num_hidden_layers=2),
        r"layer_types\[1\]='attention' is not known: use 'linear_attention' or 'full_attention'",
    ),
    "layer_types, a sliding one": (
        dict(layer_types=["sliding_attention"], num_hidden_layers=1), r"layer_types\[0\]='sliding_attention'",
    ),
    "attention heads": (dict(hidden_size=100, num_attention_heads=3), "num_attention_heads=3 does not divide hidden_size=100"),
    "key/value heads": (dict(num_attention_heads=4, num_key_value_heads=3), "num_key_value_heads=3 does not divide.*=4"),
    "odd head_dim": (dict(head_dim=5), "head_dim=5 must be even"),
    "heads of an ungrouped mixer": (
        dict(mixer="delta_net", linear_num_query_heads=4, linear_num_key_heads=2),
        "query_heads=4, linear_num_key_heads=2.*all three equal",
    ),
    "value heads": (
        dict(linear_num_key_heads=2, linear_num_value_heads=3), "linear_num_value_heads=3.*value heads a multiple of them",
    ),
    "query heads": (
        dict(mixer="gla", linear_num_query_heads=3, linear_num_key_heads=2), "linear_num_query_heads=3.*query heads a multiple",
    ),
    "hgrn with heads": (dict(mixer="hgrn", linear_num_key_heads=2), "hgrn.*linear_num_key_heads=2.*must be 1"),
    "odd rotary width": (dict(mixer="retnet", linear_key_head_dim=7), "linear_key_head_dim=7 must be even"),
    "retnet with a convolution": (dict(mixer="retnet", linear_use_short_conv=True), "linear_use_short_conv=True.*retnet"),
    "an impossible gate": (dict(mixer="hgrn2", linear_use_output_gate=True), "linear_use_output_gate=True.*hgrn2"),
    "negative eigenvalues": (dict(mixer="gla", linear_allow_neg_eigval=True), "linear_allow_neg_eigval=True.*delta family"),
    "gate activation": (dict(linear_output_gate_act="relu"), "linear_output_gate_act='relu': use 'silu' or 'sigmoid'"),
    "hidden_act": (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported.*'silu'"),
    "no layers": (dict(num_hidden_layers=0), "num_hidden_layers=0 must be a positive integer"),
    "a negative size": (dict(vocab_size=-5), "vocab_size=-5 must be a positive integer"),
    "eps": (dict(rms_norm_eps=0.0), "rms_norm_eps=0.0 must be positive"),
    "a misspelt field": (dict(num_hidden_layer=3), "num_hidden_layer=3 is not a field.*Did you mean num_hidden_layers"),
    "a field of fla's": (dict(expand_v=2.0), "expand_v=2.0 is fla's spelling.*linear_value_head_dim"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration(name):
    fields, message = CONFIGS[name]
    given = copy.deepcopy(fields)
    with pytest.raises(ValueError, match=message):
        HybridLinearConfig(**fields)
    assert fields == given


@pytest.mark.parametrize(
    "fields",
    [dict(hidden_size="64"), dict(use_cache="no"), dict(layer_types="pure"), dict(linear_use_short_conv="yes")],
)
def test_configuration_types(fields):
    with pytest.raises((StrictDataclassFieldValidationError, ValueError), match=next(iter(fields))):
        HybridLinearConfig(**fields)


# ------------------------------------------------------------------------------------------------------------ the forward

IDS = tokens(2, 6)
ROW = tokens(1, 6)
PAD = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
TWO_DOCUMENTS = torch.tensor([[0, 1, 2, 0, 1, 2]])
CUTS = torch.tensor([0, 3, 6], dtype=torch.int32)


def cached(rows: int, columns: int, model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(rows, columns, seed=1), past_key_values=cache)
    return cache


# name: (keyword arguments of forward, or a function of the model that returns them; message)
CALLS = {
    "neither ids nor embeddings": (dict(), "exactly one of input_ids and inputs_embeds"),
    "both": (dict(input_ids=IDS, inputs_embeds=torch.zeros(2, 6, 32)), "exactly one of input_ids and inputs_embeds"),
    "an id too large": (dict(input_ids=IDS + VOCAB), f"outside the vocabulary of {VOCAB}.*tokenizer"),
    "an id too small": (dict(input_ids=IDS - VOCAB), f"input_ids holds -.*outside the vocabulary of {VOCAB}"),
    "a 1-D mask": (dict(input_ids=IDS, attention_mask=torch.ones(6)), r"1 dimensions \(shape \(6,\)\).*2-D padding mask"),
    "a 3-D mask": (
        dict(input_ids=IDS, attention_mask=torch.ones(2, 6, 6)), r"3 dimensions \(shape \(2, 6, 6\)\).*2-D padding mask",
    ),
    "a 4-D mask": (
        dict(input_ids=IDS, attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.bool)),
        r"4 dimensions \(shape \(2, 1, 6, 6\)\): a recurrent layer can only honour a 2-D padding mask",
    ),
    "a narrow mask": (dict(input_ids=IDS, attention_mask=PAD[:, 1:]), "5 columns, but there are 0 tokens.*and 6 new"),
    "a wide mask": (dict(input_ids=IDS, attention_mask=torch.ones(2, 9)), "9 columns.*must cover all 6"),
    "a mask of another batch": (dict(input_ids=IDS, attention_mask=PAD[:1]), "1 rows, but the batch has 2"),
    "a mask that forgets the past": (
        lambda m: dict(input_ids=IDS, attention_mask=PAD, past_key_values=cached(2, 4, m)),
        "6 columns, but there are 4 tokens in the cache and 6 new.*must cover all 10",
    ),
    "packing, with a cache": (
        lambda m: dict(input_ids=ROW, position_ids=TWO_DOCUMENTS, past_key_values=DynamicCache(config=m.config)),
        "position_ids restart.*with a cache: pass use_cache=False",
    ),
    "packing by lengths, with a cache": (
        lambda m: dict(input_ids=ROW, cu_seq_lens_q=CUTS, past_key_values=DynamicCache(config=m.config)),
        "do not go with a cache or with padding: pass use_cache=False",
    ),
    "packing, with padding": (
        dict(input_ids=IDS, attention_mask=PAD, position_ids=torch.tensor([[0, 0, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2]])),
        "position_ids restart.*padded row: leave attention_mask away",
    ),
    "packing by lengths, with padding": (
        dict(input_ids=ROW, attention_mask=PAD[:1], cu_seq_lens_q=CUTS), "do not go with a cache or with padding",
    ),
    "packing by seq_idx, with padding": (
        dict(input_ids=ROW, attention_mask=PAD[:1], seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1]])), "do not go with.*padding",
    ),
    "contradicting positions and lengths": (
        dict(input_ids=ROW, position_ids=TWO_DOCUMENTS, cu_seq_lens_q=torch.tensor([0, 2, 6])),
        "position_ids and cu_seq_lens_q disagree about where packed documents begin",
    ),
    "contradicting lengths and seq_idx": (
        dict(input_ids=ROW, cu_seq_lens_q=CUTS, seq_idx=torch.tensor([[0, 0, 1, 1, 1, 1]])), "disagree",
    ),
    "lengths that do not reach the end": (
        dict(input_ids=ROW, cu_seq_lens_q=torch.tensor([0, 3, 5])), r"cu_seq_lens_q=\[0, 3, 5\] must rise from 0 to.*6",
    ),
    "lengths that fall": (dict(input_ids=ROW, cu_seq_lens_q=torch.tensor([0, 4, 3, 6])), "must rise from 0"),
    "lengths of a batch": (dict(input_ids=IDS, cu_seq_lens_q=CUTS), "one flattened row, but the batch has 2"),
    "a short seq_idx": (dict(input_ids=ROW, seq_idx=torch.zeros(1, 4)), "seq_idx has 4 columns, but the row has 6"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_hidden_layers=3, dtype=torch.float32)


def clone(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def snapshot(kwargs: dict) -> dict:
    cache = kwargs.get("past_key_values")
    layers = [] if cache is None else cache.layers
    return {name: clone(value) for name, value in kwargs.items() if name != "past_key_values"} | {
        f"{i}.{name}": clone(value)
        for i, layer in enumerate(layers)
        for name, value in (
            ("state", layer.recurrent_states[0] if hasattr(layer, "recurrent_states") else layer.keys),
            ("conv", layer.conv_states[0] if hasattr(layer, "conv_states") else layer.values),
        )
    }


@pytest.mark.parametrize("name", CALLS)
def test_forward(name, model):
    kwargs, message = CALLS[name]
    kwargs = dict(kwargs(model) if callable(kwargs) else kwargs)
    before, parameters = snapshot(kwargs), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model(**kwargs)
    after = snapshot(kwargs)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value is after[key] if not isinstance(value, torch.Tensor) else torch.equal(value, after[key]), key
    assert all(torch.equal(parameters[key], value) for key, value in model.state_dict().items())
    model(IDS)  # and the model goes on working


def test_a_4d_mask_is_honoured_where_every_layer_attends():
    """A prefix that two rows share, as a tree of candidates has it: row 0 must not see token 3."""
    model = tiny_model(level="full")
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask[0, :, 4:, 3] = False
    open_mask, plain = model(IDS, attention_mask=mask.new_ones(2, 1, 6, 6).tril()), model(IDS)
    torch.testing.assert_close(open_mask.logits, plain.logits)
    hidden = model(IDS, attention_mask=mask).logits
    assert not torch.allclose(hidden[0, 5], plain.logits[0, 5])
    torch.testing.assert_close(hidden[1], plain.logits[1])


def test_generate_refuses_too(model):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model.generate(IDS + VOCAB, max_new_tokens=2)
    with pytest.raises(ValueError, match="cache holds 8 tokens, but input_ids has 3.*attention_mask that covers both"):
        model.generate(tokens(1, 3), past_key_values=cached(1, 8, model), max_new_tokens=2)


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def saved(tmp_path, model):
    model.save_pretrained(tmp_path)
    return tmp_path


def edit(folder, function) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NORM = "model.norm.weight"


def test_missing_tensors(saved):
    edit(saved, lambda t: [t.pop(NORM), t.pop("model.layers.1.linear_attn.A_log")])
    for load in (HybridLinearForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        message = (
            r"missing tensors: model\.layers\.1\.linear_attn\.A_log, model\.norm\.weight\..*download or save it again"
        )
        with pytest.raises(ValueError, match=message):
            load(saved)


def test_unexpected_tensors(saved):
    edit(saved, lambda t: t.update({"model.layers.0.linear_attn.D": torch.zeros(3), "stray": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"unexpected tensors: model\.layers\.0\.linear_attn\.D, stray\."):
        HybridLinearForCausalLM.from_pretrained(saved)


def test_tensors_of_another_shape(saved):
    edit(saved, lambda t: t.update({NORM: torch.ones(16)}))
    with pytest.raises(
        ValueError, match=r"another shape: model\.norm\.weight \[16\], here \[32\].*ignore_mismatched_sizes"
    ):
        HybridLinearForCausalLM.from_pretrained(saved)
    assert HybridLinearForCausalLM.from_pretrained(saved, ignore_mismatched_sizes=True).model.norm.weight.eq(1).all()


def test_an_edited_configuration(saved):
    """Another mixer over the same checkpoint is missing and unexpected tensors at once; the list is kept short."""
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"mixer": "delta_net", "linear_use_short_conv": False}))
    with pytest.raises(ValueError, match=r"unexpected tensors: .*linear_attn\.A_log.*its config\.json was edited"):
        HybridLinearForCausalLM.from_pretrained(saved)


def test_what_the_caller_asked_for_is_not_refused(saved):
    edit(saved, lambda t: [t.pop(NORM), t.update({"stray": torch.zeros(1)})])
    model, info = HybridLinearForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert isinstance(model, HybridLinearForCausalLM)
    assert info["missing_keys"] == {NORM} and info["unexpected_keys"] == {"stray"}


HEADS = [
    HybridLinearModel,
    HybridLinearForCausalLM,
    HybridLinearForSequenceClassification,
    HybridLinearForTokenClassification,
    HybridLinearForQuestionAnswering,
]


@pytest.mark.parametrize("target", HEADS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("source", HEADS, ids=lambda c: c.__name__)
def test_heads_may_come_and_go(source, target, tmp_path):
    """Fine-tuning starts from another head's checkpoint: the decoder is loaded, the head is new. As in transformers."""
    torch.manual_seed(1)
    source(tiny_config("gla", num_hidden_layers=3)).save_pretrained(tmp_path)
    loaded = target.from_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    base = loaded if target is HybridLinearModel else loaded.model
    prefix = "" if source is HybridLinearModel else "model."
    assert all(torch.equal(value, stored[prefix + name]) for name, value in base.state_dict().items())
    if source is target:
        assert all(torch.equal(value, stored[name]) for name, value in loaded.state_dict().items())


def test_half_a_head_is_refused(tmp_path):
    HybridLinearForTokenClassification(tiny_config("gla", num_hidden_layers=3)).save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.pop("score.bias"))
    with pytest.raises(ValueError, match=r"missing tensors: score\.bias"):
        HybridLinearForTokenClassification.from_pretrained(tmp_path)


def test_the_head_of_the_class_that_was_saved_is_not_optional(saved):
    """config.json says HybridLinearForCausalLM: without lm_head it is half a checkpoint, not a decoder's."""
    edit(saved, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing tensors: lm_head\.weight"):
        HybridLinearForCausalLM.from_pretrained(saved)
    assert AutoModelForSequenceClassification.from_pretrained(saved).score.weight.shape == (2, 32)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tied = HybridLinearForCausalLM.from_pretrained(saved)  # a tied one need not be stored
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_a_state_dict_is_checked_as_a_file_is(model):
    state = {name: value for name, value in model.state_dict().items() if name != NORM}
    with pytest.raises(ValueError, match=r"The state dict does not fit .*missing tensors: model\.norm\.weight"):
        HybridLinearForCausalLM.from_pretrained(None, config=model.config, state_dict=state)


@pytest.mark.parametrize("share", [0.9, 0.001, 0.0])
def test_a_file_cut_short(saved, share):
    path = saved / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * share))
    for load in (HybridLinearForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(OSError, match=r"model\.safetensors \(\d+ bytes\) is cut short.*download it again"):
            load(saved)


def test_one_shard_of_several_cut_short_or_lost(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-8])
    with pytest.raises(OSError, match=f"{shards[1].name}.*cut short"):
        HybridLinearForCausalLM.from_pretrained(tmp_path)
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        HybridLinearForCausalLM.from_pretrained(tmp_path)
    shards[1].write_bytes(whole)
    HybridLinearForCausalLM.from_pretrained(tmp_path)


# -------------------------------------------------------------------------------------------------------- the environment


def test_an_unknown_back_end(monkeypatch, model):
    for name, error, message in (
        ("cuda", ValueError, "HYBRID_LINEAR_BACKEND='cuda' is not a back end: use one of torch, fla, triton"),
        (
            "fla",
            RuntimeError,
            "HYBRID_LINEAR_BACKEND=fla was asked for, but it cannot serve.*CUDA.*Unset .*, or set it to torch",
        ),
    ):
        monkeypatch.setenv("HYBRID_LINEAR_BACKEND", name)
        cache = DynamicCache(config=model.config)
        with pytest.raises(error, match=message):
            model(IDS, past_key_values=cache)
        assert cache.get_seq_length() == 0
    monkeypatch.setenv("HYBRID_LINEAR_BACKEND", "torch")
    model(IDS)
