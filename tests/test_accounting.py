"""What a model costs, against what is counted and measured: parameters, operations, bytes; and the plan made of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from hybrid_models import HybridLinearConfig, HybridLinearForCausalLM
from hybrid_models.configuration_hybrid_linear import MIXERS
from hybrid_models.results import metric, result, write
from hybrid_models.suite import SIZES, cell_config, cell_names
from tests.common import ARCHITECTURES, tiny_config, tokens
from training import accounting
from training.accounting import count_flops, flops_per_token, forward_flops, parameters, peak_flops
from training.memory import LiveBytes, check_memory, training_memory
from training.plan import main as plan_main
from training.plan import make_plan, measured_speed, plan
from training.recipes import recipe

SUITE = [name for size in SIZES if size != "tiny" for name in cell_names(size)]


# ------------------------------------------------------------------------------------------------------- parameters


def test_parameters_are_the_built_models_in_all_144_cells():
    assert len(SUITE) == 144
    counted = {}
    for name in SUITE:
        config = cell_config(name)
        key = config.to_json_string()  # six seeds of the Transformer are one network
        if key not in counted:
            with torch.device("meta"):
                counted[key] = HybridLinearForCausalLM(config).num_parameters()
        assert parameters(config) == counted[key], name


@pytest.mark.parametrize("mixer", MIXERS)
def test_parameters_of_unusual_configurations(mixer):
    """Tied head, biases, grouped heads, convolutions, no bounds, several mixers."""
    grouped = {
        "retnet": {"linear_num_query_heads": 4},
        "gla": {"linear_num_query_heads": 4, "linear_use_short_conv": True},
        "gated_delta_net": {"linear_num_value_heads": 4, "linear_use_output_gate": False},
        "delta_net": {"linear_use_output_gate": True, "linear_conv_kernel_dim": 3},
        "hgrn": {"linear_use_short_conv": True},
        "hgrn2": {"linear_use_lower_bound": False},
    }[mixer]
    for fields in (grouped, {"tie_word_embeddings": True, "attention_bias": True}):
        config = tiny_config(mixer, "3-1", **fields)
        assert parameters(config) == HybridLinearForCausalLM(config).num_parameters(), fields
    mixed = tiny_config([mixer, "hgrn", mixer, "gla", "gla", mixer], linear_num_key_heads=None)
    assert parameters(mixed) == HybridLinearForCausalLM(mixed).num_parameters()


# ------------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("mixer,level", ARCHITECTURES)
def test_operations_are_what_torch_counts(mixer, level):
    """Both count matrix products alone, forward and backward, as the torch back end runs them (``executed``): attention in
    eager form, since the counter does not know the CPU's fused one. Neither counts the triangular solve, HGRN's scan, the
    convolution or anything element by element: those are tested by hand below. The bar is 2 %, but it is the same."""
    config = tiny_config(mixer, level)
    if level in ("24-1", "12-1"):
        config = tiny_config(mixer, layer_types=["linear_attention", "full_attention"], ratio=None, num_hidden_layers=2)
    for length in (2, 40, 64, 300):  # one chunk and several, full and not
        counted = count_flops(config, length)
        assert forward_flops(config, length, executed=True).training == pytest.approx(counted, rel=1e-9), length


@pytest.mark.parametrize("mixer", MIXERS)
def test_operations_at_other_sizes(mixer):
    """The suite's widths and heads, without its depth."""
    for hidden_size, heads, batch in ((128, 2, 2), (256, 4, 1), (1024, 16, 1)):
        config = HybridLinearConfig(
            mixer=mixer,
            layer_types=["linear_attention", "full_attention"],
            num_hidden_layers=2,
            hidden_size=hidden_size,
            num_attention_heads=heads,
            vocab_size=512,
        )
        counted = count_flops(config, 96, batch)
        assert forward_flops(config, 96, executed=True).training == pytest.approx(counted, rel=1e-9), hidden_size


def test_the_laws_useful_operations_by_hand():
    """One layer, one head, K = V = 4, seven tokens in one chunk: every pair written out."""
    T, K, V = 7, 4, 4
    pairs, strict = T * (T + 1) // 2, T * (T - 1) // 2
    fields = dict(
        ratio="pure", num_hidden_layers=1, linear_num_key_heads=1, linear_key_head_dim=K, linear_value_head_dim=V
    )
    added = T * (2 * K * V + 2 * K * V) + pairs * (2 * K + 2 * V)
    delta = added + T * 2 * K * V + pairs * 2 * K + strict * 2 * (K + V)
    for mixer, expected in (
        ("retnet", added),
        ("gla", added),
        ("hgrn2", added),
        ("delta_net", delta),
        ("gated_delta_net", delta),
    ):
        assert forward_flops(tiny_config(mixer, **{**fields, "num_key_value_heads": 2}), T).law * T == expected, mixer
    hgrn = forward_flops(tiny_config("hgrn", "pure", num_hidden_layers=1), T)
    assert (hgrn.law, hgrn.backward_extra) == (2 * 32, 3 * 32 - 2 * 2 * 32)
    assert hgrn.training == 3 * (hgrn.forward - 2 * 32) + 5 * 32
    conv = forward_flops(tiny_config("delta_net", "pure", num_hidden_layers=1), T).convolution
    assert conv == 2 * 4 * 3 * 32  # four taps on q, k and v


def test_the_causal_half_of_attention():
    """Query i sees i + 1 keys, or those of its window."""
    for window in (None, 1, 5, 300):
        config = tiny_config("gla", "full", sliding_window=window)
        for T in (1, 7, 64):
            seen = sum(min(i + 1, window or T) for i in range(T)) / T
            assert forward_flops(config, T).attention == pytest.approx(2 * 4 * 2 * 16 * seen), (window, T)


@pytest.mark.parametrize("mixer,level", ARCHITECTURES)
def test_useful_operations_are_never_more_than_those_executed(mixer, level):
    """But for what is no product, and so not in ``executed``: so no implementation in this form can pass 100 % of the peak."""
    config = tiny_config(mixer, level)
    for T in (1, 2, 40, 64, 65, 300):
        useful, executed = forward_flops(config, T), forward_flops(config, T, executed=True)
        no_product = useful.convolution
        for i, kind in enumerate(config.layer_types):
            if kind == "linear_attention":
                dims = config.linear_dims(i)
                law = accounting.MIXERS[mixer].law(dims)
                no_product += law.scan + law.solve * (min(64, T) - 1) / 2
                if mixer in ("gla", "hgrn2"):  # a token with itself, and the scores of neighbours
                    no_product += law.pair + dims.num_heads * dims.key_head_dim
        assert useful.forward <= executed.forward + no_product + 1e-6, T


def test_peaks_of_devices():
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == peak_flops("NVIDIA H200", torch.bfloat16) == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float16) == 312e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert peak_flops("NVIDIA L4", torch.bfloat16) == 121e12 and peak_flops("NVIDIA L40S", torch.bfloat16) == 362e12
    assert peak_flops("Tesla V100-SXM2-16GB", torch.bfloat16) is None
    assert peak_flops("AMD EPYC (2 cores)", torch.bfloat16) is None


# ----------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("precision,checkpointing", [("float32", False), ("bf16", False), ("bf16", True)])
@pytest.mark.parametrize("mixer,level", [*[(mixer, "3-1") for mixer in MIXERS], ("gla", "full"), ("hgrn2", "pure")])
def test_peak_memory_is_what_a_step_keeps_alive(mixer, level, precision, checkpointing):
    """The whole model on real memory against the sum of its layers on none. The bar is 10 %; the sum leaves out a few
    shared tensors (rotary angles, autocast's copies of weights in the head) that are large only in tiny models."""
    config = tiny_config(mixer, level, vocab_size=500)
    found = check_memory(config, 2, 100, precision, checkpointing)
    assert found["ratio"] == pytest.approx(1, abs=0.03), found


def test_activations_are_what_autograd_saves():
    """Counted another way: the storages that the forward hands to autograd, through its own hooks."""
    config = tiny_config("gated_delta_net", "3-1")
    model = HybridLinearForCausalLM(config).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes(), x  # kept, so that no address is used twice
        return x

    ids = tokens(2, 128)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    total = sum(size for size, _ in saved.values())
    predicted = training_memory(config, 2, 128, "float32", device="cpu").activations
    assert predicted == pytest.approx(total, rel=0.1)


def test_live_bytes_counts_storages_until_they_are_freed():
    given = torch.ones(100)
    with LiveBytes([given]) as live:
        a = given + 1  # 400 bytes
        view = a[:50].t()
        assert live.now == 400
        b = given.view(10, 10) * 2
        assert live.now == 800
        del a
        assert live.now == 800, "the view holds its storage"
        del view, b
        assert (live.now, live.peak) == (0, 800)


def test_memory_grows_as_it_should():
    config = cell_config("nano-7M-GatedDeltaNet-hybrid-6-1")
    one, two = (training_memory(config, batch, 256) for batch in (2, 4))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.15)  # 16-bit copies of the weights do not double
    assert training_memory(config, 2, 256, checkpointing=True).activations < 0.2 * one.activations
    assert training_memory(config, 2, 256, law="torch").activations > one.activations
    assert training_memory(config, 2, 256, accumulated=True).peak > one.peak
    assert training_memory(config, 2, 256, shards=4).parameters == one.parameters // 4
    assert training_memory(config, 2, 256, device="cpu").activations > one.activations
    assert training_memory(config, 2, 256, skip_logits=True).peak < one.peak
    with pytest.raises(ValueError, match="precision='int8'.*use bf16 or float32"):
        training_memory(config, 2, 256, "int8")


# ------------------------------------------------------------------------------------------------------------- plan


def test_plans_of_all_cells_take_seconds():
    start = time.process_time()
    for name in SUITE:
        one = make_plan(recipe(name))
        assert one.parameters == parameters(cell_config(name)) and one.tokens == one.steps * recipe(name).batch_tokens
        assert one.flops == flops_per_token(cell_config(name), recipe(name).sequence_length) * one.tokens
        assert one.speed is None or one.hours > 0
    assert time.process_time() - start < 60  # it takes 10 to 15 s of one core


def test_a_measured_speed_is_used_and_none_is_made_up(tmp_path):
    cell = "nano-7M-GLA-pure"
    absent = dict(results=tmp_path / "results", benchmark=tmp_path / "none.json")
    assert "not measured" in plan(recipe(cell), **absent)
    one = result("training", cell, "python -m training.train", [metric("training", "tokens_per_s", 1e6)])
    one["device"] = "AMD EPYC (2 cores)"
    write(one, tmp_path / "results")
    assert measured_speed(cell, **absent) is None, "a CPU's speed says nothing about a GPU"
    one["device"] = "NVIDIA H200"
    one["metrics"][0]["device"] = "shared"
    write(one, tmp_path / "results")
    assert measured_speed(cell, **absent) is None, "nor does that of a GPU that two runs shared"
    del one["metrics"][0]["device"]
    path = write(one, tmp_path / "results")
    found = make_plan(recipe(cell), 2, **absent)
    assert found.speed == (1e6, "NVIDIA H200", str(path))
    assert found.hours == pytest.approx(found.tokens / 2e6 / 3600)
    assert found.mfu == pytest.approx(found.flops_per_token * 1e6 / 989.4e12) and "MFU" in str(found)
    (tmp_path / "bench.json").write_text(
        json.dumps({"device": "NVIDIA H200", "models": {cell: {"ours": {"tokens_per_s": 5.0}}}})
    )
    assert measured_speed(cell, tmp_path / "nothing", tmp_path / "bench.json").tokens_per_s == 5.0


def test_plans_for_several_gpus():
    one, eight = (make_plan(recipe("nano-22M-HGRN2-hybrid-3-1"), gpus) for gpus in (1, 8))
    assert one.fsdp2 is None and (one.rows, eight.rows) == (64, 8)
    assert eight.fsdp2.peak < eight.ddp.peak < one.ddp.peak
    assert eight.ddp.gradients == 2 * one.ddp.gradients  # buckets
    assert make_plan(recipe("nano-22M-HGRN2-hybrid-3-1"), 2, rows=8).accumulation == 4
    with pytest.raises(ValueError, match="gpus=3: a step has 64 sequences"):
        make_plan(recipe("nano-7M-GLA-pure"), 3)
    with pytest.raises(ValueError, match="rows=5 does not divide the 64"):
        make_plan(recipe("nano-7M-GLA-pure"), rows=5)


def test_the_commands(capsys):
    assert plan_main(["tiny-GLA-pure"]) == 0
    assert "not measured" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        plan_main(["nano-7M-GLA"])
    assert stopped.value.code == 2 and "did you mean" in capsys.readouterr().err
    command = [sys.executable, "-m", "training.accounting", "--cell", "tiny-HGRN-pure", "--length", "70"]
    run = subprocess.run([*command, "--check-flops", "--check-memory"], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["parameters"] == parameters(cell_config("tiny-HGRN-pure"))
    assert found["check_flops"]["ratio"] == pytest.approx(1, abs=0.02)
    assert found["check_memory"]["ratio"] == pytest.approx(1, abs=0.03)


def test_tied_embeddings_count_once():
    tied, untied = (
        HybridLinearConfig(ratio="pure", hidden_size=64, num_hidden_layers=1, vocab_size=50, tie_word_embeddings=t)
        for t in (True, False)
    )
    assert parameters(untied) - parameters(tied) == 50 * 64
    assert flops_per_token(untied, 8) == flops_per_token(tied, 8)
