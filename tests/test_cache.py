"""The recurrent layer of transformers' caches, by itself: what it stores, how it is rearranged, rolled back and refused.

A cache is right when it equals the one that a single forward over the same tokens fills; so every test compares with such
a cache, or with what was there before. float64 throughout: 1e-10 leaves room for sums in another order and nothing else.
"""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hybrid_models import HybridLinearModel
from hybrid_models.cache import TOKENS_KEPT_UNDOABLE, adopt

from .common import REPRESENTATIVES, tiny_config, tiny_model, tokens

RECURRENT = [arch for arch in REPRESENTATIVES if arch[1] != "full"]
CLOSE = dict(rtol=1e-10, atol=1e-10)
IDS = tokens(3, 13)
LEFT = torch.ones(3, 13, dtype=torch.long)
LEFT[1, :4] = LEFT[2, :9] = 0
HOLES = LEFT.clone()
HOLES[0, 6:8] = HOLES[2, 12:] = 0

both_kinds = pytest.mark.parametrize("arch", [("hgrn", "pure"), ("gated_delta_net", "3-1")], ids="-".join)
every_kind = pytest.mark.parametrize("arch", RECURRENT, ids="-".join)


@functools.cache
def model_of(arch):
    # Three layers: two linear ones, and attention or a third.
    return tiny_model(*arch, num_hidden_layers=3)


def empty(model, kind="dynamic"):
    return StaticCache(model.config, max_cache_len=40) if kind == "static" else DynamicCache(config=model.config)


@torch.no_grad()
def fill(model, ids, cache=None, mask=None, sizes=None):
    """Run ``ids`` into a cache, in forwards of the given sizes; returns the cache and the last logits."""
    cache = empty(model) if cache is None else cache
    adopt(cache, model.config)
    past = int(cache.get_seq_length())
    for part in ids.split(ids.shape[1] if sizes is None else sizes, dim=1):
        past += part.shape[1]
        out = model(part, past_key_values=cache, attention_mask=None if mask is None else mask[:, :past])
    return cache, out.logits[:, -1]


def tensors(cache) -> list[torch.Tensor]:
    """Everything that the cache stores for the next forward."""
    return [x for layer in cache.layers for x in tensors_of(layer)]


def tensors_of(layer) -> list[torch.Tensor]:
    ours = getattr(layer, "is_hybrid_linear", False)
    found = [layer.recurrent_states[0], layer.conv_states[0]] if ours else [layer.keys, layer.values]
    return [x for x in found if x is not None]


def assert_same(cache, want, mask=None) -> None:
    """``mask``: keys and values of padded columns mean nothing and are left out."""
    length = int(want.get_seq_length())
    assert int(cache.get_seq_length()) == length
    for layer, wanted in zip(cache.layers, want.layers, strict=True):
        for a, b in zip(tensors_of(layer), tensors_of(wanted), strict=True):
            if mask is not None and not getattr(layer, "is_hybrid_linear", False):
                a, b = (x * mask[:, None, :length, None] for x in (a, b))
            torch.testing.assert_close(a, b, **CLOSE)


def contents(cache) -> list:
    """A snapshot that shows any change at all, also of types, flags and records."""
    layers = getattr(cache, "layers", [])
    stored = [x.clone() for x in tensors(cache)]
    flags = [(type(x), dict(getattr(x, "has_previous_state", {})), len(getattr(x, "segments", ()))) for x in layers]
    seen = [int(getattr(x, "seen_tokens", 0)) for x in layers]
    return [type(cache), len(layers), cache.layer_class_to_replicate, flags, seen, stored]


def assert_unchanged(cache, before) -> None:
    *facts, stored = contents(cache)
    *facts_before, stored_before = before
    assert facts == facts_before
    assert all(torch.equal(a, b) for a, b in zip(stored, stored_before, strict=True))


# ------------------------------------------------------------------------------------------------------- what it answers


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@every_kind
def test_counts(arch, kind):
    """Lengths count columns, padding included, for caches with and without attention layers."""
    model = model_of(arch)
    cache, _ = fill(model, IDS, empty(model, kind), LEFT, sizes=[9, 1, 3])
    assert int(cache.get_seq_length()) == 13
    assert cache.batch_size == 3 and len(cache) == 3
    width, offset = cache.get_mask_sizes(2, 0)
    attends = "full_attention" in model.config.layer_types
    assert (int(width), offset) == (40 if kind == "static" and attends else 15, 0)
    assert isinstance(cache, StaticCache if kind == "static" else DynamicCache)
    assert cache.is_compileable == (kind == "static") and cache.is_croppable == (kind == "dynamic")
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    again, _ = fill(model, IDS[:, :5], cache)
    assert int(again.get_seq_length()) == 5


@both_kinds
def test_dtypes(arch):
    """States in float32 for 16-bit weights, the convolution's inputs as they come."""
    model = copy.deepcopy(model_of(arch)).float().to(torch.bfloat16)
    cache, _ = fill(model, IDS)
    layer = cache.layers[0]
    assert layer.recurrent_states[0].dtype == torch.float32
    assert layer.conv_states[0] is None or layer.conv_states[0].dtype == torch.bfloat16
    assert tensors(fill(model_of(arch), IDS)[0])[0].dtype == torch.float64


@pytest.mark.parametrize("mask", [None, LEFT, HOLES], ids=["no padding", "left", "holes"])
@every_kind
def test_chunks_fill_it_as_one_forward_does(arch, mask):
    model = model_of(arch)
    want, want_logits = fill(model, IDS, mask=mask)
    for sizes in ([1] * 13, [2, 3, 8], [12, 1]):
        cache, logits = fill(model, IDS, mask=mask, sizes=sizes)
        assert_same(cache, want, mask)
        rows = slice(None) if mask is None else mask[:, -1].bool()
        torch.testing.assert_close(logits[rows], want_logits[rows], **CLOSE)


# -------------------------------------------------------------------------------------------------- rearranging the batch


@pytest.mark.parametrize("recording", [False, True], ids=["plain", "recording"])
@every_kind
def test_rearranging_is_recomputing(arch, recording):
    """Beam search reorders, num_return_sequences repeats, contrastive search selects; records follow their rows."""
    model = model_of(arch)
    for method, argument, rows in (
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_select_indices", torch.tensor([2, 1]), [2, 1]),
    ):
        cache = empty(model)
        if recording:
            adopt(cache, model.config)
            cache.activate_past_recording()
        fill(model, IDS, cache, LEFT, sizes=[9, 4])
        getattr(cache, method)(argument)
        ids, mask = IDS[rows], LEFT[rows]
        if recording:
            cache.crop(-6)
            ids, mask = ids[:, :7], mask[:, :7]
        assert_same(cache, fill(model, ids, mask=mask)[0], mask)


def test_rearranging_before_the_first_forward_does_nothing():
    model = model_of(("gla", "pure"))
    cache = empty(model)
    adopt(cache, model.config)
    before = contents(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0]))
    assert not hasattr(cache.layers[0], "batch_size") and cache.batch_size == -1
    assert_unchanged(cache, before)


# ---------------------------------------------------------------------------------------------------------------- rollback


def recording_cache(model, ids=IDS, mask=None, sizes=(5, 1, 3, 4)):
    cache = empty(model)
    adopt(cache, model.config)
    cache.activate_past_recording()
    return fill(model, ids, cache, mask, list(sizes))[0]


@pytest.mark.parametrize("mask", [None, LEFT], ids=["no padding", "left"])
@every_kind
def test_rollback_is_never_having_been_there(arch, mask):
    """Any number of tokens, across forwards, down to nothing; and the same logits afterwards."""
    model = model_of(arch)
    for remove in range(14):
        cache = recording_cache(model, mask=mask)
        cache.crop(-remove)
        keep = 13 - remove
        if keep == 0:
            assert cache.get_seq_length() == 0 and not any(x.numel() for x in tensors(cache))
        else:
            assert_same(cache, fill(model, IDS[:, :keep], mask=mask)[0], mask)
        if remove:
            _, logits = fill(model, IDS[:, keep:], cache, mask)
            torch.testing.assert_close(logits, fill(model, IDS, mask=mask)[1], **CLOSE)


@every_kind
def test_rollback_again_and_again(arch):
    """What a rollback leaves stays undoable, also the rest of a forward of which a part was taken back."""
    model = model_of(arch)
    cache = recording_cache(model, IDS[:, :9], sizes=[6, 3])
    cache.crop(-2)  # 7 left, one of them of the second forward
    cache.crop(0)
    fill(model, IDS[:, 7:10], cache)
    cache.crop(-5)  # 5 left: into the first forward
    assert_same(cache, fill(model, IDS[:, :5])[0])
    fill(model, IDS[:, 5:], cache)
    assert_same(cache, fill(model, IDS)[0])


@every_kind
def test_crop_refuses_what_it_cannot_do(arch):
    model = model_of(arch)
    unused = empty(model)
    adopt(unused, model.config)
    unused.crop(-3)
    unused.crop(0)
    assert unused.get_seq_length() == 0

    cache = recording_cache(model)
    before = contents(cache)
    with pytest.raises(RuntimeError, match=r"crop\(-14\).*more tokens than the 13.*activate_past_recording"):
        cache.crop(-14)
    with pytest.raises(ValueError, match=r"crop\(1\).*negative"):
        cache.crop(1)
    assert_unchanged(cache, before)

    plain, _ = fill(model, IDS)
    before = contents(plain)
    plain.crop(0)
    with pytest.raises(RuntimeError, match="more tokens than the 0"):
        plain.crop(-1)
    assert_unchanged(plain, before)


@both_kinds
def test_a_forward_that_was_not_recorded_ends_the_record(arch):
    """Else an old record would be replayed as if nothing had come after it."""
    model = model_of(arch)
    cache = recording_cache(model, IDS[:, :9], sizes=[9])
    for layer in cache.layers:
        layer.record_past = False
    fill(model, IDS[:, 9:], cache)
    with pytest.raises(RuntimeError, match="more tokens than the 0"):
        cache.crop(-1)


@both_kinds
def test_the_record_is_bounded(arch):
    """Assisted decoding crops after every round; what stays recorded must not grow with the text."""
    model = model_of(arch)
    cache = recording_cache(model)
    for round in range(30):
        fill(model, tokens(3, 4, seed=round), cache)
        cache.crop(-(round % 4))
        recorded = sum(segment.tokens for segment in cache.layers[0].segments)
        assert recorded < TOKENS_KEPT_UNDOABLE + 13  # the first forwards are dropped whole
    assert TOKENS_KEPT_UNDOABLE <= recorded


@both_kinds
def test_a_cache_of_assisted_decoding_does_not_grow_when_used_on(arch):
    model, prompt = model_of(arch), tokens(1, 3).repeat(1, 3)
    out = model.generate(
        prompt, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3, return_dict_in_generate=True
    )
    cache = out.past_key_values
    assert cache.layers[0].record_past and cache.layers[0].segments
    model.generate(out.sequences, max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert not any(getattr(layer, "record_past", False) or getattr(layer, "segments", ()) for layer in cache.layers)


def test_static_caches_refuse_to_record():
    model = model_of(("gla", "pure"))
    cache = empty(model, "static")
    adopt(cache, model.config)
    with pytest.raises(ValueError, match="static cache cannot take tokens back.*dynamic"):
        cache.activate_past_recording()


# ------------------------------------------------------------------------------------------------------ copies and modes


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "recording"])
@every_kind
def test_copies_are_independent(arch, kind, duplicate):
    model = model_of(arch)
    make = (lambda: recording_cache(model, IDS[:, :9], sizes=[9])) if kind == "recording" else (
        lambda: fill(model, IDS[:, :9], empty(model, kind))[0]
    )  # fmt: skip
    cache = make()
    before = contents(cache)
    copied = duplicate(cache)
    fill(model, IDS[:, 9:], copied)
    assert_unchanged(cache, before)
    assert_same(copied, fill(model, IDS, empty(model, "static" if kind == "static" else "dynamic"))[0])
    if kind == "recording":
        copied.crop(-6)
        assert_same(copied, fill(model, IDS[:, :7])[0])


@every_kind
def test_static_states_stay_where_they_are(arch):
    """CUDA graphs and compiled steps hold addresses: prefill, steps, reset and reorder must write in place."""
    model = model_of(arch)
    cache, _ = fill(model, IDS[:, :9], empty(model, "static"))
    places = [x.data_ptr() for x in tensors(cache)]
    for _ in range(2):
        fill(model, IDS[:, 9:], cache, sizes=1)
        cache.reorder_cache(torch.tensor([0, 1, 2]))
        dynamic, _ = fill(model, IDS)
        for layer, want in zip(cache.layers, dynamic.layers):
            if getattr(layer, "is_hybrid_linear", False):
                torch.testing.assert_close(layer.recurrent_states[0], want.recurrent_states[0], **CLOSE)
        if "full_attention" in model.config.layer_types:
            assert [x.data_ptr() for x in tensors(cache)][:-2] == places[:-2]  # the library moves keys when reordering
        else:
            assert [x.data_ptr() for x in tensors(cache)] == places
        cache.reset()
        assert not any(x.any() for x in tensors(cache)[:-2])
        fill(model, IDS[:, :9], cache)


@every_kind
def test_a_cache_made_in_inference_mode_goes_on_outside(arch):
    model = model_of(arch)
    with torch.inference_mode():
        cache, _ = fill(model, IDS[:, :9])
        model(IDS[:, 9:10], past_key_values=cache)
    fill(model, IDS[:, 10:], cache)
    assert_same(cache, fill(model, IDS)[0])


@every_kind
def test_gradients_flow_through_a_cache(arch):
    """Two cached forwards have the gradient of one: truncated backpropagation is the caller's choice, not the cache's."""
    model = copy.deepcopy(model_of(arch))
    targets = tokens(3, 5, seed=5)

    def gradients(logits):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    want = gradients(model(IDS, use_cache=False).logits[:, -5:])
    cache = empty(model)
    model(IDS[:, :8], past_key_values=cache)
    got = gradients(model(IDS[:, 8:], past_key_values=cache).logits)
    for name in want:
        torch.testing.assert_close(got[name], want[name], **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    assert any("v_proj" in name or "i_proj" in name for name in want)


# ------------------------------------------------------------------------------------------------------------- adoption


@both_kinds
def test_a_cache_without_a_configuration(arch):
    """DynamicCache() knows no layers; the first forward gives it the right ones. The object stays the caller's."""
    model = model_of(arch)
    cache = DynamicCache()
    with torch.no_grad():
        out = model(IDS, past_key_values=cache)
    assert out.past_key_values is cache
    assert_same(cache, fill(model, IDS)[0])


def prefix_cache(layers: int = 3) -> DynamicCache:
    """What PEFT's prefix tuning passes: keys and values at every index."""
    cache = DynamicCache()
    for i in range(layers):
        cache.update(torch.randn(3, 1, 4, 16).double(), torch.randn(3, 1, 4, 16).double(), i)
    return cache


def other(mixer="gated_delta_net", level="3-1", **fields):
    """A used cache of another model."""
    return fill(tiny_model(mixer, level, **{"num_hidden_layers": 3, **fields}), IDS)[0]


FOREIGN = {
    "prefix tuning": (prefix_cache, "keys and values for layers that have none.*prefix tuning"),
    "another depth": (lambda: other(num_hidden_layers=6), "6 layers, but the model has 3"),
    "a Transformer's": (lambda: other(level="full"), "DynamicLayer at layer 0, which is a linear_attention"),
    "all-linear": (lambda: other(level="pure"), "RecurrentLayer at layer 2, which is a full_attention"),
    "other heads": (lambda: other(linear_num_key_heads=4), r"sizes \[\(4, .*\] per sequence at layer 0"),
    "other widths": (lambda: other(linear_value_head_dim=8), r"sizes .* at layer 0"),
    "no convolution": (lambda: other(linear_use_short_conv=False), r"sizes \[\(2, 16, 16\)\] per sequence at layer 0"),
    "another kernel": (lambda: other(linear_conv_kernel_dim=3), r"sizes .*\(2, 96\)\] per sequence at layer 0"),
    "a vector state": (lambda: other("hgrn"), r"sizes \[\(32,\)\] per sequence at layer 0"),
    "other attention heads": (lambda: other(num_attention_heads=4), r"sizes \[\(1, 8\)\] per sequence at layer 2"),
    "another batch": (lambda: fill(model_of(("gated_delta_net", "3-1")), IDS[:2])[0], "holds 2 sequences.*batch has 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_caches_are_refused_untouched(name):
    make, message = FOREIGN[name]
    model, cache = model_of(("gated_delta_net", "3-1")), make()
    before = contents(cache)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(IDS, past_key_values=cache)
    assert_unchanged(cache, before)
    with pytest.raises(ValueError, match=message):
        model.generate(tokens(3, 20), past_key_values=cache, max_new_tokens=2)
    assert_unchanged(cache, before)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_another_batch_is_refused_before_the_first_layer(kind):
    """Also where the first layer attends: its keys must not have been extended when the second one refuses."""
    model = tiny_model(level=None, layer_types=["full_attention", "linear_attention"], num_hidden_layers=2)
    cache, _ = fill(model, IDS, empty(model, kind))
    for batch in (1, 4):
        before = contents(cache)
        with pytest.raises(ValueError, match=f"holds 3 sequences.*batch has {batch}.*batch_select_indices"):
            fill(model, tokens(batch, 2), cache)
        assert_unchanged(cache, before)
    cache.reset()
    if kind == "static":  # its buffers keep their sizes; a batch of one would be broadcast into them
        with pytest.raises(ValueError, match="holds 3 sequences"):
            model(tokens(1, 2), past_key_values=cache)
    else:
        fill(model, tokens(1, 2), cache)


def test_all_attention_models_check_too():
    model = tiny_model(level="full")
    for make, message in (
        (lambda: other(level="full", num_hidden_layers=3), "3 layers, but the model has 2"),
        (lambda: other(level="pure", num_hidden_layers=2), "RecurrentLayer at layer 0, which is a full_attention"),
        (lambda: other(level="full", num_hidden_layers=2, head_dim=8), r"\(1, 8\)\].*this model has \[\(1, 16\)\]"),
    ):
        cache = make()
        before = contents(cache)
        with pytest.raises(ValueError, match=message), torch.no_grad():
            model(IDS, past_key_values=cache)
        assert_unchanged(cache, before)
    cache = DynamicCache()
    fill(model, IDS, cache)
    assert len(cache.layers) == 2


def test_a_used_layer_of_the_librarys_own_is_refused():
    model = model_of(("gla", "pure"))
    cache = empty(model)
    cache.layers[1].update_conv_state(torch.ones(3, 4, 4), conv_kernel_size=4)
    with pytest.raises(ValueError, match="used LinearAttentionLayer at layer 1.*another model"):
        model(IDS, past_key_values=cache)


def test_what_is_no_cache_is_refused():
    model = model_of(("gla", "pure"))
    with pytest.raises(ValueError, match="past_key_values is a tuple.*DynamicCache"):
        model(IDS, past_key_values=((torch.zeros(1), torch.zeros(1)),))


def test_adoption_keeps_the_recording_flag_and_the_containers():
    config = tiny_config("gla", "3-1", num_hidden_layers=3)
    cache = DynamicCache(config=config)
    cache.activate_past_recording()
    adopt(cache, config)
    assert type(cache) is DynamicCache and [x.record_past for x in cache.layers[:2]] == [True, True]
    layers = list(cache.layers)
    adopt(cache, config)
    assert all(a is b for a, b in zip(cache.layers, layers, strict=True))  # once is enough
    headless = HybridLinearModel(config)
    assert headless(IDS, past_key_values=DynamicCache(config=config)).past_key_values.get_seq_length() == 13


@pytest.mark.parametrize("arch", RECURRENT, ids="-".join)
def test_a_prefill_leaves_no_prompt_sized_memory_behind(arch):
    """A window or state that is a view of all steps would keep them alive until the next token."""
    cache = model_of(arch)(tokens(1, 90), use_cache=True).past_key_values
    for layer in cache.layers:
        for tensor in (getattr(layer, "recurrent_states", {}).get(0), getattr(layer, "conv_states", {}).get(0)):
            if tensor is not None:
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
