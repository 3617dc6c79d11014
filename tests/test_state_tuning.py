"""State tuning: S0 is the state of a cache without tokens, exact, differentiable, saved and refused where it makes no sense."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from tests.common import REPRESENTATIVES, tiny_model, tokens
from training.state_tuning import DESCRIPTION, WEIGHTS, InitialState, begin_from, describe, initial_cache

WITH_STATE = [(mixer, level) for mixer, level in REPRESENTATIVES if level != "full"]


def random_states(model, seed: int = 0) -> InitialState:
    states = InitialState(model.config).to(model.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for state in states.states.values():
            state.copy_(0.3 * torch.randn(state.shape, generator=generator, dtype=torch.float64))
    return states


@torch.no_grad()
def logits(model, ids, states=None, **inputs):
    cache = None if states is None else initial_cache(model, states, ids.shape[0])
    return model(input_ids=ids, past_key_values=cache, **inputs).logits


@pytest.mark.parametrize("tokens_", [1, 9], ids=["one-token", "nine"])
@pytest.mark.parametrize("mixer,level", WITH_STATE)
def test_zero_states_are_the_plain_model_bit_for_bit(mixer, level, tokens_):
    model = tiny_model(mixer, level, torch.float32)
    ids = tokens(2, tokens_)
    assert torch.equal(logits(model, ids, InitialState(model.config)), logits(model, ids))
    options = dict(max_new_tokens=6, do_sample=False)
    cache = initial_cache(model, InitialState(model.config), 2)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))


@pytest.mark.parametrize("mixer", ["hgrn", "gla"])
def test_a_prefix_state_continues_after_the_prefix(mixer):
    """All-linear models without rotary positions and convolution: the state is everything that a prefix leaves behind."""
    model = tiny_model(mixer, "pure")
    prefix, ids = tokens(1, 13, seed=1), tokens(1, 8, seed=2)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prefix, past_key_values=cache)
        whole = model(input_ids=torch.cat((prefix, ids), 1)).logits[:, 13:]
        states = InitialState(model.config).double()
        for i, state in states.states.items():
            state.copy_(cache.layers[int(i)].recurrent_states[0][0])
    found = logits(model, ids, states)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)  # float64 rounding; logits are of order one
    assert (found - logits(model, ids)).abs().max() > 1e-3, "the prefix must matter"


@pytest.mark.parametrize("mixer,level", WITH_STATE)
def test_rows_are_independent_of_padding_and_of_the_batch(mixer, level):
    """float64, rounding only: 1e-10, as in the invariance certificate."""
    model = tiny_model(mixer, level)
    states = random_states(model)
    ids, mask = tokens(3, 10), torch.ones(3, 10, dtype=torch.long)
    alone = [logits(model, ids[i : i + 1, 4 * i :], states)[0] for i in range(2)]
    for side in ("left", "right"):
        padded = ids.clone()
        if side == "left":
            mask[1, :4], mask[1, 4:] = 0, 1
        else:
            padded[1, :6], mask[1, :6], mask[1, 6:] = ids[1, 4:], 1, 0
        found = logits(model, padded, states, attention_mask=mask)
        row = found[1, 4:] if side == "left" else found[1, :6]
        torch.testing.assert_close(found[0], alone[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(row, alone[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mixer,level", WITH_STATE)
def test_generate_begins_from_the_states(mixer, level):
    """With padding on the left, in a batch, greedy with and without cached steps, and with beams."""
    model = tiny_model(mixer, level)
    states = random_states(model)
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    out = model.generate(
        ids, attention_mask=mask, past_key_values=initial_cache(model, states, 2), max_new_tokens=5, do_sample=False
    )
    for row, start in ((0, 3), (1, 0)):
        text = ids[row : row + 1, start:]
        for _ in range(5):
            text = torch.cat((text, logits(model, text, states)[:, -1:].argmax(-1)), 1)
        assert torch.equal(out[row, start:], text[0])
    beams = dict(max_new_tokens=4, num_beams=3, do_sample=False)
    two = model.generate(ids, attention_mask=mask, past_key_values=initial_cache(model, states, 6), **beams)
    one = model.generate(ids[1:], past_key_values=initial_cache(model, states, 3), **beams)
    assert torch.equal(two[1], one[0])
    assert (logits(model, ids, states) - logits(model, ids)).abs().max() > 1e-3, "the states must matter"


@pytest.mark.parametrize("mixer,level", WITH_STATE)
def test_gradients_reach_every_state_and_are_right(mixer, level):
    """Against a central difference of the loss along a random direction; float64, so 1e-5 of the slope is generous."""
    model = tiny_model(mixer, level).requires_grad_(False)
    states, direction = random_states(model), random_states(model, seed=1)
    ids = tokens(2, 9)

    def loss():  # not the model's own, which is in float32
        with begin_from(model, states):
            return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    slope = 0.0
    for name, state in states.states.items():
        assert state.grad.abs().max() > 0, name
        slope += (state.grad * direction.states[name].detach()).sum().item()

    def moved(step):
        with torch.no_grad():
            for name, state in states.states.items():
                state.add_(step * direction.states[name])
            value = loss().item()
            for name, state in states.states.items():
                state.sub_(step * direction.states[name])
        return value

    measured = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert measured == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_saved_and_loaded(tmp_path):
    model = tiny_model("hgrn", "3-1", torch.float32)
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    states = random_states(model)
    states.save(tmp_path / "tuned")
    assert sorted(path.name for path in (tmp_path / "tuned").iterdir()) == [DESCRIPTION, WEIGHTS]
    described = json.loads((tmp_path / "tuned" / DESCRIPTION).read_text())
    assert described["mixers"] == ["hgrn"] and described["parameters"] == 4 * 32
    ids = tokens(2, 6)
    with torch.no_grad():
        found = model(input_ids=ids, past_key_values=initial_cache(model, tmp_path / "tuned", 2)).logits
    assert torch.equal(found, logits(model, ids, states))
    assert "128 numbers in 4 of 6 layers" in describe(states)


def test_what_makes_no_sense_is_refused(tmp_path):
    full = tiny_model("gla", "full")
    with pytest.raises(ValueError, match="every layer is full attention.*lora or full"):
        InitialState(full.config)
    model = tiny_model("gla", "3-1", torch.float32)
    random_states(model).save(tmp_path)
    with pytest.raises(ValueError, match="tuned for another model: layers.0"):
        initial_cache(tiny_model("gla", "3-1", linear_key_head_dim=4), tmp_path)
    with pytest.raises(ValueError, match="another model: layers.2 is absent there"):
        initial_cache(tiny_model("gla", "pure"), tmp_path)
    with pytest.raises(FileNotFoundError, match="--method s0"):
        initial_cache(model, tmp_path / "elsewhere")
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(ValueError, match="cut short or damaged"):
        initial_cache(model, tmp_path)
    ids = tokens(1, 6)
    with begin_from(model, InitialState(model.config)):
        with pytest.raises(ValueError, match="packing=False"):
            model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 3, 6]))
        with pytest.raises(ValueError, match="position_ids restart"):
            model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
        model.train().activation_checkpointing_enable()
        with pytest.raises(ValueError, match="gradient_checkpointing"):
            model(input_ids=ids)
    model.eval()(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))  # the hook is gone
