"""Every generate() mode, on every kind of model.

One test, ``test_every_mode``, runs each function marked ``@mode`` on each model: with and without a short convolution,
vector and matrix states, all-linear, mixed, all-attention, and mixed with a sliding window. What a mode has to give is
worked out without it: greedy decoding from full forwards of the whole sequence (no cache, no generate()), the other modes
from generate(use_cache=False), row by row where there is padding.

Models are float64, so that a tie between two tokens cannot hide behind rounding: tokens must be equal, all of them.
generate() rounds logits to float32 before it returns or samples them; hence the tolerance of 1e-5 on logits of order one.
"""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, PreTrainedTokenizerFast, StaticCache
from transformers.cache_utils import Cache, Fp8QuantizedLayer
from transformers.generation import ContinuousBatchingConfig

from .common import REPRESENTATIVES, VOCAB, tiny_model, tokens

SLIDING = ("gla", "3-1", "window")
LOGITS = dict(rtol=1e-5, atol=1e-5)  # float32 logits, see above
NEW = 12
# A few token ids that end a sequence. One in ten, so that rows and beams end at different lengths.
EOS = list(range(3, VOCAB, 10))
MODES = {}
KNOWN = weakref.WeakKeyDictionary()


def mode(function):
    MODES[function.__name__.removeprefix("mode_")] = function
    return function


# --------------------------------------------------------------------------------------------------------------- helpers


@functools.cache
def model_of(arch):
    return tiny_model(*arch[:2], **({"sliding_window": 5} if arch[2:] else {}))


@functools.cache
def draftable(arch):
    """A model whose first layers often, not always, agree with the whole: its later ones write little."""
    model = copy.deepcopy(model_of(arch))
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            mixer = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
            mixer.o_proj.weight *= 0.25
            layer.mlp.down_proj.weight *= 0.25
    return model


def naive(model, row, new=NEW, eos=()) -> list[int]:
    """Greedy continuation of a 1-D prompt by full forwards."""
    known = KNOWN.setdefault(model, {})  # many modes ask the same question
    key = (*row.tolist(), -1, new, *eos)
    if key not in known:
        ids = row[None]
        with torch.no_grad():
            for _ in range(new):
                ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
                if int(ids[0, -1]) in eos:
                    break
        known[key] = ids[0, len(row) :].tolist()
    return known[key]


def greedy(model, ids, new=NEW, **kwargs):
    return model.generate(ids, max_new_tokens=new, do_sample=False, **kwargs)


def check_greedy(model, prompt, **kwargs):
    got = greedy(model, prompt, **kwargs)
    assert got[:, prompt.shape[1] :].tolist() == [naive(model, row) for row in prompt]


def check_same_as_uncached(model, prompt, seed=None, **kwargs):
    def run(**more):
        if seed is not None:
            torch.manual_seed(seed)
        return model.generate(prompt, max_new_tokens=NEW, **kwargs, **more)

    want = run(use_cache=False)
    assert torch.equal(run(), want)
    return want


def check_logits(model, output, prompt_length: int):
    """Raw logits of a generation = those of one full forward over what was generated."""
    with torch.no_grad():
        full = model(output.sequences, use_cache=False).logits[:, prompt_length - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, 1), full.float(), **LOGITS)


def padded(rows, side: str):
    """Rows of different lengths as one batch: input_ids and attention_mask."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


ROWS = [tokens(4, seed=1), tokens(9, seed=2), tokens(1, seed=3), tokens(7, seed=4)]


def check_padded(model, side, **kwargs):
    ids, mask = padded(ROWS, side)
    got = greedy(model, ids, attention_mask=mask, **kwargs)
    assert got[:, ids.shape[1] :].tolist() == [naive(model, row) for row in ROWS]


@contextmanager
def rollbacks():
    """What Cache.crop was asked for meanwhile: a list of negative numbers and zeros."""
    asked, crop = [], Cache.crop

    def spy(cache, tokens_to_remove):
        asked.append(int(tokens_to_remove))
        crop(cache, tokens_to_remove)

    with mock.patch.object(Cache, "crop", spy):
        yield asked


def has_linear(model) -> bool:
    return "linear_attention" in model.config.layer_types


# ------------------------------------------------------------------------------------------------------------ plain modes


@mode
def mode_greedy(arch):
    check_greedy(model_of(arch), tokens(1, 9))
    check_greedy(model_of(arch), tokens(3, 5))


@mode
def mode_no_cache(arch):
    check_greedy(model_of(arch), tokens(2, 7), use_cache=False)


@mode
def mode_one_token_prompt(arch):
    check_greedy(model_of(arch), tokens(2, 1))


@mode
def mode_sampling(arch):
    check_same_as_uncached(model_of(arch), tokens(2, 6), seed=3, do_sample=True)


@mode
def mode_sampling_several_sequences(arch):
    out = check_same_as_uncached(model_of(arch), tokens(2, 6), seed=4, do_sample=True, num_return_sequences=3, top_k=20)
    assert out.shape[0] == 6 and len({tuple(row) for row in out.tolist()}) == 6


@mode
def mode_beams(arch):
    check_same_as_uncached(model_of(arch), tokens(2, 6), num_beams=4, do_sample=False, eos_token_id=EOS)


@mode
def mode_beams_several_sequences(arch):
    out = check_same_as_uncached(
        model_of(arch), tokens(2, 6), num_beams=4, num_return_sequences=3, do_sample=False, length_penalty=0.5
    )
    assert out.shape[0] == 6


@mode
def mode_beam_sample(arch):
    check_same_as_uncached(model_of(arch), tokens(2, 6), seed=5, num_beams=3, do_sample=True, eos_token_id=EOS)


@mode
def mode_padded_beams(arch):
    model = model_of(arch)
    ids, mask = padded(ROWS, "left")
    got = model.generate(ids, attention_mask=mask, num_beams=3, do_sample=False, max_new_tokens=NEW)
    for row, line in zip(ROWS, got):
        alone = model.generate(row[None], num_beams=3, do_sample=False, max_new_tokens=NEW, use_cache=False)
        assert line[ids.shape[1] :].tolist() == alone[0, len(row) :].tolist()


@mode
def mode_left_padding(arch):
    check_padded(model_of(arch), "left")


@mode
def mode_right_padding(arch):
    check_padded(model_of(arch), "right")


@mode
def mode_rows_that_end_early(arch):
    """A finished row goes on being fed pad tokens; the others must not notice."""
    model = model_of(arch)
    ids, mask = padded(ROWS, "left")
    got = greedy(model, ids, attention_mask=mask, eos_token_id=EOS)[:, ids.shape[1] :].tolist()
    for row, line in zip(ROWS, got):
        want = naive(model, row, eos=EOS)
        assert line == want + [model.config.pad_token_id] * (len(line) - len(want))


@mode
def mode_inputs_embeds(arch):
    model, prompt = model_of(arch), tokens(2, 7)
    embeds = model.get_input_embeddings()(prompt)
    want = [naive(model, row) for row in prompt]
    assert greedy(model, None, inputs_embeds=embeds).tolist() == want
    both = greedy(model, prompt, inputs_embeds=embeds)
    assert both.tolist() == torch.cat((prompt, torch.tensor(want)), 1).tolist()


@mode
def mode_guidance(arch):
    """Classifier-free guidance runs a second, unconditional sequence with a cache of its own."""
    model, prompt = model_of(arch), tokens(1, 6)
    plain = greedy(model, prompt)
    guided = check_same_as_uncached(model, prompt, do_sample=False, guidance_scale=3.0)
    negative = check_same_as_uncached(
        model, prompt, do_sample=False, guidance_scale=3.0, negative_prompt_ids=tokens(1, 4, seed=9)
    )
    assert not torch.equal(guided, plain) and not torch.equal(guided, negative)


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.reshape(-1))

    def end(self):
        self.ended = True


@mode
def mode_streamer(arch):
    for kwargs in ({}, {"prompt_lookup_num_tokens": 2}):
        streamer = Collector()
        out = greedy(model_of(arch), tokens(1, 6), streamer=streamer, **kwargs)
        assert streamer.ended and torch.equal(torch.cat(streamer.pieces), out[0])


@mode
def mode_custom_generate(arch):
    """A decoding loop of the user's own, on the model's generation hooks."""

    def loop(model, input_ids, generation_config=None, logits_processor=None, stopping_criteria=None, **model_kwargs):
        first = True
        while input_ids.shape[1] < generation_config.max_length:
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=None if first else 1, is_first_iteration=first, **model_kwargs
            )
            output = model(**inputs)
            input_ids = torch.cat((input_ids, output.logits[:, -1:].argmax(-1)), 1)
            model_kwargs = model._update_model_kwargs_for_generation(output, model_kwargs)
            first = False
        return input_ids

    check_greedy(model_of(arch), tokens(2, 6), custom_generate=loop)


@mode
def mode_position_ids(arch):
    """Given positions that say what is true anyway change nothing."""
    check_greedy(model_of(arch), tokens(2, 6), position_ids=torch.arange(6).expand(2, -1))


@mode
def mode_return_dict(arch):
    model, prompt = model_of(arch), tokens(2, 6)
    kwargs = dict(return_dict_in_generate=True, output_logits=True, output_scores=True, output_hidden_states=True)
    out = greedy(model, prompt, **kwargs)
    check_logits(model, out, 6)
    kinds = model.config.layer_types
    assert len(out.logits) == len(out.scores) == len(out.hidden_states) == NEW
    assert [h[-1].shape[1] for h in out.hidden_states] == [6] + [1] * (NEW - 1)
    assert all(len(h) == len(kinds) + 1 for h in out.hidden_states)
    assert isinstance(out.past_key_values, DynamicCache) and len(out.past_key_values.layers) == len(kinds)
    assert out.past_key_values.get_seq_length() == 6 + NEW - 1
    static = greedy(model, prompt, cache_implementation="static", **kwargs)
    assert isinstance(static.past_key_values, StaticCache)
    assert torch.equal(static.sequences, out.sequences)
    beams = model.generate(prompt, num_beams=2, do_sample=False, max_new_tokens=4, **kwargs)
    assert len(beams.beam_indices) == 2


# ------------------------------------------------------------------------------------------ modes that take tokens back


def check_assisted(arch, prompt=None, sample=False, **kwargs):
    """Equal to greedy, or for sampling the model's own logits at every step; some drafts accepted, some rejected."""
    model = draftable(arch)
    prompt = tokens(1, 9) if prompt is None else prompt
    with rollbacks() as asked:
        torch.manual_seed(6)
        out = model.generate(
            prompt, max_new_tokens=2 * NEW, do_sample=sample, return_dict_in_generate=True, output_logits=True, **kwargs
        )
    check_logits(model, out, prompt.shape[1])
    if not sample:
        assert out.sequences[0, prompt.shape[1] :].tolist() == naive(model, prompt[0], 2 * NEW)
    return out, asked


def assistant_of(arch):
    """A smaller model: the first half of the layers of ``draftable``, its embeddings and its head."""
    big = draftable(arch)
    config = copy.deepcopy(big.config)
    config.num_hidden_layers //= 2
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    small = type(big)(config).to(torch.float64).eval()
    shapes = {name: parameter.shape for name, parameter in small.named_parameters()}
    small.load_state_dict({k: v for k, v in big.state_dict().items() if shapes.get(k) == v.shape}, strict=False)
    return small


@mode
def mode_assisted(arch):
    out, asked = check_assisted(arch, assistant_model=assistant_of(arch))
    # The target's crops are the ones at the end of a round; with drafts of up to 20 tokens both kinds must be there.
    assert any(n < 0 for n in asked), "no draft was rejected: the test saw no rollback"
    assert len(out.logits) > len(asked) / 2, "no draft was accepted"


@mode
def mode_assisted_by_another_kind(arch):
    """The assistant may be of another family: here a Transformer, or a GLA for the Transformer."""
    other = ("gla", "pure") if not has_linear(model_of(arch)) else ("gated_delta_net", "full")
    check_assisted(arch, assistant_model=model_of(other))


@mode
def mode_assisted_sampling(arch):
    check_assisted(arch, assistant_model=assistant_of(arch), sample=True)
    check_assisted(arch, prompt_lookup_num_tokens=3, sample=True)


@mode
def mode_prompt_lookup(arch):
    for number in (1, 4):
        check_assisted(arch, prompt=torch.cat((tokens(1, 6), tokens(1, 6)), 1), prompt_lookup_num_tokens=number)


@mode
def mode_early_exit(arch):
    rejected = False
    for exit_after in range(1, model_of(arch).config.num_hidden_layers):
        _, asked = check_assisted(arch, assistant_early_exit=exit_after)
        rejected |= any(n < 0 for n in asked)
        assert model_of(arch).config.num_hidden_layers == len(model_of(arch).config.layer_types)
    assert rejected


@mode
def mode_universal_assisted(arch):
    """The assistant has a tokenizer of its own: drafts go through text, and may span several of its tokens."""
    target_tokenizer, assistant_tokenizer = tokenizers()
    kwargs = dict(tokenizer=target_tokenizer, assistant_tokenizer=assistant_tokenizer)
    for sample in (False, True):
        check_assisted(arch, sample=sample, assistant_model=universal_assistant(sample), **kwargs)


@functools.cache
def universal_assistant(sample: bool):
    """For sampling the library prunes the assistant's head, once for a pair of tokenizers: each way has its own model."""
    return tiny_model("hgrn", "pure", vocab_size=len(tokenizers()[1]), seed=3)


@functools.cache
def tokenizers():
    """One of single characters, and one with other ids and 40 pairs of characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = [chr(0x4E00 + i) for i in range(VOCAB)]
    single = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=characters[0]))
    single.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    pairs = list(itertools.pairwise(characters[20:60]))
    vocabulary = [*reversed(characters), *(a + b for a, b in pairs)]
    paired = Tokenizer(models.BPE({c: i for i, c in enumerate(vocabulary)}, pairs))
    for tokenizer in (single, paired):
        tokenizer.decoder = decoders.Fuse()
    return tuple(
        PreTrainedTokenizerFast(tokenizer_object=t, clean_up_tokenization_spaces=False) for t in (single, paired)
    )


@mode
def mode_assisted_outputs(arch):
    """Scores, hidden states and attentions of a lossless mode are those of greedy decoding, one entry per token.

    Of the tokens accepted in the very first round the library (5.23) returns columns of the prompt, for every model; so
    hidden states and attentions are compared in shape everywhere, and in value at the prompt and at the last token.
    """
    model = draftable(arch)
    assistant = assistant_of(arch)
    assistant.generation_config.num_assistant_tokens = 3
    model.set_attn_implementation("eager")
    try:
        kwargs = dict(
            return_dict_in_generate=True, output_scores=True, output_hidden_states=True, output_attentions=True
        )
        prompt = torch.cat((tokens(1, 4), tokens(1, 4)), 1)
        want = greedy(model, prompt, **kwargs)
        for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
            got = greedy(model, prompt, **how, **kwargs)
            assert torch.equal(got.sequences, want.sequences)
            torch.testing.assert_close(torch.stack(got.scores), torch.stack(want.scores), **LOGITS)
            recorded = [(got.hidden_states, want.hidden_states)]
            if "full_attention" in model.config.layer_types:
                recorded.append((got.attentions, want.attentions))
            for ours, theirs in recorded:
                assert [[x.shape for x in step] for step in ours] == [[x.shape for x in step] for step in theirs]
                torch.testing.assert_close(ours[0], theirs[0])
                torch.testing.assert_close(ours[-1], theirs[-1])
    finally:
        model.set_attn_implementation("sdpa")


@mode
def mode_contrastive_needs(arch):
    """Contrastive search lives on the Hub by now. This is its loop: repeat the cache for k candidates, select one."""
    model, prompt, k, alpha = model_of(arch), tokens(2, 6), 4, 0.6

    def search(cached: bool):
        ids, cache = prompt, DynamicCache(config=model.config) if cached else None
        rows = torch.arange(2)
        with torch.no_grad():
            out = model(ids, past_key_values=cache, use_cache=cached, output_hidden_states=True)
            context = out.hidden_states[-1]
            for _ in range(8):
                chances, candidates = out.logits[:, -1].softmax(-1).topk(k)
                if cached:
                    cache.batch_repeat_interleave(k)
                    out = model(candidates.reshape(-1, 1), past_key_values=cache, output_hidden_states=True)
                else:
                    tried = torch.cat((ids.repeat_interleave(k, 0), candidates.reshape(-1, 1)), 1)
                    out = model(tried, use_cache=False, output_hidden_states=True)
                hidden = out.hidden_states[-1][:, -1:]
                similar = torch.cosine_similarity(context.repeat_interleave(k, 0), hidden, -1).amax(-1).view(2, k)
                best = ((1 - alpha) * chances - alpha * similar).argmax(-1)
                chosen = rows * k + best
                if cached:
                    cache.batch_select_indices(chosen)
                out.logits, hidden = out.logits[chosen], hidden[chosen]
                context = torch.cat((context, hidden), 1)
                ids = torch.cat((ids, candidates[rows, best][:, None]), 1)
        return ids

    assert torch.equal(search(cached=True), search(cached=False))


# ----------------------------------------------------------------------------------------------------- prefill and caches


@mode
def mode_chunked_prefill(arch):
    model = model_of(arch)
    for size in (1, 4, 50):
        check_greedy(model, tokens(2, 9), prefill_chunk_size=size)
        check_padded(model, "left", prefill_chunk_size=size)
    if has_linear(model):
        with pytest.raises(ValueError, match="prefill_chunk_size.*[Pp]ad on the left"):
            check_padded(model, "right", prefill_chunk_size=2)


@mode
def mode_static(arch):
    model = model_of(arch)
    check_greedy(model, tokens(2, 9), cache_implementation="static")
    check_greedy(model, tokens(2, 5), cache_implementation="static", max_cache_len=64)
    check_padded(model, "left", cache_implementation="static")
    check_padded(model, "right", cache_implementation="static")


@mode
def mode_static_chunked_prefill(arch):
    for size in (1, 4):
        check_greedy(model_of(arch), tokens(2, 9), prefill_chunk_size=size, cache_implementation="static")
        check_padded(model_of(arch), "left", prefill_chunk_size=size, cache_implementation="static")


@mode
def mode_static_beams(arch):
    model, prompt = model_of(arch), tokens(2, 6)
    kwargs = dict(num_beams=3, do_sample=False, max_new_tokens=NEW, eos_token_id=EOS)
    want = model.generate(prompt, use_cache=False, **kwargs)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **kwargs), want)


@mode
def mode_offloaded(arch):
    """Offloading needs an accelerator to offload from: on a CPU it is refused before anything is computed."""
    for implementation in ("offloaded", "offloaded_static"):
        with pytest.raises(ValueError, match="offloaded.*accelerator"):
            greedy(model_of(arch), tokens(1, 4), cache_implementation=implementation)


@mode
def mode_quantized(arch):
    """Keys and values in 8 bits, states as they are. Without attention layers nothing is quantised: exact."""
    model, prompt = model_of(arch), tokens(2, 9)
    kwargs = dict(cache_implementation="quantized", cache_config={"backend": "fp8"})
    if "full_attention" not in model.config.layer_types:
        return check_greedy(model, prompt, **kwargs)
    out = greedy(model, prompt, return_dict_in_generate=True, output_logits=True, **kwargs)
    cache = out.past_key_values
    kinds = ["linear_attention" if layer_is_ours(layer) else "full_attention" for layer in cache.layers]
    assert kinds == model.config.layer_types and cache.get_seq_length() == 9 + NEW - 1
    assert all(layer_is_ours(layer) or isinstance(layer, Fp8QuantizedLayer) for layer in cache.layers)
    # e4m3 keeps 4 significant bits: keys and values are off by up to 6 %. Logits, of order one here, by less than that
    # of their range; a state that was lost would show as a difference of order one.
    with torch.no_grad():
        full = model(out.sequences, use_cache=False).logits[:, 8:-1]
    error = (torch.stack(out.logits, 1) - full).abs()
    assert error[:, 0].max() < 1e-5  # the prefill attends to what it has just computed
    assert 0 < error.max() < 0.06 * (full.max() - full.min())


def layer_is_ours(layer) -> bool:
    return getattr(layer, "is_hybrid_linear", False)


@mode
def mode_returned_cache(arch):
    """Several turns on one cache: the whole text so far is passed, and only what is new is computed."""
    model, ids, cache = model_of(arch), tokens(2, 6), None
    for turn in range(3):
        out = greedy(
            model, ids, new=5, past_key_values=cache, return_dict_in_generate=True,
            attention_mask=torch.ones_like(ids),  # else generate() takes a generated pad token for padding
        )  # fmt: skip
        assert out.sequences[:, ids.shape[1] :].tolist() == [naive(model, row, 5) for row in ids]
        cache = out.past_key_values
        ids = torch.cat((out.sequences, tokens(2, 3, seed=20 + turn)), 1)


@mode
def mode_returned_cache_padded(arch):
    """The same with rows of different lengths, padded on either side in each turn."""
    model = model_of(arch)
    for sides in itertools.product(("left", "right"), repeat=2):
        ids, mask = padded(ROWS, sides[0])
        out = greedy(model, ids, new=5, attention_mask=mask, return_dict_in_generate=True)
        texts = [torch.cat((row, line[ids.shape[1] :])) for row, line in zip(ROWS, out.sequences)]
        news = [tokens(n, seed=30 + n) for n in (2, 1, 5, 3)]
        new_ids, new_mask = padded(news, sides[1])
        mask = torch.cat((mask, torch.ones(4, 5, dtype=torch.long), new_mask), 1)
        second = greedy(
            model, torch.cat((out.sequences, new_ids), 1), attention_mask=mask, past_key_values=out.past_key_values
        )
        want = [naive(model, torch.cat((text, new))) for text, new in zip(texts, news)]
        assert second[:, mask.shape[1] :].tolist() == want, sides


@mode
def mode_returned_cache_of_assisted(arch):
    """A cache that was rolled back goes on as one that never was, and stops recording."""
    model = draftable(arch)
    prompt = torch.cat((tokens(1, 5), tokens(1, 5)), 1)
    first = greedy(model, prompt, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
    ids = torch.cat((first.sequences, tokens(1, 2, seed=8)), 1)
    second = greedy(model, ids, past_key_values=first.past_key_values, return_dict_in_generate=True)
    assert second.sequences[0, ids.shape[1] :].tolist() == naive(model, ids[0])
    assert not any(getattr(layer, "segments", None) for layer in second.past_key_values.layers)


@mode
def mode_prompt_cache(arch):
    """A prompt computed once and copied for each continuation; and the new tokens alone, with a mask over everything."""
    model, system = model_of(arch), tokens(1, 7)
    prompt_cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(system, past_key_values=prompt_cache)
    for seed in (1, 2):
        whole = torch.cat((system, tokens(1, 3, seed=seed)), 1)
        got = greedy(model, whole, past_key_values=copy.deepcopy(prompt_cache))
        assert got[0, 10:].tolist() == naive(model, whole[0])
        alone = greedy(
            model, whole[:, 7:], past_key_values=copy.deepcopy(prompt_cache),
            attention_mask=torch.ones(1, 10, dtype=torch.long),
        )  # fmt: skip
        assert alone[0, 3:].tolist() == naive(model, whole[0])
    assert prompt_cache.get_seq_length() == 7


@mode
def mode_user_static_cache(arch):
    model = model_of(arch)
    cache = StaticCache(config=model.config, max_cache_len=40)
    for seed in (1, 2):
        check_greedy(model, tokens(2, 6, seed=seed), past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0


@mode
def mode_user_dynamic_cache_reset(arch):
    model = model_of(arch)
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        for seed in (1, 2):
            check_greedy(model, tokens(2, 6, seed=seed), past_key_values=cache)
            cache.reset()


# -------------------------------------------------------------------------------------------------------- compiled steps


@mode
def mode_compiled_generate(arch):
    """Static cache and fullgraph: one graph, for a second call and for a shorter one too."""
    model = copy.deepcopy(model_of(arch))
    torch._dynamo.reset()
    compile_config = CompileConfig(fullgraph=True, mode=None, backend="eager")
    compile_config._compile_all_devices = True
    kwargs = dict(cache_implementation="static", compile_config=compile_config)
    torch._dynamo.utils.counters.clear()
    check_greedy(model, tokens(2, 9), **kwargs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check_greedy(model, tokens(2, 9, seed=1), **kwargs)
        check_greedy(model, tokens(2, 5, seed=2), **kwargs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@mode
def mode_compiled_step(arch):
    """The user's own loop over a compiled step: no mask, no positions, everything from the static cache."""
    model, prompt = copy.deepcopy(model_of(arch)), tokens(2, 6)
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    want = torch.tensor([naive(model_of(arch), row) for row in prompt])
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        got = [model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)]
        got.append(step(got[-1], past_key_values=cache).logits.argmax(-1))
        with torch._dynamo.config.patch(error_on_recompile=True):
            while len(got) < NEW:
                got.append(step(got[-1], past_key_values=cache).logits.argmax(-1))
    assert torch.equal(torch.cat(got, 1), want)


# --------------------------------------------------------------------------------------------------- continuous batching


@mode
def mode_continuous_batching(arch):
    """Refused with a remedy where a layer is recurrent; the library's own for an all-attention model."""
    model, prompt = model_of(arch), tokens(2, 6)
    if not has_linear(model):
        return check_continuous_batching(model, prompt)
    for call in (
        lambda: model.generate_batch(prompt.tolist(), max_new_tokens=2),
        lambda: model.init_continuous_batching(),
        lambda: model.generate(prompt, max_new_tokens=2, cache_implementation="paged"),
    ):
        with pytest.raises(NotImplementedError, match=r"recurrent state.*generate\(\) on a padded batch"):
            call()


def check_continuous_batching(model, prompt):
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # By default the paged cache takes nine tenths of the memory.
    paging = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=32)
    out = copy.deepcopy(model).generate_batch(
        prompt.tolist(), generation_config=settings, continuous_batching_config=paging, progress_bar=False
    )
    assert [out[name].generated_tokens for name in sorted(out)] == [naive(model, row, 6) for row in prompt]


# ---------------------------------------------------------------------------------------------------------------- the test


@pytest.mark.parametrize("arch", [*REPRESENTATIVES, SLIDING], ids="-".join)
@pytest.mark.parametrize("name", MODES)
def test_every_mode(name, arch):
    MODES[name](arch)
