"""State measures: known states, the null values of random keys, and states of models as a full forward leaves them."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from evaluation.state import main, metrics_of, probe
from evaluation.state_measures import (
    lagged_recall,
    norm_growth,
    participation_ratio,
    retained_energy,
    spectrum_measures,
    vector_measures,
)
from hybrid_models.recurrence import chunk

from .common import tiny_model, tokens
from .test_recall import word_tokenizer, written

WIDTH, HEADS, T = 64, 8, 2048  # heads are independent draws
LAGS = (16, 32, 64, 128)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------- null values


def fixed(decay: float, length: int) -> torch.Tensor:
    return torch.full((1, length, HEADS), math.log(decay), dtype=torch.float64)


def law_inputs(rule: str, length: int):
    """k, v, log_decay, beta of ``length`` random tokens: unit keys and values, but HGRN2's key is one minus its decay."""
    k, v = (F.normalize(random(1, length, HEADS, WIDTH, seed=seed), dim=-1) for seed in (1, 2))
    gate = torch.sigmoid(random(1, length, HEADS, WIDTH, seed=3))
    half = torch.full((1, length, HEADS), 0.5, dtype=torch.float64)
    if rule == "HGRN2, bound .9":
        decay = 0.9 + 0.1 * gate
        return 1 - decay, v, decay.log(), None
    return (
        k,
        v,
        *{
            "additive": (None, None),
            "RetNet 5": (fixed(1 - 2**-5, length), None),
            "RetNet 7": (fixed(1 - 2**-7, length), None),
            "RetNet 12": (fixed(1 - 2**-12, length), None),
            "GLA": (gate.log() / 16, None),
            "DeltaNet .5": (None, half),
            "DeltaNet 1": (None, 2 * half),
            "GatedDeltaNet .5, .999": (fixed(0.999, length), half),
        }[rule],
    )


NAMES = ("norm", "effective_rank", "stable_rank", "participation_ratio", "r90")
# Measured once on one draw each, and rounded as written here: NAMES at 64 tokens and at 2048, recall at LAGS and 2048.
NULL_VALUES = {
    "additive": ((8.0, 43, 11, 22, 24), (45.1, 51, 17, 31, 33), (0, 0, 0.02, 0.02)),
    "RetNet 5": ((4.0, 38, 8, 16, 20), (4.0, 39, 8, 16, 20), (1, 1, 0.73, 0.37)),
    "RetNet 7": ((6.4, 43, 10, 21, 24), (7.9, 48, 13, 26, 29), (1, 1, 0.98, 0.74)),
    "RetNet 12": ((7.9, 42, 11, 22, 24), (35.8, 51, 17, 31, 33), (0.03, 0.03, 0.04, 0.03)),
    "GLA": ((3.2, 33, 6, 13, 16), (3.2, 33, 6, 12, 16), (1, 0.94, 0.52, 0.26)),
    "HGRN2, bound .9": ((1.5, 18, 1.1, 1, 2), (1.3, 20, 1.2, 1, 4), (0.09, 0.05, 0.02, 0.01)),
    "DeltaNet .5": ((3.4, 46, 15, 27, 28), (4.6, 52, 17, 32, 33), (1, 1, 0.98, 0.72)),
    "DeltaNet 1": ((6.4, 47, 15, 28, 29), (8.0, 52, 17, 32, 33), (1, 0.98, 0.82, 0.47)),
    "GatedDeltaNet .5, .999": ((3.3, 46, 15, 26, 28), (4.3, 51, 17, 32, 33), (1, 1, 0.98, 0.71)),
}


def agrees(draws: torch.Tensor, value: float, rounding: float) -> bool:
    """One other draw, rounded, lies within three standard deviations of these."""
    return abs(float(draws.mean()) - value) <= 3 * float(draws.std()) + rounding


@pytest.mark.parametrize("rule", NULL_VALUES)
def test_random_keys_give_the_null_values(rule):
    short, long, recall = NULL_VALUES[rule]
    for length, expected in ((64, short), (T, long)):
        k, v, log_decay, beta = law_inputs(rule, length)
        state = chunk(None, k, v, log_decay, beta)[1]
        found = spectrum_measures(state[0])
        for name, value in zip(NAMES, expected):
            rounding = 0.05 if isinstance(value, float) else 0.5
            assert agrees(found[name], value, rounding), (length, name, found[name].mean(), value)
    found = torch.cat(
        [lagged_recall(state[:, h, None], k[:, :, h, None], v[:, :, h, None], LAGS) for h in range(HEADS)]
    )
    for j, value in enumerate(recall):
        # Where hardly any key is found, most draws find none and their spread says little: one key more or less.
        assert agrees(found[:, j], value, 0.005 + 1 / LAGS[j]), (LAGS[j], found[:, j].mean(), value)


def test_the_null_norms_are_those_of_theory():
    """Values of random direction do not interfere on average: energies add, decayed. Eight draws, to 2 %."""
    for rule, energy in (("additive", T), ("RetNet 5", 1 / (1 - (1 - 2**-5) ** 2)), ("DeltaNet .5", 64 * 0.25 / 0.75)):
        k, v, log_decay, beta = law_inputs(rule, T)
        norms = spectrum_measures(chunk(None, k, v, log_decay, beta)[1][0])["norm"]
        assert float(norms.mean()) == pytest.approx(energy**0.5, rel=0.02), rule


# -------------------------------------------------------------------------------------------------------------- formulas


def test_states_of_known_spectrum():
    left, right = (torch.linalg.qr(random(6, 6, seed=seed)).Q for seed in (0, 1))
    s = torch.tensor([3.0, 2.0, 1.0, 0, 0, 0], dtype=torch.float64)
    state = torch.stack((left @ torch.diag(s) @ right, left[:, :3] @ right[:3] * 5.0, torch.zeros(6, 6)))
    found = spectrum_measures(state)
    p, e = s[:3] / 6, s[:3].square() / 14
    expected = {
        "norm": (14**0.5, 75**0.5, 0),
        "effective_rank": (math.exp(-(p * p.log()).sum()), 3, 0),
        "effective_rank_energy": (math.exp(-(e * e.log()).sum()), 3, 0),
        "stable_rank": (14 / 9, 3, 0),
        "participation_ratio": (14**2 / 98, 3, 0),
        "r90": (2, 3, 0),  # 13 of 14 is more than 90 %
    }
    for name, values in expected.items():
        # Singular values are roots of the Gram matrix's eigenvalues, of which 1e-16 is rounding: 1e-8 of the entropy.
        assert found[name].tolist() == pytest.approx(values, abs=1e-6), name
    assert torch.allclose(participation_ratio(state[:2]), found["participation_ratio"][:2])


@pytest.mark.parametrize("shape", [(2, 3, 16, 5), (2, 3, 5, 16)])
def test_spectrum_is_that_of_a_singular_value_decomposition(shape):
    state = random(*shape)
    s = torch.linalg.svdvals(state)
    found = spectrum_measures(state)
    assert torch.allclose(found["stable_rank"], s.square().sum(-1) / s[..., 0].square())
    p = s / s.sum(-1, keepdim=True)
    assert torch.allclose(found["effective_rank"], (-(p * p.log()).sum(-1)).exp())


def test_vector_states():
    found = vector_measures(torch.tensor([[2.0, 2, 0, 0], [0, 0, 0, 0]]))
    assert found["norm"].tolist() == pytest.approx([8**0.5, 0]) and found["participation_ratio"].tolist() == [2, 0]


def test_norm_growth_is_the_exponent():
    lengths = [64, 128, 256, 512]
    assert norm_growth(lengths, [3 * n**0.5 for n in lengths]) == pytest.approx(0.5)
    assert norm_growth(lengths, [2.0] * 4) == pytest.approx(0)


def test_a_fixed_decay_retains_gamma_to_the_twice_lag():
    k, v, log_decay, _ = law_inputs("RetNet 5", 200)
    found = retained_energy(k, v, log_decay, None, LAGS)
    assert torch.allclose(found, torch.tensor([(1 - 2**-5) ** (2 * lag) for lag in LAGS], dtype=torch.float64))


def test_the_delta_rule_retains_what_its_transitions_leave():
    length = 40
    k, v, _, beta = law_inputs("DeltaNet .5", length)
    found = retained_energy(k, v, fixed(0.99, length), beta, (5, 37))
    for j, (lag, writes) in enumerate(((5, 16), (37, 3))):
        shares = []
        for start in range(length - lag - writes, length - lag):
            write = k[0, start, 0]
            for t in range(start + 1, start + lag + 1):
                write = 0.99 * write
                write = write - beta[0, t, 0] * k[0, t, 0] * (k[0, t, 0] @ write)
            shares.append(float(write.square().sum()))
        assert found[0, j] == pytest.approx(sum(shares) / writes)


def test_a_vector_gate_retains_its_products():
    log_decay, v = -random(2, 20, 6, seed=4).square(), random(2, 20, 6)
    shares = []
    for start in range(13):
        left = v[:, start] * log_decay[:, start + 1 : start + 8].sum(1).exp()
        shares.append(left.square().sum(-1) / v[:, start].square().sum(-1))
    found = retained_energy(None, v, log_decay, None, [7])
    assert found.shape == (1, 1) and found[0, 0] == pytest.approx(float(torch.cat(shares).mean()))


def test_orthogonal_keys_recall_everything_and_a_lost_state_nothing():
    k = torch.eye(32, dtype=torch.float64)[None, :, None]
    v = random(1, 32, 1, 16)
    state = torch.einsum("bthk,bthv->bhkv", k, v)
    assert lagged_recall(state, k, v, (8, 32)).tolist() == [[1, 1]]
    assert lagged_recall(random(1, 1, 32, 16, seed=9), k, v, (32,))[0, 0] < 0.3  # chance is one in 32
    equal = v[:, :1].expand(-1, 32, -1, -1)  # no one can tell them apart
    assert lagged_recall(torch.einsum("bthk,bthv->bhkv", k, equal), k, equal, (32,)).tolist() == [[1]]


def test_least_squares_reads_keys_that_are_all_positive():
    k, v, log_decay, beta = law_inputs("HGRN2, bound .9", 512)
    state = chunk(None, k, v, log_decay, beta)[1]
    plain, fitted = (float(lagged_recall(state, k, v, (16,), fit).mean()) for fit in (False, True))
    assert plain < 0.2 and fitted > 0.9


# ------------------------------------------------------------------------------------------------------------ the models


@pytest.mark.parametrize(
    "mixer, level",
    [
        ("hgrn", "pure"),
        ("hgrn", "3-1"),
        ("retnet", "3-1"),
        ("gla", "pure"),
        ("hgrn2", "3-1"),
        ("delta_net", "pure"),
        ("gated_delta_net", "6-1"),
    ],
)
def test_states_are_those_of_a_full_forward(mixer, level):
    model = tiny_model(mixer, level)
    ids = tokens(2, 60)
    rows = probe(model, ids, lengths=(7, 30, 60), lags=(4, 20))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    last = [row for row in rows if row["tokens"] == 60]
    linear = [i for i, kind in enumerate(model.config.layer_types) if kind == "linear_attention"]
    heads = 1 if mixer == "hgrn" else 2
    assert [(row["layer"], row["head"]) for row in last] == [(i, h) for i in linear for h in range(heads)]
    for row in last:
        state = cache.layers[row["layer"]].recurrent_states[0]
        found = vector_measures(state) if mixer == "hgrn" else spectrum_measures(state[:, row["head"]])
        for name, x in found.items():
            assert row[name] == pytest.approx(float(x.mean()), rel=1e-6), name
        assert row["mixer"] == mixer
        assert 0 <= row["recall_4"] <= 1 and 0 < row["retained_20"] < 1
        assert {name for name in row if name.startswith("null_")} == {
            f"null_{name}" for name in row if name not in ("layer", "head", "mixer", "tokens") and name[:5] != "null_"
        }
    first = [row for row in rows if row["tokens"] == 7]
    assert all("recall_4" in row and "recall_20" not in row and "norm_growth" not in row for row in first)


@pytest.mark.parametrize("mixer", ["hgrn", "hgrn2", "gated_delta_net"])
def test_segments_make_no_difference(mixer):
    """But to the null, whose directions are drawn segment by segment."""
    model, ids = tiny_model(mixer, "3-1"), tokens(1, 60)
    whole = probe(model, ids, lengths=(60,), lags=(8, 32))
    parts = [row for row in probe(model, ids, lengths=(9, 33, 60), lags=(8, 32)) if row["tokens"] == 60]
    for one, other in zip(whole, parts, strict=True):
        for name in one:
            if name != "mixer" and not name.startswith("null_"):
                # Sums in another order; a measure is kept in float64, what was written in the model's own.
                assert other[name] == pytest.approx(one[name], rel=1e-6, abs=1e-9), name


def test_retained_energy_of_retnet_is_its_decay():
    for row in probe(tiny_model("retnet", "pure"), tokens(1, 50), lengths=(50,), lags=(16,)):
        expected = (1 - 2.0 ** (-5 - row["head"])) ** 32
        assert row["retained_16"] == pytest.approx(expected, rel=1e-6) == row["null_retained_16"]


def test_the_null_has_the_writes_norms_but_not_their_directions():
    """Every token the same: the model's state has one direction, the null's many, of about the same energy per write."""
    rows = probe(tiny_model("retnet", "pure"), torch.full((1, 40), 5), lengths=(40,), lags=(8,))
    first = [row for row in rows if row["layer"] == 0]
    assert all(row["null_participation_ratio"] > 2 * row["participation_ratio"] for row in first)
    assert all(row["norm"] > row["null_norm"] > 0 for row in first)  # equal writes add up, random ones less
    again = probe(tiny_model("retnet", "pure"), torch.full((1, 40), 5), lengths=(40,), lags=(8,))
    assert again == rows
    assert probe(tiny_model("retnet", "pure"), torch.full((1, 40), 5), lengths=(40,), lags=(8,), seed=1) != rows


@pytest.mark.parametrize(
    "lengths, lags, message", [((30, 20), (4,), "increase"), ((99,), (4,), "at most 60"), ((60,), (0,), "positive")]
)
def test_probe_refuses(lengths, lags, message):
    with pytest.raises(ValueError, match=message):
        probe(tiny_model("hgrn", "pure"), tokens(1, 60), lengths=lengths, lags=lags)


def test_a_transformer_has_no_recurrent_state():
    with pytest.raises(ValueError, match="no linear-attention layer"):
        probe(tiny_model("gated_delta_net", "full"), tokens(1, 60), lengths=(60,))


# --------------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize("mixer", ["hgrn", "gated_delta_net"])
def test_command_writes_numbers_rows_and_a_picture(mixer, tmp_path, capsys):
    tiny_model(mixer, "3-1", dtype=torch.float32).save_pretrained(tmp_path / "model")
    word_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(written(100, seed=i))
    command = [str(tmp_path / "model"), "--text", str(tmp_path / "0.txt"), str(tmp_path / "1.txt"), "--device", "cpu"]
    main([*command, "--lengths", "20,80", "--lags", "8,16", "--output", str(tmp_path / "results")])
    folder = tmp_path / "results" / "model"
    one = json.loads((folder / "state.json").read_text())
    assert one["protocol"]["documents"] == 2 and one["protocol"]["lengths"] == [20, 80]
    rows = list(csv.DictReader(open(folder / "state.csv")))
    layers, heads = 4, 1 if mixer == "hgrn" else 2
    assert len(rows) == 2 * layers * heads and {"norm", "null_norm", "recall_16", "retained_8"} <= rows[0].keys()
    [metric] = [m for m in one["metrics"] if m["metric"] == "norm" and m["length"] == 80]
    mean = sum(float(row["norm"]) for row in rows if row["tokens"] == "80") / (layers * heads)
    assert metric["n"] == layers * heads and metric["value"] == pytest.approx(mean, rel=1e-5) and metric["null"] > 0
    assert (folder / "state.png").read_bytes()[:4] == b"\x89PNG"
    assert "at 80 tokens" in capsys.readouterr().out

    with pytest.raises(SystemExit) as stopped:
        main([*command, "--lengths", "500"])
    assert stopped.value.code == 2
    assert "the longest has 101" in capsys.readouterr().err


def test_metrics_are_means_over_layers_and_heads():
    where = dict(mixer="gla", tokens=64)
    rows = [{"layer": i, "head": 0, **where, "norm": float(i), "null_norm": 1.0} for i in range(3)]
    assert metrics_of(rows) == [
        {"task": "state", "metric": "norm", "value": 1.0, "n": 3, "length": 64, "null": 1.0},
    ]
