"""The decode step's Triton kernels against the model's own torch path, in Triton's interpreter on the CPU.

float32, tolerance 1e-5 relative to values of order one: both sides sum the same at most 64 terms in another order. What
a device adds (capture, 16 bits, large batches) is in test_gpu.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

pytest.importorskip("triton", reason="Triton is for Linux and Windows")

from hybrid_models import decode_step, decoding, triton_attention, triton_kernels  # noqa: E402
from hybrid_models.decode_step import DecodeStep, why_not, why_not_shape  # noqa: E402
from hybrid_models.triton_kernels import linear_rows  # noqa: E402
from tests.common import tiny_model, tokens  # noqa: E402

CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Wider blocks than a GPU wants: the interpreter's time goes by programs, and the arithmetic is the same."""
    monkeypatch.setattr(triton_kernels, "linear_config", lambda *_: (32, 32, 4, 1))


def rms(x, weight, eps=1e-6):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.fixture
def normal():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


# One row, a few rows (multiplied one by one) and more (tensor-core tiles).
@pytest.mark.parametrize("rows", [1, 3, 6])
class TestLinearRows:
    def test_several_weights_after_one_norm(self, rows, normal):
        x, weights, norm = normal(rows, 48), [normal(n, 48) for n in (24, 8, 2)], normal(48)
        y = torch.zeros(rows, 40)
        linear_rows(x, weights, y, norm=norm)
        torch.testing.assert_close(y[:, :34], rms(x, norm) @ torch.cat(weights).t(), **CLOSE)
        assert not y[:, 34:].any()

    @pytest.mark.parametrize("act", ["silu", "sigmoid"])
    @pytest.mark.parametrize("head", [0, 16])
    def test_gate_and_residual(self, rows, normal, head, act):
        x, weight, norm, gate, h = (
            normal(rows, 64),
            normal(20, 64),
            normal(head or 64),
            normal(rows, 64),
            normal(rows, 20),
        )
        normed = rms(x.unflatten(1, (-1, head or 64)), norm).flatten(1)
        want = h + (normed * {"silu": F.silu, "sigmoid": torch.sigmoid}[act](gate)) @ weight.t()
        linear_rows(x, [weight], h, norm=norm, head=head, gate=gate, gate_act=act, residual=True)
        torch.testing.assert_close(h, want, **CLOSE)

    def test_swiglu(self, rows, normal):
        x, gate, up, y = normal(rows, 40), normal(24, 40), normal(24, 40), torch.zeros(rows, 24)
        linear_rows(x, [gate, up], y, swiglu=True)
        torch.testing.assert_close(y, F.silu(x @ gate.t()) * (x @ up.t()), **CLOSE)

    def test_convolution(self, rows, normal):
        """Three tokens through the window: the first 12 of 20 outputs are convolved, the rest are not."""
        weights, taps, window = [normal(8, 16), normal(4, 16), normal(8, 16)], normal(12, 1, 4), normal(rows, 3, 12)
        inputs = window.clone()
        for _ in range(3):
            x, y = normal(rows, 16), torch.zeros(rows, 20)
            projected = x @ torch.cat(weights).t()
            inputs = torch.cat((inputs, projected[:, None, :12]), 1)
            linear_rows(x, weights, y, window=window, taps=taps)
            want = torch.einsum("btc,ct->bc", inputs[:, -4:], taps[:, 0])
            torch.testing.assert_close(y, torch.cat((want, projected[:, 12:]), 1), **CLOSE)
            torch.testing.assert_close(window, inputs[:, -3:], **CLOSE)


VARIANTS = {
    "hgrn": ("hgrn", {}),
    "hgrn, no bounds": ("hgrn", dict(linear_use_lower_bound=False)),
    "retnet, grouped": ("retnet", dict(linear_num_query_heads=4)),
    "gla": ("gla", {}),
    "gla, grouped, conv": ("gla", dict(linear_num_query_heads=4, linear_use_short_conv=True)),
    "hgrn2": ("hgrn2", {}),
    "delta_net, negative": ("delta_net", dict(linear_allow_neg_eigval=True)),
    "gated_delta_net": ("gated_delta_net", {}),
    "gated_delta_net, grouped, sigmoid": (
        "gated_delta_net",
        dict(
            linear_num_value_heads=4, linear_output_gate_act="sigmoid", linear_key_head_dim=12, linear_value_head_dim=8
        ),
    ),
}


def assert_same_cache(mine, cache):
    for a, b in zip(mine.layers, cache.layers, strict=True):
        pairs = [(a.keys, b.keys), (a.values, b.values)]
        if hasattr(a, "recurrent_states"):
            pairs = [(a.recurrent_states[0], b.recurrent_states[0]), (a.conv_states[0], b.conv_states[0])]
        for x, y in pairs:
            if x is not None or y is not None:
                torch.testing.assert_close(x, y, **CLOSE)


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_step_is_the_models_own(variant, rows):
    """Two tokens after a padded prompt, and what the cache then holds; two recurrent layers and one that attends."""
    mixer, fields = VARIANTS[variant]
    model = tiny_model(mixer, "3-1", torch.float32, num_hidden_layers=3, **fields)
    prompt, following = tokens(rows, 9), tokens(rows, 2, seed=1)
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    with torch.no_grad():
        cache = model(prompt, attention_mask=mask, use_cache=True).past_key_values
        step = DecodeStep(model, rows, 32)
        mine = copy.deepcopy(cache)
        step.load(mine, mask)
        for t in range(2):
            mask = F.pad(mask, (0, 1), value=1)
            want = model(following[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits[:, 0]
            got = step(following[:, t], mask.sum(1) - 1)
            torch.testing.assert_close(got, want, **CLOSE)
        step.store(mine, 2)
    assert mine.get_seq_length() == cache.get_seq_length() == 11
    assert_same_cache(mine, cache)


@pytest.mark.parametrize("which", ["none", "one row", "all rows", "first token"])
def test_greedy_on_the_device_ends_where_the_library_does(which):
    model = tiny_model("gla", "pure", torch.float32, num_hidden_layers=2)
    prompt = tokens(3, 8)
    free = model.generate(prompt, max_new_tokens=8, do_sample=False)
    eos = {
        "none": None,
        "one row": [int(free[0, 10])],
        "all rows": [int(x) for x in free[:, 11]],
        "first token": [int(free[0, 8])],
    }[which]
    want = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=eos, pad_token_id=0)
    with torch.no_grad():
        out = model(prompt, use_cache=True)
        step = DecodeStep(model, 3, 32)
        step.load(out.past_key_values, None)
        eos = None if eos is None else torch.tensor(eos)
        got = step.decode(out.logits[:, -1], torch.full((3,), 8), 6, eos, torch.tensor(0))
    assert torch.equal(torch.cat((prompt, got), 1), want)


@pytest.mark.parametrize(
    "ends,options",
    [
        (False, dict()),
        (True, dict(temperature=0.7, top_k=20)),
        (True, dict(top_p=0.8, top_k=0)),
        (True, dict(min_p=0.05, top_k=0)),
        (True, dict(repetition_penalty=1.3)),
    ],
    ids=["plain", "temperature", "top-p", "min-p", "penalty"],
)
def test_sampling_draws_what_the_library_draws(ends, options, monkeypatch):
    """The same tokens, and the same random numbers left for what comes after, on the device or (penalties) off it."""
    monkeypatch.setattr(decoding, "why_not", lambda model, *_: why_not_shape(model))
    model = tiny_model("gla", "pure", torch.float32, num_hidden_layers=2)
    prompt = tokens(3, 8)
    eos = list(range(0, 101, 3)) if ends else None  # a third of the vocabulary: rows end at different times, soon
    if ends:
        eos = eos[: decode_step.MAX_EOS]
        with torch.no_grad():  # and these likelier than the rest
            model.lm_head.weight[eos] *= 4.0
    results, states = [], []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("HYBRID_LINEAR_BACKEND", backend)
        torch.manual_seed(3)
        results.append(
            model.generate(prompt, do_sample=True, max_new_tokens=10, eos_token_id=eos, pad_token_id=0, **options)
        )
        states.append(torch.get_rng_state())
    assert torch.equal(*results) and torch.equal(*states)
    assert not ends or results[0].shape[1] < 18  # so that something was drawn in vain


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("mixer, level", [("gated_delta_net", "3-1"), ("hgrn", "pure")])
def test_a_users_cache_holds_what_the_library_leaves(mixer, level, sample, monkeypatch):
    """Two turns on one cache, padded, whose first turn ends inside a block of steps: nothing of what follows remains."""
    monkeypatch.setattr(decoding, "why_not", lambda model, *_: why_not_shape(model))
    model = tiny_model(mixer, level, torch.float32, num_hidden_layers=3)
    prompt, turn = tokens(2, 6), tokens(2, 3, seed=1)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    monkeypatch.setenv("HYBRID_LINEAR_BACKEND", "torch")
    torch.manual_seed(3)
    options = dict(do_sample=sample, max_new_tokens=7, pad_token_id=0)
    free = model.generate(prompt, attention_mask=mask, **options)
    eos = sorted({int(free[0, 7]), int(free[1, 9])})
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("HYBRID_LINEAR_BACKEND", backend)
        torch.manual_seed(3)
        cache, ids, seen = DynamicCache(config=model.config), prompt, mask
        for more in (turn, turn[:, :0]):
            out = model.generate(ids, attention_mask=seen, past_key_values=cache, eos_token_id=eos, **options)
            ids = torch.cat((out, more), 1)
            seen = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            found.append((out, cache.get_seq_length(), copy.deepcopy(cache)))
    assert found[0][0].shape[1] == 10  # of at most 13
    for (ids, length, cache), (mine, my_length, my_cache) in zip(found[:2], found[2:]):
        assert torch.equal(mine, ids) and my_length == length == ids.shape[1] - 1
        assert_same_cache(my_cache, cache)


def test_a_cache_is_given_the_room_it_needs_once(monkeypatch):
    """max_length counts the tokens that the cache holds already."""
    monkeypatch.setattr(decoding, "why_not", lambda model, *_: why_not_shape(model))
    monkeypatch.setenv("HYBRID_LINEAR_BACKEND", "triton")
    model, prompt = tiny_model("gla", "3-1", torch.float32, num_hidden_layers=3), tokens(1, 200)
    cache = model(prompt[:, :-1], use_cache=True).past_key_values
    model.generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False, eos_token_id=None)
    ((_, max_len),) = decode_step._steps[model]
    assert max_len == 256


def test_more_tokens_than_room_are_refused(monkeypatch):
    model, prompt = tiny_model("gla", "3-1", torch.float32, num_hidden_layers=3), tokens(1, 8)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        with decode_step.session(model, cache, 1, 16, keep_cache=False) as current:
            current.step.max_len = 10
            with pytest.raises(RuntimeError, match="room for 10 columns"):
                current.decode(torch.zeros(1, 101), torch.tensor([8]), None, 4, None, torch.tensor(0))
            for _ in range(2):
                current(prompt[:, :1], torch.tensor([[8]]), None)
            with pytest.raises(RuntimeError, match="room for 10 columns"):
                current(prompt[:, :1], torch.tensor([[10]]), None)


def test_a_processor_of_ones_own_takes_the_librarys_loop(monkeypatch):
    class Bare:
        __slots__ = ()  # and so without vars()

        def __call__(self, input_ids, scores):
            return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 0, float("-inf"))

    monkeypatch.setattr(decoding, "why_not", lambda model, *_: why_not_shape(model))
    monkeypatch.setenv("HYBRID_LINEAR_BACKEND", "triton")
    model = tiny_model("gla", "pure", torch.float32, num_hidden_layers=2)
    written = model.generate(tokens(2, 4), do_sample=True, max_new_tokens=3, logits_processor=[Bare()], pad_token_id=1)
    assert (written[:, 4:] % 2 == 1).all()


def test_sampling_refuses_what_is_not_a_number(monkeypatch):
    monkeypatch.setattr(decoding, "why_not", lambda model, *_: why_not_shape(model))
    monkeypatch.setenv("HYBRID_LINEAR_BACKEND", "triton")
    model = tiny_model("gla", "pure", torch.float32, num_hidden_layers=2)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not a number"):
        model.generate(tokens(2, 4), do_sample=True, max_new_tokens=3, pad_token_id=0)


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("loop", ["on the device", "the library's"])
def test_generate_with_prompts_of_single_tokens(chunk, loop, monkeypatch):
    """One-token forwards that belong to a prompt, some of them padding, must not be taken for decoding."""
    monkeypatch.setattr(decoding, "why_not", lambda model, *_: why_not_shape(model))  # lets the CPU pass
    model = tiny_model("gla", "3-1", torch.float32, num_hidden_layers=3)
    prompt = tokens(2, 1 if chunk is None else 4)
    mask = torch.ones_like(prompt)
    mask[0, : 0 if chunk is None else 2] = 0
    more = {} if loop == "on the device" else dict(return_dict_in_generate=True)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("HYBRID_LINEAR_BACKEND", backend)
        options = dict(attention_mask=mask, max_new_tokens=4, do_sample=False, prefill_chunk_size=chunk)
        out = model.generate(prompt, **options, **more)
        results.append(out.sequences if more else out)
    assert torch.equal(*results)


def test_what_it_leaves_to_the_plain_path():
    model = tiny_model("gated_delta_net", "3-1", torch.float32)
    assert "is on cpu" in why_not(model)
    assert why_not_shape(model) is None
    assert "float64" in why_not_shape(tiny_model("gla", "pure"))
    assert "sliding window" in why_not_shape(tiny_model("gla", "3-1", torch.float32, sliding_window=4))
    assert "power of two" in why_not_shape(tiny_model("gla", "pure", torch.float32, linear_value_head_dim=12))


@pytest.mark.parametrize("target", ["gk_proj.0", "embed_tokens", "lm_head", "q_proj"])
def test_adapters_are_never_bypassed(target):
    """The step reads weights past their modules, so a module that does more than multiply must be seen."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model("gla", "3-1", torch.float32)
    get_peft_model(model, LoraConfig(target_modules=[target]))
    assert "adapter" in why_not_shape(model)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 63, 64, 100])
@pytest.mark.parametrize("splits", [1, 4])
def test_attention_over_blocks_in_turn(length, splits, normal):
    """Against softmax in float64: blocks of 16 keys, with holes; the newest key is stored where it belongs."""
    B, H, HK, D, max_len = 2, 4, 2, 8, 112
    y, keys, values = normal(B, (H + 2 * HK) * D), normal(B, HK, max_len, D), normal(B, HK, max_len, D)
    valid = normal(B, max_len) > -1
    valid[:, length] = True
    before = keys.clone(), values.clone()
    position, inv_freq = torch.tensor([length, length + 3]), 1e4 ** (-torch.arange(0, D, 2) / D)
    partial, o = torch.full((B * H * splits, D + 2), float("nan")), torch.zeros(B, H * D)
    triton_attention.attend(
        *(y, keys, values, valid, torch.tensor(length), position, inv_freq, partial, o, H), config=(16, 4, 1)
    )
    q, k, v = (x.unflatten(-1, (-1, D)) for x in y.split([H * D, HK * D, HK * D], -1))
    angle = (position[:, None] * inv_freq).repeat(1, 2)[:, None]
    q, k = (x * angle.cos() + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * angle.sin() for x in (q, k))
    wanted = [x.clone() for x in before]
    wanted[0][:, :, length], wanted[1][:, :, length] = k, v
    torch.testing.assert_close((keys, values), tuple(wanted), **CLOSE)
    scores = torch.einsum("bhd,bhtd->bht", q, wanted[0].repeat_interleave(2, 1)).double() * D**-0.5
    scores = scores.masked_fill(~valid[:, None], float("-inf"))[:, :, : length + 1]
    right = torch.einsum(
        "bht,bhtd->bhd", scores.softmax(-1), wanted[1].repeat_interleave(2, 1)[:, :, : length + 1].double()
    )
    torch.testing.assert_close(o, right.flatten(1).float(), **CLOSE)


def test_splits_fill_a_card_and_no_more():
    splits = triton_attention.attention_splits
    assert splits(16, 131072) == 64 and splits(512, 131072) == 2 and splits(2048, 131072) == 1
    assert splits(16, 256) == 4  # no program without keys when the buffer is full
