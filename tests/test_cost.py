"""Cache bytes as measured are the closed form's, for every kind of layer, and a wrong formula is noticed."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache

from evaluation.certify import build
from evaluation.cost import TIMED, main, measure, storage_bytes
from hybrid_models import HybridLinearConfig
from hybrid_models.info import cache_bytes

from .common import tiny_model, tokens

CELLS = [
    "tiny-HGRN-pure",
    "tiny-RetNet-hybrid-3-1",
    "tiny-GLA-hybrid-6-1",
    "tiny-HGRN2-pure",
    "tiny-DeltaNet-hybrid-3-1",
    "tiny-GatedDeltaNet-hybrid-6-1",
    "tiny-Transformer-seed1",
]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_of_the_closed_form(name, dtype):
    model = build(name, dtype)
    own = model.generation_config
    cost = measure(model, 50, batch=2)
    assert cost.measured == cost.expected and cost.tokens == 50
    assert cost.measured.kv == 2 * 50 * model.config.kv_bytes_per_token(dtype.itemsize)
    layers = model.config.layer_types
    assert cost.transformer.kv * layers.count("full_attention") == cost.measured.kv * len(layers)
    # The prompt leaves less than the end, but for the memory behind views.
    assert cost.held >= cost.measured.state
    assert len(cost.token_ms) == TIMED and cost.token_ms == sorted(cost.token_ms) and cost.token_ms[0] > 0
    assert cost.first_token_s > 0
    assert model.generation_config is own


def test_an_end_of_text_does_not_end_the_measurement():
    model = build("tiny-GLA-hybrid-3-1", torch.float32)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely, greedy decoding writes token 0
    model.generation_config.eos_token_id = 0
    assert measure(model, 40).tokens == 40


@pytest.mark.parametrize("method", ["state_bytes", "kv_bytes_per_token"])
def test_a_wrong_formula_is_noticed(method, monkeypatch):
    right = getattr(HybridLinearConfig, method)
    monkeypatch.setattr(HybridLinearConfig, method, lambda self, width: round(1.02 * right(self, width)))
    with pytest.raises(RuntimeError, match="state:" if method == "state_bytes" else "kv:"):
        measure(build("tiny-HGRN2-hybrid-3-1", torch.float32), 50)


def test_too_short_a_context_is_refused():
    with pytest.raises(ValueError, match="at least 34"):
        measure(build("tiny-HGRN-pure", torch.float32), 33)


def test_storage_counts_what_views_keep_alive_once():
    model = tiny_model("delta_net", "3-1")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 64), past_key_values=cache)
    whole = storage_bytes(cache)
    for layer in cache.layers:
        if getattr(layer, "conv_states", None):
            layer.conv_states[0] = layer.conv_states[0].clone()
            layer.recurrent_states[0] = layer.recurrent_states[0].clone()
    assert whole >= storage_bytes(cache) == cache_bytes(cache).total
    cache.layers[0].conv_states[0] = cache.layers[0].recurrent_states[0]
    assert storage_bytes(cache) < cache_bytes(cache).total


def test_command_on_a_cell(tmp_path, capsys):
    main(["tiny-DeltaNet-hybrid-3-1", "--lengths", "40,80", "--device", "cpu", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "+0.00%" in printed and "ms/token" in printed
    one = json.loads((tmp_path / "tiny-DeltaNet-hybrid-3-1" / "cost-cpu-float32-batch1.json").read_text())
    found = {(m["metric"], m["length"]): m for m in one["metrics"]}
    assert found["kv_bytes", 80]["value"] == found["kv_bytes", 80]["closed_form"] == 2 * found["kv_bytes", 40]["value"]
    assert found["state_bytes", 80]["value"] == found["state_bytes", 40]["value"] > 0
    assert found["ms_per_token", 80]["n"] == TIMED and len(found["ms_per_token", 80]["quartiles"]) == 2
    assert one["weights_sha256"] is None


def test_command_on_a_checkpoint(tmp_path):
    build("tiny-HGRN-pure", torch.float32).save_pretrained(tmp_path / "model")
    main([str(tmp_path / "model"), "--lengths", "40", "--device", "cpu", "--output", str(tmp_path)])
    one = json.loads((tmp_path / "model" / "cost-cpu-float32-batch1.json").read_text())
    assert one["model"] == "model" and one["weights_sha256"]


@pytest.mark.parametrize("arguments, message", [(["tiny-HGRN3-pure"], "tiny-HGRN2-pure"), (["--lengths", "9"], "34")])
def test_command_refuses_in_one_line(arguments, message, capsys):
    target = [] if arguments[0].startswith("tiny") else ["tiny-HGRN-pure"]
    with pytest.raises(SystemExit) as stopped:
        main([*target, *arguments, "--device", "cpu"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
