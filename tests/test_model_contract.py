"""What transformers' common model checks ask of a model, asked here of every kind: loading, outputs, gradients, dtypes.

Small float32 models, as users have them, except where a number is compared across two ways of computing it: float64 then,
with 1e-10. Each other tolerance says where it comes from.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hybrid_models import (
    HybridLinearForCausalLM,
    HybridLinearForQuestionAnswering,
    HybridLinearForSequenceClassification,
    HybridLinearForTokenClassification,
    HybridLinearModel,
)
from hybrid_models.configuration_hybrid_linear import MIXERS
from hybrid_models.kernels import recurrence

from .common import REPRESENTATIVES, VOCAB, randomize, tiny_config, tiny_model, tokens

EXACT = dict(rtol=1e-10, atol=1e-10)
IDS = tokens(2, 11)
FLOAT32_NAMES = {"gated_delta_net": {"A_log", "dt_bias"}, "hgrn": {"lower_bounds"}, "hgrn2": {"lower_bounds"}}

every_kind = pytest.mark.parametrize("arch", REPRESENTATIVES, ids="-".join)
every_mixer = pytest.mark.parametrize("mixer", MIXERS)
# One model with a convolution and attention, one without either, one vector state.
a_few = pytest.mark.parametrize("arch", [("gated_delta_net", "3-1"), ("gla", "pure"), ("hgrn", "pure")], ids="-".join)


def small(arch, dtype=torch.float32, **fields):
    return tiny_model(*arch, dtype=dtype, **({"num_hidden_layers": 3} if arch[1] != "full" else {}) | fields)


@torch.no_grad()
def logits(model, *args, **kwargs):
    return model(*args, **kwargs).logits


# -------------------------------------------------------------------------------------------------------- initialisation


@every_kind
def test_loading_initialises_as_construction_does(arch, monkeypatch):
    """from_pretrained builds on the meta device and initialises what no file holds: the same numbers as __init__."""
    for name in ("normal_", "uniform_"):  # the two ways meet the same tensors in another order

        def draw(tensor, *args, original=getattr(torch.Tensor, name), generator=None, **kwargs):
            return original(tensor, *args, generator=torch.Generator().manual_seed(tensor.numel()), **kwargs)

        monkeypatch.setattr(torch.Tensor, name, draw)
    config = tiny_config(*arch, num_hidden_layers=3)
    built = HybridLinearForCausalLM(config)
    loaded, _ = HybridLinearForCausalLM.from_pretrained(
        None, config=copy.deepcopy(config), state_dict={}, output_loading_info=True
    )
    want = dict(built.named_parameters()) | dict(built.named_buffers())
    got = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    assert want.keys() == got.keys() and any("inv_freq" in name for name in want) == (
        "full_attention" in config.layer_types or arch[0] == "retnet"
    )
    for name in want:
        assert torch.equal(got[name], want[name]), name
        assert got[name].dtype == want[name].dtype, name


@every_mixer
def test_initial_values(mixer):
    """Projections normal with initializer_range, norms one, decays as the papers start them."""
    torch.manual_seed(0)
    model = HybridLinearForCausalLM(
        tiny_config(mixer, "3-1", num_hidden_layers=3, hidden_size=128, initializer_range=0.05)
    )
    for name, p in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if "norm" in name:
            assert p.eq(1).all(), name
        elif last == "A_log":
            assert (0 <= p.exp()).all() and (p.exp() <= 16).all()
        elif last == "dt_bias":
            step = nn.functional.softplus(p)
            assert (step >= 1e-4).all() and (step <= 0.1001).all()
        elif last in ("lower_bounds", "bias"):
            assert p.eq(0).all(), name
        elif "conv1d" not in name:
            assert 0.03 < p.std() < 0.07, name
        assert p.isfinite().all()


@every_kind
def test_save_and_load(arch, tmp_path):
    model = small(arch)
    model.save_pretrained(tmp_path)
    for loaded in (HybridLinearForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(loaded, IDS), logits(model, IDS))
        assert loaded.config.layer_types == model.config.layer_types
    with torch.no_grad():
        base = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_other_label_counts_raise_or_start_anew(tmp_path):
    HybridLinearForSequenceClassification(tiny_config("gla", num_labels=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"score\.weight \[2, 32\], here \[5, 32\]"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model(IDS).logits.shape == (2, 5)


# ------------------------------------------------------------------------------------------------------------- embeddings


def test_tied_embeddings(tmp_path):
    model = small(("gla", "pure"), tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    untied = small(("gla", "pure"))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings(tied, tmp_path):
    model = small(("gated_delta_net", "3-1"), tie_word_embeddings=tied)
    want = logits(model, IDS)
    model.resize_token_embeddings(VOCAB + 9)
    assert model.config.vocab_size == model.vocab_size == VOCAB + 9
    torch.testing.assert_close(logits(model, IDS)[..., :VOCAB], want)
    assert logits(model, IDS + 8).shape[-1] == VOCAB + 9  # ids that were out of range before
    loss = model(IDS + 8, labels=IDS + 8).loss
    assert loss.isfinite()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), IDS), logits(model, IDS))
    model.resize_token_embeddings(50)
    with pytest.raises(ValueError, match="outside the vocabulary of 50"):
        model(IDS)


@every_kind
def test_embeddings_instead_of_ids(arch):
    model = small(arch)
    assert torch.equal(logits(model, inputs_embeds=model.get_input_embeddings()(IDS)), logits(model, IDS))


# ---------------------------------------------------------------------------------------------------------------- outputs


@every_kind
def test_tuples_are_dictionaries(arch):
    model = small(arch)
    kwargs = dict(output_hidden_states=True, output_attentions=True, labels=IDS)
    as_dict, as_tuple = model(IDS, **kwargs), model(IDS, return_dict=False, **kwargs)
    assert len(as_tuple) == len(as_dict.to_tuple())
    flat = lambda x: [z for y in x for z in flat(y)] if isinstance(x, (tuple, list)) else [x]  # noqa: E731
    for a, b in zip(flat(as_tuple), flat(as_dict.to_tuple()), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
    assert torch.equal(as_tuple[0], as_dict.loss) and torch.equal(as_tuple[1], as_dict.logits)


@every_kind
def test_hidden_states_and_attentions(arch):
    """Layers + 1 hidden states, the last one normed; one attention map per attention layer, with eager attention."""
    model = small(arch)
    model.set_attn_implementation("eager")
    kinds = model.config.layer_types
    out = model(IDS, output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in out.hidden_states] == [(2, 11, 32)] * (len(kinds) + 1)
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(IDS))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert [a.shape for a in out.attentions] == [(2, 2, 11, 11)] * kinds.count("full_attention")
    for a in out.attentions:
        torch.testing.assert_close(a.sum(-1), torch.ones(2, 2, 11))
        assert not a.triu(1).any()
    assert model(IDS).hidden_states is None and model(IDS).attentions is None
    some = model(IDS, output_hidden_states=[1]).hidden_states
    assert torch.equal(some[1], out.hidden_states[1]) and some[0] is None


def test_gradients_of_hidden_states_are_retained():
    model = small(("gated_delta_net", "3-1"))
    model.set_attn_implementation("eager")
    out = model(IDS, output_hidden_states=True, output_attentions=True)
    kept = (*out.hidden_states, *out.attentions)
    for x in kept:
        x.retain_grad()
    out.logits.square().sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in kept)


@pytest.mark.parametrize("mask", [None, "left", "right"])
@pytest.mark.parametrize("fields", [{}, {"sliding_window": 3}], ids=["full", "window"])
def test_eager_is_sdpa(mask, fields):
    model = small(("gated_delta_net", "3-1"), torch.float64, **fields)
    attention_mask = None
    if mask:
        attention_mask = torch.ones(2, 11, dtype=torch.long)
        attention_mask[1, slice(0, 4) if mask == "left" else slice(7, None)] = 0
    rows = slice(None) if attention_mask is None else attention_mask.bool()
    assert model.config._attn_implementation == "sdpa"
    want = logits(model, IDS, attention_mask=attention_mask)[rows]
    model.set_attn_implementation("eager")
    assert model.model.layers[2].self_attn.config._attn_implementation == "eager"
    # The library's eager attention takes the softmax in float32.
    torch.testing.assert_close(logits(model, IDS, attention_mask=attention_mask)[rows], want, rtol=1e-6, atol=1e-6)


@every_kind
def test_position_ids_given_or_not(arch):
    """Positions that say what the mask says anyway change nothing; a shift of all is invisible to relative encodings."""
    model = small(arch, torch.float64)
    want = logits(model, IDS)
    positions = torch.arange(11)[None]
    torch.testing.assert_close(logits(model, IDS, position_ids=positions), want, **EXACT)
    torch.testing.assert_close(logits(model, IDS, position_ids=positions.expand(2, -1)), want, **EXACT)
    torch.testing.assert_close(logits(model, IDS, position_ids=positions + 5), want, **EXACT)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    padded = logits(model, IDS, attention_mask=mask)
    given = (mask.cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(
        logits(model, IDS, attention_mask=mask, position_ids=given)[mask.bool()], padded[mask.bool()], **EXACT
    )


@every_kind
def test_rows_and_padding(arch):
    """A row alone, a row in a batch, and a row behind 32 pads are the same row."""
    model = small(arch, torch.float64)
    want = logits(model, IDS)
    torch.testing.assert_close(logits(model, IDS[1:]), want[1:], **EXACT)
    mask = torch.cat((torch.zeros(2, 32, dtype=torch.long), torch.ones(2, 11, dtype=torch.long)), 1)
    padded = logits(model, torch.cat((torch.zeros(2, 32, dtype=torch.long), IDS), 1), attention_mask=mask)
    torch.testing.assert_close(padded[:, 32:], want, **EXACT)


@every_kind
def test_logits_to_keep(arch):
    model = small(arch)
    want = logits(model, IDS)
    assert torch.equal(logits(model, IDS, logits_to_keep=0), want)
    torch.testing.assert_close(logits(model, IDS, logits_to_keep=3), want[:, -3:])
    torch.testing.assert_close(logits(model, IDS, logits_to_keep=torch.tensor([0, 7])), want[:, [0, 7]])


@every_kind
def test_task_heads(arch):
    """Shapes, losses and the right token: classification reads a row's last token on either side of the padding."""
    config = tiny_config(*arch, num_hidden_layers=3, num_labels=4)
    torch.manual_seed(0)
    sequence = randomize(HybridLinearForSequenceClassification(config)).double().eval()
    want = sequence(IDS[:1, :7]).logits
    pads = torch.zeros(1, 4, dtype=torch.long)
    for ids in (torch.cat((IDS[:1, :7], pads), 1), torch.cat((pads, IDS[:1, :7]), 1)):
        mask = ids.ne(0).long()
        torch.testing.assert_close(sequence(ids, attention_mask=mask).logits, want, **EXACT)
    assert sequence(IDS, labels=torch.tensor([1, 3])).loss.isfinite() and want.shape == (1, 4)
    per_token = randomize(HybridLinearForTokenClassification(config)).eval()
    assert per_token(IDS, labels=IDS % 4).loss.isfinite() and per_token(IDS).logits.shape == (2, 11, 4)
    span = randomize(HybridLinearForQuestionAnswering(config)).eval()
    out = span(IDS, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 4]))
    assert out.loss.isfinite() and out.end_logits.shape == (2, 11)


# ------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("how", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize(
    "arch", [*((m, "3-1") for m in MIXERS), ("hgrn", "pure"), ("gated_delta_net", "full")], ids="-".join
)
def test_every_parameter_has_a_gradient(arch, how):
    """A nonzero one, and under gradient checkpointing the very same."""
    model = small(arch, torch.float64).train()

    def gradients():
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    want = gradients()
    for name, gradient in want.items():
        assert gradient.isfinite().all() and gradient.any(), name
    if how is None:
        return
    model.activation_checkpointing_enable({"use_reentrant": how == "reentrant"})
    if how == "reentrant":  # which asks for an input that requires a gradient
        model.enable_input_require_grads()
    assert model.is_activation_checkpointing
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, want[name], **EXACT, msg=lambda m, name=name: f"{name}: {m}")
    model.activation_checkpointing_disable()


@a_few
def test_gradient_checkpointing_of_packed_documents(arch):
    """The recomputation must see the boundaries that the forward saw."""
    model = small(arch, torch.float64).train()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]])

    def gradients():
        model.zero_grad()
        model(IDS[:1], position_ids=positions, labels=IDS[:1]).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    want = gradients()
    model.activation_checkpointing_enable()
    for a, b in zip(gradients(), want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_input_gradients():
    """What LoRA on a frozen model needs: embeddings that require a gradient though their weights do not."""
    model = small(("gated_delta_net", "3-1")).train().requires_grad_(False)
    model.enable_input_require_grads()
    out = model(IDS, labels=IDS)
    assert out.loss.requires_grad
    model.disable_input_require_grads()
    assert not model(IDS, labels=IDS).loss.requires_grad


@a_few
def test_loss_options(arch):
    """Shifted labels instead of labels, and the number of items of a whole accumulated batch."""
    model = small(arch, torch.float64)
    labels = IDS.clone()
    labels[0, :4] = -100
    want = model(IDS, labels=labels).loss
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(IDS, labels=labels, shift_labels=shifted).loss, want, rtol=1e-6, atol=0)
    items = int(shifted.ne(-100).sum())
    half = model(IDS, labels=labels, num_items_in_batch=2 * items, return_dict=False)[0]
    torch.testing.assert_close(half, want / 2, rtol=1e-6, atol=0)  # the library's loss is in float32


@every_mixer
def test_it_learns(mixer):
    """Twenty steps on one batch: the loss falls by half at least."""
    torch.manual_seed(0)
    model = HybridLinearForCausalLM(tiny_config(mixer, "3-1", num_hidden_layers=3)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# ------------------------------------------------------------------------------------------------------------------ dtypes


def float32_names(model) -> set[str]:
    names = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    return names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_mixer
def test_16_bits_keep_the_decays(mixer, dtype, tmp_path):
    """Loaded, cast and half(): A_log, dt_bias and lower_bounds stay in float32, with the bits they were saved with."""
    model = small((mixer, "3-1"))
    model.save_pretrained(tmp_path)
    kept = FLOAT32_NAMES.get(mixer, set())
    copies = {
        "loaded": AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype),
        "cast": copy.deepcopy(model).to(dtype),
        "method": copy.deepcopy(model).bfloat16() if dtype == torch.bfloat16 else copy.deepcopy(model).half(),
    }
    want = dict(model.named_parameters())
    for how, copied in copies.items():
        assert float32_names(copied) == kept, how
        # The loader of 5.23 leaves a float32 parameter alone anyway; FSDP and quantisers go by this list.
        assert copied._keep_in_fp32_modules_strict == kept, how
        for name, p in copied.named_parameters():
            assert torch.equal(p, want[name].to(p.dtype)), (how, name)
        for name, buffer in copied.named_buffers():
            assert buffer.dtype == torch.float32, (how, name)  # rotary frequencies
        assert logits(copied, IDS).dtype == copied.dtype == copied.model.dtype == dtype
        copied.save_pretrained(tmp_path / how)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / how, dtype="auto")
        assert float32_names(again) == kept and torch.equal(logits(again, IDS), logits(copied, IDS))
    # 8 bits (bfloat16) of mantissa through 3 layers: within a few per cent of the logits' range.
    exact = logits(model, IDS)
    assert (logits(copies["cast"], IDS).float() - exact).abs().max() < 0.05 * (exact.max() - exact.min())


@every_mixer
def test_double_means_double(mixer):
    model = small((mixer, "3-1")).double()
    assert {p.dtype for p in (*model.parameters(), *model.buffers())} == {torch.float64}
    out = model(IDS)
    assert out.logits.dtype == torch.float64
    assert out.past_key_values.layers[0].recurrent_states[0].dtype == torch.float64
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}


@every_mixer
def test_autocast_keeps_the_law(mixer, monkeypatch):
    """Under autocast projections are in bfloat16; what reaches the law may be, what it computes and keeps is not."""
    model = small((mixer, "3-1"))
    seen = []

    def spy(*args, **kwargs):
        o, state = recurrence(*args, **kwargs)
        seen.extend(x.dtype for x in (o, state))
        if args[3] is not None:
            seen.append(args[3].dtype)  # log decays
        return o, state

    monkeypatch.setattr("hybrid_models.mixers.recurrence", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(IDS, labels=IDS)
    assert set(seen) == {torch.float32}
    exact = model(IDS)
    # The projections' 8 bits, as above.
    spread = exact.logits.max() - exact.logits.min()
    assert 0 < (out.logits - exact.logits).abs().max() < 0.05 * spread
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_kind
def test_packed_is_padded_in_bfloat16(arch, attention):
    """Within one bfloat16 step of the largest logit: the two ways group sums differently, and round once more or less."""
    model = small(arch, dtype=torch.float32).to(torch.bfloat16)
    model.set_attn_implementation(attention)
    lengths = [4, 7, 3]
    rows = [tokens(n, seed=n) for n in lengths]
    packed = logits(model, torch.cat(rows)[None], position_ids=torch.cat([torch.arange(n) for n in lengths])[None])[0]
    ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    padded = logits(model, ids, attention_mask=mask)[mask.bool()]
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(packed, padded, rtol=eps, atol=eps * float(padded.abs().max()))


# ------------------------------------------------------------------------------------------- whole graphs and placement


@a_few
def test_fullgraph_training_step(arch):
    """Forward and backward in one graph, packed (and not, for one kind)."""
    model = small(arch, torch.float64).train()
    torch._dynamo.reset()
    # With decompositions: torch 2.13 knows the strides of softplus' gradient wrongly without them.
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager_decomp_partition")
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]]).expand(2, -1)
    weight = torch.randn(2, 11, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for kwargs in ({"position_ids": packed}, {}) if arch[1] == "3-1" else ({"position_ids": packed},):
        results = []
        for forward in (model, compiled):
            model.zero_grad()
            out = forward(input_ids=IDS, labels=IDS, use_cache=False, **kwargs)
            (out.logits * weight).sum().backward()
            results.append([out.loss.detach(), *(p.grad.clone() for p in model.parameters())])
        (loss, *got), (want_loss, *want) = results
        torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)  # which the library computes in float32
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


@a_few
def test_export(arch):
    model = small(arch, torch.float64)
    program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
    torch.testing.assert_close(program.module()(IDS, use_cache=False).logits, logits(model, IDS), **EXACT)


@a_few
def test_device_maps(arch, tmp_path):
    """All on the CPU, and with the first layers' weights left on disk until they are needed."""
    model = small(arch)
    model.save_pretrained(tmp_path / "saved")
    want = logits(model, IDS)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu")
    assert torch.equal(logits(whole, IDS), want)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="auto"), IDS), want)
    parts = {name: "cpu" for name, _ in model.model.named_children() if name != "layers"}
    device_map = {"lm_head": "cpu"} | {f"model.{name}": device for name, device in parts.items()}
    if model.model.lower_bounds is not None:
        device_map["model.lower_bounds"] = "cpu"
    device_map |= {f"model.layers.{i}": "disk" if i < 2 else "cpu" for i in range(3)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "disk"
    )
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta
    # Where weights come and go the layers are nn.Linear's own, whose sums have another order than oneDNN's (see ``dense``).
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(logits(offloaded, IDS), logits(model, IDS))
    torch.testing.assert_close(logits(offloaded, IDS), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        offloaded.generate(IDS, max_new_tokens=4, do_sample=False),
        model.generate(IDS, max_new_tokens=4, do_sample=False),
    )


@every_kind
def test_parallel_plans_name_modules_that_exist(arch):
    """A plan whose entry matches nothing is silently ignored by the library."""
    model = small(arch)
    names = [name for name, _ in model.named_modules()]
    base_plan = {f"model.{pattern}" for pattern in model.config.base_model_tp_plan}
    for pattern in base_plan | set(HybridLinearForCausalLM._tp_plan):
        parts = pattern.replace("*", "{}").split("{}")
        found = [name for name in names if name.startswith(parts[0]) and name.endswith(parts[-1])]
        if "self_attn" in pattern and "full_attention" not in model.config.layer_types:
            assert not found
        else:
            assert found, pattern
    blocks = {type(m).__name__ for m in model.modules()}
    assert set(HybridLinearModel._no_split_modules) <= blocks


def test_float64_to_16_bits_keeps_decays_in_float32():
    """Not in float64, which would drag the state along."""
    model = tiny_model("gated_delta_net", "3-1").to(torch.bfloat16)
    mixer = model.model.layers[0].linear_attn
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
    assert mixer.q_proj.weight.dtype == torch.bfloat16
