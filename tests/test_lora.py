"""LoRA and the other peft methods on hybrids: both kinds of layer are adapted, trained, saved, merged and counted."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import hybrid_models
from hybrid_models.configuration_hybrid_linear import MIXERS
from hybrid_models.lora import MLP_MODULES, TARGET_MODULES, lora_config, lora_report
from tests.common import tiny_config, tiny_model, tokens

peft = pytest.importorskip("peft")

MODELS = [("gated_delta_net", "3-1"), ("gla", "pure"), ("hgrn", "3-1")]
# Wide projections of each mixer, by hand: what lora_config must hit in a linear-attention layer, and nothing else.
WIDE = {
    "hgrn": "i f g o",
    "retnet": "q k v g o",
    "gla": "q k v g o",
    "hgrn2": "q f i o",
    "delta_net": "q k v o",
    "gated_delta_net": "q k v g o",
}


def adapted(mixer="gated_delta_net", level="3-1", dtype=torch.float64, base=None, **lora_kwargs):
    """A tiny model (or ``base``) with LoRA whose B matrices are not zero, so that the adapters show."""
    base = base or tiny_model(mixer, level, dtype)
    model = peft.get_peft_model(base, lora_config(base, r=2, lora_alpha=4, **lora_kwargs)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


# ---------------------------------------------------------------------------------------------------- what is hit


@pytest.mark.parametrize("mixer", MIXERS)
def test_defaults_hit_every_wide_projection_of_every_layer(mixer):
    model = adapted(mixer)  # six layers, LLALLA
    names = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    expected = set()
    for i, kind in enumerate("LLALLA"):
        block, letters = ("linear_attn", WIDE[mixer]) if kind == "L" else ("self_attn", "q k v o")
        expected |= {f"base_model.model.model.layers.{i}.{block}.{x}_proj" for x in letters.split()}
        expected |= {f"base_model.model.model.layers.{i}.mlp.{x}_proj" for x in ("gate", "up", "down")}
    assert names == expected
    assert set(model.peft_config["default"].target_modules) == {name.rsplit(".", 1)[-1] for name in expected}


def test_the_message_counts_layers_and_modules(caplog):
    model = tiny_model()
    with caplog.at_level(logging.WARNING):  # a notebook shows warnings without being asked
        config = lora_config(model)
    line = (
        "LoRA: 4 of 4 linear_attention layers (20 modules), 2 of 2 full_attention layers (8 modules), "
        "MLPs of 6 of 6 layers (18 modules)"
    )
    assert [record.getMessage() for record in caplog.records] == [line]
    assert config.task_type == "CAUSAL_LM"
    assert not any("lora" in name for name, _ in model.named_parameters()), "asking must not change the model"
    assert str(lora_report(peft.get_peft_model(model, config))) == line


def test_the_report_is_of_what_is_there():
    """Counted on the adapted model: some layers, one module elsewhere, several mixers, and none at all."""
    model = tiny_model()
    assert str(lora_report(model)).startswith("LoRA: 0 of 4 linear_attention layers (0 modules), 0 of 2 full_attention")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], layers_to_transform=[1, 2])
    report = lora_report(peft.get_peft_model(model, config))
    assert report.mixers == {"linear_attention": ([1], [0, 1, 3, 4], 1), "full_attention": ([2], [2, 5], 1)}
    assert report.mlp == ([], [0, 1, 2, 3, 4, 5], 0)

    mixed = tiny_model(["gla", "hgrn", "gla", "gla", "gla", "gla"], linear_num_key_heads=None)
    mixed.add_adapter(peft.LoraConfig(target_modules=["q_proj", "lm_head"]))  # transformers' own door to peft
    report = lora_report(mixed)
    assert report.mixers["linear_attention (gla)"] == ([0, 3, 4], [0, 3, 4], 3)
    assert report.mixers["linear_attention (hgrn)"] == ([], [1], 0)
    assert report.other == ["lm_head"] and "1 elsewhere (lm_head)" in str(report)


def test_one_sided_targets_raise():
    """The names of an attention-only recipe do not exist in HGRN, those of HGRN not in attention."""
    model = tiny_model("hgrn", "3-1")
    with pytest.raises(ValueError, match=r"no linear_attention layer is hit.*i_proj, f_proj, g_proj, o_proj"):
        lora_config(model, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"no full_attention layer is hit \(2 of them.*q_proj, k_proj, v_proj, o_proj"):
        lora_config(model, target_modules=r".*\.[if]_proj")
    with pytest.raises(ValueError, match="no linear_attention layer is hit"):  # excluded after having matched
        lora_config(tiny_model(), target_modules=["q_proj"], exclude_modules=r".*linear_attn.*")
    mixed = tiny_model(["gla", "hgrn", "gla", "gla", "gla", "gla"], linear_num_key_heads=None)
    with pytest.raises(ValueError, match=r"no linear_attention \(hgrn\) layer is hit"):
        lora_config(mixed, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="knows the layers of hybrid_linear only"):
        lora_config(torch.nn.Module.__new__(type("Other", (), {"config": type("C", (), {"model_type": "llama"})()})))


def test_choices_that_treat_the_layers_alike_pass():
    model = tiny_model("hgrn", "3-1")
    assert lora_config(model, target_modules=list(MLP_MODULES)).target_modules == set(MLP_MODULES)
    assert lora_config(model, target_modules=["o_proj"]).target_modules == {"o_proj"}
    lora_config(model, target_modules=["i_proj"], layers_to_transform=[0, 1])  # only linear layers were asked for
    lora_config(tiny_model("hgrn", "pure"), target_modules=["i_proj"])  # there is no other kind
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "g_proj"]
    assert lora_config(tiny_model("gla"), target_modules=names, r=2).r == 2


@pytest.mark.parametrize("mixer", ["gated_delta_net", "gla"])
def test_all_linear_hits_the_small_gates_too(mixer):
    model = adapted(mixer, target_modules="all-linear")
    hit = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    linear = {name for name, module in tiny_model(mixer).named_modules() if isinstance(module, torch.nn.Linear)}
    assert hit == {f"base_model.model.{name}" for name in linear - {"lm_head"}}
    assert any("a_proj" in name or "gk_proj.1" in name for name in hit)


def test_plain_peft_knows_the_defaults():
    """get_peft_model without target_modules: this family's modules, through peft's own table."""
    for mixer, level in MODELS:
        model = tiny_model(mixer, level)
        report = lora_report(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")))
        assert all(part.layers == part.of for part in (*report.mixers.values(), report.mlp)), (mixer, str(report))
    table = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert set(table["hybrid_linear"]) == set(TARGET_MODULES)


def test_importing_and_building_do_not_import_peft():
    """peft takes seconds to import; only those who use it pay."""
    code = (
        "import sys, hybrid_models, hybrid_models.lora\n"
        "hybrid_models.HybridLinearForCausalLM(hybrid_models.HybridLinearConfig(hidden_size=64, num_hidden_layers=1))\n"
        "sys.exit('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------------------------------------------- that it works


@pytest.mark.parametrize("mixer,level", MODELS)
def test_every_adapter_changes_the_logits_also_in_cached_decoding(mixer, level):
    """A projection read as a weight instead of being called would bypass its adapter, in one of the two paths."""
    model = adapted(base=tiny_model(mixer, level, num_hidden_layers=3))
    x = tokens(2, 9)

    @torch.no_grad()
    def both():
        cache = DynamicCache(config=model.config)
        steps = [model(input_ids=x[:, t : t + 1], past_key_values=cache).logits for t in range(x.shape[1])]
        return model(input_ids=x, use_cache=False).logits, torch.cat(steps, 1)

    whole, cached = both()
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-10)  # float64 rounding; logits are of order one
    for name, parameter in model.named_parameters():
        if "lora_B" not in name:
            continue
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.zero_()
        changed = both()
        assert all((new - old).abs().max() > 1e-5 for new, old in zip(changed, (whole, cached))), name
        with torch.no_grad():
            parameter.copy_(kept)


@pytest.mark.parametrize("mixer,level", MODELS)
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_only_adapters_train(mixer, level, checkpointing):
    model = adapted(mixer, level, dtype=torch.float32).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()  # as the Trainer does
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    x = tokens(4, 12)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        assert all(
            (p.grad is not None and p.grad.abs().max() > 0) == ("lora_" in n) for n, p in model.named_parameters()
        )
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}


@pytest.mark.parametrize("mixer,level", MODELS)
def test_merging_keeps_the_output(mixer, level):
    model = adapted(mixer, level)
    x = tokens(2, 9)
    with torch.no_grad():
        expected, base = model(input_ids=x).logits, tiny_model(mixer, level)(input_ids=x).logits
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=x).logits, base, rtol=0, atol=0)
        merged = model.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_parameters())
        # Two products rounded apart or one of summed weights: float64 rounding, amplified by six layers.
        torch.testing.assert_close(merged(input_ids=x).logits, expected, rtol=0, atol=1e-10)
    assert (expected - base).abs().max() > 1e-2


def test_an_adapter_is_saved_and_loaded(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model(dtype=torch.float32).save_pretrained(base)
    first = adapted(base=AutoModelForCausalLM.from_pretrained(base))
    first.save_pretrained(adapter)
    assert sorted(path.name for path in adapter.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

    x = tokens(2, 9)
    options = dict(max_new_tokens=5, do_sample=False)
    expected, text = first(input_ids=x).logits, first.generate(input_ids=x, **options)
    for loaded in (
        peft.AutoPeftModelForCausalLM.from_pretrained(adapter).eval(),  # finds the base by the name in the adapter
        peft.PeftModel.from_pretrained(tiny_model(dtype=torch.float32), adapter).eval(),
    ):
        torch.testing.assert_close(loaded(input_ids=x).logits, expected, rtol=0, atol=0)
        assert torch.equal(loaded.generate(input_ids=x, **options), text)


def test_16_bit_weights_keep_their_float32_parameters_under_lora():
    model = adapted(dtype=torch.bfloat16).to(torch.bfloat16)
    kinds = {name.rsplit(".", 1)[-1]: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["A_log"] == kinds["dt_bias"] == torch.float32
    assert model.base_model.model.model.layers[0].linear_attn.q_proj.weight.dtype == torch.bfloat16
    x = tokens(2, 9)
    model(input_ids=x, labels=x).loss.backward()


@pytest.mark.parametrize(
    "task,head",
    [("SEQ_CLS", "SequenceClassification"), ("TOKEN_CLS", "TokenClassification")],
    ids=["sequence", "token"],
)
def test_the_task_follows_the_head(task, head):
    config = tiny_config()
    config.num_labels = 3
    model = getattr(hybrid_models, f"HybridLinearFor{head}")(config)
    found = lora_config(model)
    assert found.task_type == task
    x = tokens(2, 5)
    labels = torch.tensor([0, 2]) if task == "SEQ_CLS" else torch.zeros_like(x)
    adapted_model = peft.get_peft_model(model, found)
    adapted_model(input_ids=x, labels=labels).loss.backward()
    assert adapted_model.base_model.model.score.modules_to_save["default"].weight.grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------ other peft methods


@pytest.mark.parametrize("mixer,level", MODELS)
def test_prompt_tuning_is_learnt_embeddings_in_front(mixer, level):
    base = tiny_model(mixer, level)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(base, config).double().eval()
    x = tokens(2, 7)
    mask = torch.ones_like(x)
    mask[0, :3] = 0  # left padding: the learnt tokens come before it, so the mask has a hole
    prompt = model.prompt_encoder["default"].embedding.weight

    loss = model(input_ids=x, attention_mask=mask, labels=x).loss
    loss.backward()
    assert prompt.grad.abs().max() > 0
    with torch.no_grad():
        logits = model(input_ids=x, attention_mask=mask).logits
        for row, start in ((0, 3), (1, 0)):
            embeds = torch.cat((prompt, base.get_input_embeddings()(x[row, start:])))[None]
            alone = base(inputs_embeds=embeds).logits[0, 4:]
            torch.testing.assert_close(logits[row, 4 + start :], alone, rtol=0, atol=1e-10)  # float64 rounding

        generated = model.generate(input_ids=x, attention_mask=mask, max_new_tokens=4, do_sample=False)
        for row, start in ((0, 3), (1, 0)):
            ids = x[row, start:]
            for _ in range(4):
                embeds = torch.cat((prompt, base.get_input_embeddings()(ids)))[None]
                ids = torch.cat((ids, base(inputs_embeds=embeds).logits[0, -1:].argmax(-1)))
            assert generated[row, start:].tolist() == ids.tolist()


def test_prefix_tuning_works_without_recurrent_layers_and_raises_with_them():
    """A prefix is keys and values for every layer; a recurrent layer has none to put them in."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    x = tokens(2, 7)
    model = peft.get_peft_model(tiny_model(level="full", dtype=torch.float32), config)
    model(input_ids=x, labels=x).loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.abs().max() > 0
    for mixer, level in MODELS:
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = peft.get_peft_model(tiny_model(mixer, level, dtype=torch.float32), config)
        with pytest.raises(ValueError, match="prefix tuning.*linear-attention layer has.*tune prompts or LoRA"):
            model(input_ids=x)
