"""Batched log-likelihoods and generation are those of one row at a time, for every mixer and level."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binomtest
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.certify import build
from evaluation.scoring import Encoder, generate, load, loglikelihoods, mean_interval
from hybrid_models.suite import cell_names

from .common import tiny_model, tokens
from .small_tokenizer import bytes_alone, word_pieces

PAIRS = [
    ((1, 9), (4,)),
    ((2, 1), (1,)),
    ((3, 4), (7,)),
    ((4, 14), (2,)),
    ((5, 3), (3,)),
    ((6, 2), (3,)),
    ((7, 11), (1,)),
    ((8, 6), (5,)),
]  # (seed, context), (continuation)


def requests() -> list[tuple[list[int], list[int]]]:
    return [(tokens(n, seed=seed).tolist(), tokens(m, seed=seed + 50).tolist()) for (seed, n), (m,) in PAIRS]


def brute_force(model, context: list[int], continuation: list[int]) -> list[float]:
    """Token by token: a whole forward for each, the softmax written out."""
    found = []
    for i, token in enumerate(continuation):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation[:i]])).logits[0, -1].double()
        found.append(float(logits[token] - logits.max() - (logits - logits.max()).exp().sum().log()))
    return found


@pytest.mark.parametrize("name", [name for name in cell_names("tiny") if name[-1] not in "23456"])
def test_batches_equal_single_rows(name):
    model = build(name, torch.float32)
    asked = requests()
    found = loglikelihoods(model, asked, batch_size=8)
    for one, (context, continuation) in zip(found, asked, strict=True):
        # Of float32's rounding in another order of summation.
        assert one.token_nats == pytest.approx(brute_force(model, context, continuation), abs=1e-5)
        assert one.nats == pytest.approx(sum(one.token_nats))
    prompts = [context for context, _ in asked]
    assert len(prompts) == 8
    together = generate(model.double(), prompts, 5, batch_size=8)
    assert together == [generate(model, [prompt], 5)[0] for prompt in prompts]
    assert {len(row) for row in together} == {5}


def test_greedy_says_what_generation_writes():
    model = tiny_model("gla", "3-1")
    prompts = [context for context, _ in requests()]
    written = generate(model, prompts, 4)
    wrong = [[*row[:2], (row[2] + 1) % 101, row[3]] for row in written]
    assert all(one.greedy for one in loglikelihoods(model, list(zip(prompts, written))))
    for one in loglikelihoods(model, list(zip(prompts, wrong))):
        assert one.token_greedy[:3] == [True, True, False] and not one.greedy


def test_generation_ends_at_eos_and_ignores_the_models_own_defaults():
    model = tiny_model("retnet", "pure")
    prompt = tokens(7).tolist()
    [row] = generate(model, [prompt], 6)
    eos = row[3]
    model.generation_config.update(do_sample=True, repetition_penalty=3.0, max_new_tokens=1, eos_token_id=row[0])
    before = model.generation_config
    assert generate(model, [prompt], 6) == [row]
    assert generate(model, [prompt, prompt[:2]], 6, eos=eos)[0] == row[: row.index(eos)]
    assert model.generation_config is before


def test_a_model_that_knows_no_mask_tricks_agrees_too():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).double().eval()
    for one, (context, continuation) in zip(loglikelihoods(model, requests()), requests(), strict=True):
        assert one.token_nats == pytest.approx(brute_force(model, context, continuation), abs=1e-10)


def test_nothing_is_cut():
    model = tiny_model("hgrn", "pure")
    with pytest.raises(ValueError, match="max_length=12.*16 tokens"):
        loglikelihoods(model, requests(), max_length=12)
    with pytest.raises(ValueError, match="max_length=12.*14 tokens"):
        generate(model, [list(range(3, 13))], 4, max_length=12)
    with pytest.raises(ValueError, match="without tokens"):
        loglikelihoods(model, [([], [3])])
    with pytest.raises(ValueError, match="without tokens"):
        generate(model, [[]], 4)
    with pytest.raises(ValueError, match="batch_size=0"):
        generate(model, [[3]], 4, batch_size=0)


def test_encoder_puts_bos_where_the_tokenizer_does():
    tokenizer = word_pieces()
    encode = Encoder(tokenizer)
    assert encode("a text") == tokenizer("a text")["input_ids"] and encode("a text")[0] == tokenizer.bos_token_id
    assert encode("a text", bos=False) == encode("a text")[1:]
    assert encode.decode(encode("a text")) == "a text"
    without = Encoder(bytes_alone())
    assert without.describe()["tokenizer_sha256"] != encode.describe()["tokenizer_sha256"]


def test_spans_cover_their_parts_or_are_refused():
    encode = Encoder(word_pieces())
    ids, spans = encode.spans(["The key is", " 1234567", ", and", " 7654321"])
    assert [encode.decode(ids[a:b]) for a, b in spans[1:]] == [" 1234567", ", and", " 7654321"]
    assert ids == encode("The key is 1234567, and 7654321") and spans[0][0] == 0
    with pytest.raises(ValueError, match="merges them"):
        encode.spans(["Return the nex", "t item"])


def test_loading_refuses_what_does_not_fit(tmp_path):
    tiny_model("hgrn", "pure", torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds no usable tokenizer"):
        load(tmp_path / "model")
    word_pieces().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer of 4096 tokens, but the model has 101"):
        load(tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    with pytest.raises(OSError, match="neither a directory nor a repo id"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("right, n", [(0, 7), (3, 10), (499, 500), (20, 20)])
def test_mean_interval_is_wilsons(right, n):
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert mean_interval([1.0] * right + [0.0] * (n - right)) == pytest.approx(tuple(expected), abs=1e-6)


def test_mean_interval_of_partial_credit_holds_the_mean():
    low, high = mean_interval([0.5] * 10)
    assert low < 0.5 < high and math.isclose(low + high, 1.0)
