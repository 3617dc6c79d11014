"""The certificate passes for all 36 architectures, and has teeth: it fails where the code is broken, for each of six faults."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig

from evaluation.certify import PROPERTIES, TOLERANCES, build, certify, main
from evaluation.probe import Probe, deviation, randomize
from hybrid_models import HybridLinearConfig, HybridLinearForCausalLM, modeling_hybrid_linear
from hybrid_models.cache import RecurrentLayer
from hybrid_models.layout import TokenLayout
from hybrid_models.modeling_hybrid_linear import RotaryPositions
from hybrid_models.suite import cell_names

# An interpreter started for remote code takes some seconds: one cell per mixer, with both kinds of layer, does it.
WITH_CLEAN_PROCESS = [name for name in cell_names("tiny") if name.endswith(("hybrid-3-1", "seed1"))]


@pytest.mark.parametrize("name", cell_names("tiny"))
def test_passes_for_every_architecture_in_float64(name):
    certificate = certify(build(name), clean_process=name in WITH_CLEAN_PROCESS)
    assert certificate.passed, f"\n{certificate}"
    assert {row.property for row in certificate.rows} == set(PROPERTIES)


@pytest.mark.parametrize("name", cell_names("tiny"))
def test_passes_for_every_architecture_in_float32(name):
    # Rounding differs, the paths through generate() do not: the deep cells leave out what is mostly generate().
    only = [1, 2, 3, 7, 8] if name.endswith(("24-1", "12-1")) else PROPERTIES
    certificate = certify(build(name, torch.float32), only=only, clean_process=False)
    assert certificate.passed, f"\n{certificate}"


VARIANTS = {
    "grouped heads, a window in one layer": dict(
        mixer="gated_delta_net",
        ratio="2-1",
        num_hidden_layers=4,
        linear_num_value_heads=4,
        per_layer_config={1: {"sliding_window": 7, "num_key_value_heads": 4}},
    ),
    "windows alone": dict(ratio="full", num_hidden_layers=2, sliding_window=6, attention_bias=True),
    "a mixer of every kind, attention first": dict(
        mixer=["gla", "delta_net", "hgrn2", "retnet", "gated_delta_net"],
        layer_types=["full_attention", *["linear_attention"] * 4],
        num_hidden_layers=5,
        linear_num_key_heads=None,
    ),
    "convolutions where they are optional": dict(
        mixer="gla", ratio="3-1", num_hidden_layers=3, linear_use_short_conv=True, linear_num_query_heads=4
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_passes_for_what_the_suite_does_not_hold(variant):
    fields = dict(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_num_key_heads=2,
    )
    config = HybridLinearConfig(**{**fields, **VARIANTS[variant]})
    certificate = certify(randomize(HybridLinearForCausalLM(config)).double(), clean_process=False)
    assert certificate.passed, f"\n{certificate}"


# ------------------------------------------------------------------------------------------------------------- the teeth
# Each fault replaces a real function by one that is wrong in one respect, as a slip in the code would be.


def drop_the_pad_mask(monkeypatch):
    monkeypatch.setattr(TokenLayout, "from_mask", classmethod(lambda cls, mask: cls()))


def skip_the_reorder_of_recurrent_state(monkeypatch):
    monkeypatch.setattr(RecurrentLayer, "reorder_cache", lambda self, beam_idx: None)


def forget_a_packed_boundary(monkeypatch):
    right = modeling_hybrid_linear.read_packing

    def wrong(*args):
        reset, position_ids = right(*args)
        if reset is not None:
            reset = reset.clone()
            reset[0, reset[0].nonzero()[-1]] = False  # the last document of the first row
        return reset, position_ids

    monkeypatch.setattr(modeling_hybrid_linear, "read_packing", wrong)


def shift_the_rotary_position_of_a_decoded_token(monkeypatch):
    right = RotaryPositions.forward
    monkeypatch.setattr(RotaryPositions, "forward", lambda self, x, ids: right(self, x, ids + (ids.shape[1] == 1)))


def keep_the_state_on_rollback(monkeypatch):
    right = RecurrentLayer.crop

    def wrong(self, tokens_to_remove):
        state = self.recurrent_states[0]
        right(self, tokens_to_remove)
        if self.has_previous_state[0]:
            self.recurrent_states[0] = state

    monkeypatch.setattr(RecurrentLayer, "crop", wrong)


def drop_the_conv_state(monkeypatch):
    right = RecurrentLayer.read
    monkeypatch.setattr(RecurrentLayer, "read", lambda self, *args: (None, right(self, *args)[1]))


# fault, an architecture that has what it breaks, the property that is about it
TEETH = [
    (drop_the_pad_mask, "tiny-HGRN-pure", 2),
    (drop_the_pad_mask, "tiny-DeltaNet-hybrid-3-1", 2),
    (skip_the_reorder_of_recurrent_state, "tiny-HGRN2-hybrid-3-1", 5),
    (skip_the_reorder_of_recurrent_state, "tiny-GatedDeltaNet-pure", 5),
    (forget_a_packed_boundary, "tiny-GLA-pure", 3),
    (forget_a_packed_boundary, "tiny-HGRN-hybrid-3-1", 3),
    (shift_the_rotary_position_of_a_decoded_token, "tiny-RetNet-pure", 1),
    (shift_the_rotary_position_of_a_decoded_token, "tiny-GatedDeltaNet-hybrid-6-1", 1),
    (shift_the_rotary_position_of_a_decoded_token, "tiny-Transformer-seed1", 1),
    (keep_the_state_on_rollback, "tiny-RetNet-hybrid-3-1", 6),
    (keep_the_state_on_rollback, "tiny-HGRN-pure", 6),
    (drop_the_conv_state, "tiny-DeltaNet-pure", 1),
    (drop_the_conv_state, "tiny-GatedDeltaNet-hybrid-3-1", 1),
]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("fault, name, number", TEETH, ids=lambda x: getattr(x, "__name__", str(x)))
def test_fails_when_the_code_is_broken(fault, name, number, dtype, monkeypatch):
    model = build(name, dtype)
    assert certify(model, only=[number]).passed
    fault(monkeypatch)
    certificate = certify(model, only=[number, 7], clean_process=False)
    assert not certificate.passed
    assert certificate.failed_properties == {number}, f"\n{certificate}"


def test_a_check_that_raises_is_a_failed_check(monkeypatch):
    def broken(self, repeats):
        raise AttributeError("no such thing")

    monkeypatch.setattr(RecurrentLayer, "batch_repeat_interleave", broken)
    certificate = certify(build("tiny-HGRN-pure"), only=[1, 5])
    assert certificate.failed_properties == {5}
    assert "AttributeError: no such thing" in str(certificate)


# ------------------------------------------------------------------------------------------------------- its own workings


@pytest.mark.parametrize("name", [name for name in cell_names("tiny") if name.endswith(("pure", "24-1", "seed1"))])
def test_every_parameter_of_a_fresh_cell_shows_in_the_logits(name):
    probe = Probe(build(name))
    ids = probe.tokens(1, 30)
    gradients = probe.gradients(torch.randn(30, 101, dtype=torch.float64), dict(input_ids=ids))
    assert min(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-4


def test_a_deviation_is_relative_to_the_scale_and_never_hides_what_is_wrong():
    x = torch.randn(1000, dtype=torch.float64)
    assert deviation(x, x) == 0
    assert deviation(x + 1e-3, x) == pytest.approx(1e-3, rel=0.1)
    assert deviation(100 * x + 1e-3, 100 * x) == pytest.approx(1e-5, rel=0.1)
    assert deviation(1e-6 * x + 1e-3, 1e-6 * x) == pytest.approx(1e-3, rel=0.1)
    assert deviation(x.float(), x) == 0  # generate() rounds
    assert deviation(x.float() + 1e-6, x) > 1e-7
    assert deviation(x, x[:-1]) == deviation(x * float("nan"), x) == deviation(x, x * float("inf")) == float("inf")


def test_leaves_the_model_and_the_random_state_as_they_were():
    model = build("tiny-HGRN2-hybrid-3-1", torch.float32).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, generation_config, state = model.config.to_diff_dict(), model.generation_config, torch.get_rng_state()
    assert certify(model, clean_process=False).passed
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    saving_adds = ("architectures", "auto_map", "dtype")
    assert {k: v for k, v in model.config.to_diff_dict().items() if k not in saving_adds} == config
    assert model.generation_config is generation_config
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not model.is_activation_checkpointing
    assert all(parameter.grad is None for parameter in model.parameters())


def test_command_on_a_cell(tmp_path, capsys):
    assert main(["tiny-HGRN-pure", "--only", "1", "4", "--json", str(tmp_path / "certificate.json")]) == 0
    shown = capsys.readouterr().out
    assert "token by token" in shown and "PASS" in shown and "offloading needs CUDA" in shown
    written = json.loads((tmp_path / "certificate.json").read_text())
    assert written["passed"] and written["dtype"] == "float64" and written["device"] == "cpu"
    assert written["versions"]["torch"] == torch.__version__
    assert {row["property"] for row in written["rows"]} == {1, 4}
    assert all(row["deviation"] <= row["tolerance"] for row in written["rows"] if row["status"] == "pass")


def test_command_on_a_checkpoint(tmp_path, capsys, monkeypatch):
    build("tiny-DeltaNet-pure", torch.float32).save_pretrained(tmp_path / "model")
    command = [str(tmp_path / "model"), "--dtype", "float32", "--only", "1"]
    assert main(command) == 0
    drop_the_conv_state(monkeypatch)
    assert main(command) == 1
    assert "FAIL" in capsys.readouterr().out


def test_command_refuses_unknown_cells(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["tiny-HGRN3-pure"])
    assert stopped.value.code == 2
    assert "tiny-HGRN2-pure" in capsys.readouterr().err


def test_refuses_what_cannot_be_exact():
    model = build("tiny-HGRN-pure", torch.float32)
    with pytest.raises(ValueError, match="bfloat16"):
        certify(model.to(torch.bfloat16))
    with pytest.raises(ValueError, match="loaded here"):
        certify(build("tiny-HGRN-pure"), dtype=torch.float32)
    eager = build("tiny-Transformer-seed1")
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="sdpa"):
        certify(eager)


def test_refuses_models_of_other_families(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llama"):
        certify(str(tmp_path))
