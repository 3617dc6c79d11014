"""On a CUDA device: the captured decode step against the plain path. Skipped elsewhere.

    python -m pytest -n 4 -m gpu tests/test_gpu.py --gpu-result benchmarks/results/gpu_tests.json

The kernels themselves are compared on the CPU too, in Triton's interpreter (test_triton_kernels.py); what only a device
shows is the capture, its reuse across calls, and 16-bit arithmetic.
"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LogitsProcessorList

from hybrid_models import decode_step
from hybrid_models.configuration_hybrid_linear import MIXERS
from tests.common import randomize, tiny_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASES = [(mixer, "3-1") for mixer in MIXERS] + [("gla", "pure"), ("gated_delta_net", "full")]


def model_of(mixer, level, dtype=torch.float32, **fields):
    from hybrid_models import HybridLinearForCausalLM

    torch.manual_seed(0)
    heads = {} if mixer == "hgrn" else {"linear_num_key_heads": 2}
    fields = {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 384, **heads, **fields}
    config = tiny_config(mixer, level, num_attention_heads=4, num_key_value_heads=2, **fields)
    return randomize(HybridLinearForCausalLM(config)).to("cuda", dtype).eval()


def batch_of(rows, columns=21, padded=True):
    g = torch.Generator().manual_seed(rows)
    ids = torch.randint(3, 101, (rows, columns), generator=g)
    mask = torch.ones_like(ids)
    if padded and rows > 1:
        for row in range(rows):
            mask[row, : row % 7] = 0
    return ids.cuda(), mask.cuda()


def generate(model, ids, mask, captured, monkeypatch, new=24, **options):
    with monkeypatch.context() as patch:
        patch.setenv("HYBRID_LINEAR_BACKEND", "triton" if captured else "torch")
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            **{"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options},
        )


def largest_difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a.logits, b.logits, strict=True))


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("rows", [1, 3, 8, 32, 70])
@pytest.mark.parametrize("mixer,level", CASES)
def test_captured_is_plain_in_float32(mixer, level, rows, monkeypatch):
    """Same tokens; logits within 1e-4 of order-one values: summation order over up to 384 terms, 6 layers, 24 steps."""
    model = model_of(mixer, level)
    ids, mask = batch_of(rows)
    plain, captured = (generate(model, ids, mask, on, monkeypatch) for on in (False, True))
    assert torch.equal(plain.sequences, captured.sequences)
    assert largest_difference(plain, captured) < 1e-4
    for a, b in zip(plain.past_key_values.layers, captured.past_key_values.layers, strict=True):
        a, b = (x.recurrent_states[0] if hasattr(x, "recurrent_states") else x.keys for x in (a, b))
        assert (a - b).abs().max() < 1e-4 * a.abs().max()


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("mixer,level", CASES)
def test_bfloat16(mixer, level, rows, monkeypatch):
    """Against the float32 model of the same (rounded) weights, the captured step may be at most 1.5 times as far away as
    the plain bfloat16 path is, over teacher-forced steps: it rounds less often, and 1.5 covers the luck of rounding."""
    model = model_of(mixer, level, torch.bfloat16)
    exact = copy.deepcopy(model).float()
    ids, mask = batch_of(rows)
    force = torch.randint(3, 101, (24, rows), generator=torch.Generator().manual_seed(5)).cuda()

    def forced(step_ids, scores):  # the same continuation for all three
        wanted = force[step_ids.shape[1] - ids.shape[1]]
        return torch.full_like(scores, float("-inf")).scatter(1, wanted[:, None], 0.0)

    runs = [
        generate(m, ids, mask, on, monkeypatch, logits_processor=LogitsProcessorList([forced]))
        for m, on in ((exact, False), (model, False), (model, True))
    ]
    want, plain, captured = (torch.stack(run.logits).float() for run in runs)
    error = [(x - want).square().mean().sqrt().item() for x in (plain, captured)]
    assert error[1] < 1.5 * error[0] + 1e-4, error


def test_graph_is_reused_and_bounded(monkeypatch):
    model = model_of("gated_delta_net", "3-1")
    first, other, third = (batch_of(rows) for rows in (2, 5, 9))
    want = {id(batch): generate(model, *batch, False, monkeypatch).sequences for batch in (first, other, third)}
    for batch in (first, other, first, third, first, other):
        got = generate(model, *batch, True, monkeypatch, return_dict_in_generate=False)
        assert torch.equal(got, want[id(batch)])
    assert len(decode_step._steps[model]) == decode_step.MAX_STEPS
    graphs = [graph for step in decode_step._steps[model].values() for graph in step.graphs.values()]
    assert graphs and all(graph is not None for graph in graphs)
    decode_step.release(model)
    assert model not in decode_step._steps


@pytest.mark.parametrize("alone", [True, False], ids=["on-the-device", "library-loop"])
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
def test_multi_turn_on_a_users_cache(alone, sample, monkeypatch):
    """Rows end inside a block of steps, and the cache goes on as if nothing had been computed after that."""
    from transformers import DynamicCache

    model = model_of("gated_delta_net", "3-1")
    more = dict(
        return_dict_in_generate=not alone,
        output_logits=not alone,
        do_sample=sample,
        eos_token_id=list(range(3, 11)),
        pad_token_id=0,
    )
    ids, mask = batch_of(3)
    turn = torch.randint(3, 101, (3, 6), generator=torch.Generator().manual_seed(9)).cuda()
    results = []
    for captured in (False, True):
        for seed in (3, 4, 5):  # the first runs without a graph, the second captures
            torch.manual_seed(seed)
            cache, longer, longer_mask = DynamicCache(config=model.config), ids, mask
            for _ in range(2):
                out = generate(model, longer, longer_mask, captured, monkeypatch, past_key_values=cache, **more)
                longer = torch.cat((out if alone else out.sequences, turn), 1)
                longer_mask = torch.cat((mask, mask.new_ones(3, longer.shape[1] - mask.shape[1])), 1)
            results.append((longer.tolist(), cache.get_seq_length()))
    assert results[:3] == results[3:]


@pytest.mark.parametrize("alone", [True, False], ids=["on-the-device", "library-loop"])
@pytest.mark.parametrize(
    "options", [dict(top_k=20), dict(temperature=0.8, top_p=0.9, top_k=0), dict(min_p=0.1, top_k=0)], ids="-".join
)
def test_sampling_draws_the_same_tokens(options, alone, monkeypatch):
    """And leaves the same random numbers for what comes after, also where rows end early."""
    model = model_of("hgrn2", "3-1")
    ids, mask = batch_of(4)
    eos = dict(eos_token_id=list(range(3, 11)), pad_token_id=0)
    draws, states = [], []
    for captured in (False, True):
        for seed in (3, 4, 5):  # the first runs without a graph, the second captures
            torch.manual_seed(seed)
            out = generate(
                model, ids, mask, captured, monkeypatch,
                do_sample=True, return_dict_in_generate=not alone, output_logits=not alone, **eos, **options,
            )  # fmt: skip
            draws.append((out if alone else out.sequences).tolist())
            states.append(torch.cuda.get_rng_state().tolist())
    assert draws[:3] == draws[3:] and states[:3] == states[3:]


def test_new_weights_are_seen(monkeypatch):
    """In-place updates reach the captured step; moved weights make it start over."""
    model = model_of("hgrn2", "3-1")
    ids, mask = batch_of(2)
    generate(model, ids, mask, True, monkeypatch)
    randomize(model.cpu(), seed=8).cuda()
    with torch.no_grad():
        model.model.lower_bounds.add_(1.0)
    plain, captured = (generate(model, ids, mask, on, monkeypatch) for on in (False, True))
    assert torch.equal(plain.sequences, captured.sequences)
    assert largest_difference(plain, captured) < 1e-4


def check_close(got, want, error: float, slope: float):
    """Relative error below ``error``, and the regression of got on want within ``slope`` of 1.

    Rounding has no direction, so over thousands of elements the slope is far more exact than any element, and sees what
    is wrong by one per cent (``test_these_bounds_have_teeth``).
    """
    got, want = got.double().flatten(), want.double().flatten()
    assert ((got - want).norm() / want.norm()).item() < error
    assert abs((got @ want / (want @ want)).item() - 1) < slope


def test_these_bounds_have_teeth():
    want = torch.randn(10_000)
    check_close(want.bfloat16(), want, 1e-2, 3e-3)
    with pytest.raises(AssertionError):
        check_close((1.01 * want).bfloat16(), want, 1e-2, 3e-3)


@pytest.mark.parametrize("width", [64, 128, 256], ids="wide-{}".format)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("law", ["vector", "fixed", "channel", "none-delta", "head-delta"])
def test_fla_laws_are_the_reference(law, documents, width):
    """Outputs and all gradients against the float64 reference on the same rounded numbers; heads of 128 take other tiles,
    those of 256 (GLA, RetNet and GatedDeltaNet at 1.3B) yet others."""
    pytest.importorskip("fla")
    from hybrid_models.fla_kernels import chunk
    from hybrid_models.layout import TokenLayout
    from hybrid_models.recurrence import reference

    g = torch.Generator().manual_seed(3)
    B, T, H, K, V = 2, 200, 2, width, 2 * width
    q, k, v = (torch.randn(B, T, H, n, generator=g) for n in (K, K, V))
    beta = decay = None
    if law.endswith("delta"):
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        beta = torch.rand(B, T, H, generator=g)
    if law == "vector":
        q = k = None
        v, decay = v.flatten(2), -torch.rand(B, T, H * V, generator=g)
    elif law == "channel":
        decay = -torch.rand(B, T, H, K, generator=g) / 8
    elif law == "head-delta":
        decay = -torch.rand(B, T, H, generator=g) / 4
    leaves = [x.cuda() for x in (q, k, v, decay, beta) if x is not None]
    leaves = [x.bfloat16() if x.dim() == 4 and x is not decay else x for x in leaves]
    if law in ("vector", "channel"):  # gates stay in float32
        leaves[-1] = leaves[-1].float()
        leaves[:-1] = [x.bfloat16() for x in leaves[:-1]]
    fixed = torch.log1p(-torch.exp2(-5.0 - torch.arange(H))).cuda() if law == "fixed" else None
    reset = torch.rand(B, T, generator=g) < 0.05 if documents else None
    layout = TokenLayout().packed(None if reset is None else reset.cuda())

    def run(form, dtype, **options):
        own = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
        rest = list(own)
        args = [None if x is None else rest.pop(0) for x in (q, k, v, decay, beta)]
        if fixed is not None:
            args[3] = fixed.to(dtype or torch.float32).expand(B, T, H)
        o, _ = form(*args, **options)
        weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(7)).to(o)
        (o * weights).sum().backward()
        return o.detach(), *(x.grad for x in own)

    want = run(reference, torch.float64, reset=layout.reset)
    got = run(chunk, None, boundaries=layout.boundaries)
    for a, b in zip(got, want, strict=True):
        check_close(a, b, 2e-2, 3e-3)  # bfloat16 rounds by up to 2e-3; products of three such, summed


@pytest.mark.parametrize("width", [64, 256], ids="wide-{}".format)
@pytest.mark.parametrize("documents", [False, True])
def test_fixed_decay_is_flas_own_to_the_bit(documents, width):
    """States that are stored in 16 bits for the backward change nothing, for the kernels round them when they read them."""
    pytest.importorskip("fla")
    from fla.ops.simple_gla import chunk_simple_gla

    from hybrid_models.fla_kernels import chunk

    g = torch.Generator().manual_seed(5)
    B, T, H, K, V = (1 if documents else 3), 333, 2, width, 2 * width
    boundaries = torch.tensor([0, 5, 70, 333]).cuda() if documents else None
    leaves = [torch.randn(B, T, H, n, generator=g).cuda().bfloat16() for n in (K, K, V)]
    if not documents:
        leaves.append(torch.randn(1, H, K, V, generator=g).cuda())
    decay = torch.log1p(-torch.exp2(-5.0 - torch.arange(H))).cuda()
    weights = torch.randn(B, T, H, V, generator=g).cuda()

    def run(law):
        own = [x.clone().requires_grad_() for x in leaves]
        # A trained initial state is one for all rows, and the gradient of a sum one number: neither lies in memory whole.
        o, last = law(*own[:3], *(x.expand(B, -1, -1, -1) for x in own[3:]))
        kept = 1 if documents else B  # ours is the state after the row, theirs that of each document
        ((o * weights).sum() + last[-kept:].sum()).backward()
        return o, last[-kept:], *(x.grad for x in own)

    scale = dict(scale=K**-0.5)
    got = run(
        lambda q, k, v, *state: chunk(q, k, v, decay.expand(B, T, H), None, *state, boundaries=boundaries, **scale)
    )
    options = dict(g_gamma=decay, output_final_state=True, cu_seqlens=boundaries, **scale)
    want = run(lambda q, k, v, state=None: chunk_simple_gla(q, k, v, initial_state=state, **options))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["plain", "padded", "packed"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_fused_and_fla_agree_with_torch_in_training(mixer, case, monkeypatch):
    """Gradients in bfloat16: the fused path may be at most 1.5 times as far from float32 as torch's own bfloat16 path, plus
    2e-3 of their norm, and its slope within 1 % (the torch path's own is of that size through two layers)."""
    pytest.importorskip("fla")
    model = model_of(mixer, "3-1", torch.bfloat16, num_hidden_layers=3)
    exact = copy.deepcopy(model).float()
    ids = torch.randint(3, 101, (2, 200), generator=torch.Generator().manual_seed(1)).cuda()
    labels, inputs = ids, {}
    if case == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :50] = 0
        labels = ids.masked_fill(inputs["attention_mask"] == 0, -100)
    elif case == "packed":
        inputs["position_ids"] = torch.stack((torch.arange(200) % 77, torch.arange(200))).cuda()

    def gradients(m, backend, skip_logits):
        monkeypatch.setenv("HYBRID_LINEAR_BACKEND", backend)
        m.zero_grad()
        m(ids, labels=labels, use_cache=False, skip_logits=skip_logits, **inputs).loss.backward()
        return torch.cat([p.grad.flatten().float() for p in m.parameters()])

    want = gradients(exact, "torch", False)
    plain, fused = gradients(model, "torch", False), gradients(model, "fla", True)
    errors = [((x - want).norm() / want.norm()).item() for x in (plain, fused)]
    assert errors[1] < 1.5 * errors[0] + 2e-3, errors
    assert abs((fused @ want / (want @ want)).item() - 1) < 1e-2


@pytest.mark.parametrize("mixer", MIXERS)
def test_fused_in_float32_and_under_autocast(mixer, monkeypatch):
    """float32: the torch path's gradients to 1e-4 (order of summation). Autocast: float32 gradients near those."""
    model = model_of(mixer, "3-1", torch.float32, num_hidden_layers=3)
    ids = torch.randint(3, 101, (2, 130), generator=torch.Generator().manual_seed(1)).cuda()

    def gradients(backend, autocast):
        monkeypatch.setenv("HYBRID_LINEAR_BACKEND", backend) if backend else monkeypatch.delenv(
            "HYBRID_LINEAR_BACKEND", raising=False
        )
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids, use_cache=False, skip_logits=True).loss
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    want = gradients("torch", False)
    assert (gradients(None, False) - want).norm() < 1e-4 * want.norm()
    plain, fused = gradients("torch", True), gradients(None, True)
    errors = [((x - want).norm() / want.norm()).item() for x in (plain, fused)]
    assert errors[1] < 1.5 * errors[0] + 2e-3, errors


@pytest.mark.parametrize("where", ["input_ids", "labels", "cache"])
@pytest.mark.parametrize("bad", [-1, 101])
def test_ids_outside_the_vocabulary_raise_and_leave_the_device_usable(where, bad):
    """In training the question is asked at the start and answered at the end (``checks``); a cache never sees such ids."""
    model = model_of("gla", "3-1", torch.bfloat16, num_hidden_layers=3)
    ids, _ = batch_of(2, padded=False)
    wrong = ids.clone()
    wrong[1, 7] = bad
    use_cache = where == "cache"
    with pytest.raises(ValueError, match="labels must be" if where == "labels" else "outside the vocabulary"):
        if where == "labels":
            model(ids, labels=wrong, use_cache=False, skip_logits=True)
        else:
            model(wrong, labels=ids, use_cache=use_cache, skip_logits=not use_cache)
    assert torch.isfinite(model(ids, labels=ids, use_cache=False, skip_logits=True).loss)


@pytest.mark.parametrize("mixer", MIXERS)
def test_fla_continues_a_cache(mixer, monkeypatch):
    """Chunked prefill: later chunks start from a state."""
    pytest.importorskip("fla")
    model = model_of(mixer, "3-1", torch.bfloat16)
    ids, mask = batch_of(3, columns=150)
    outputs = []
    for backend in ("torch", "fla"):
        monkeypatch.setenv("HYBRID_LINEAR_BACKEND", backend)
        with torch.no_grad():
            cache = model(ids[:, :80], attention_mask=mask[:, :80], use_cache=True).past_key_values
            outputs.append(model(ids[:, 80:], attention_mask=mask, past_key_values=cache).logits.float())
    monkeypatch.setenv("HYBRID_LINEAR_BACKEND", "torch")
    with torch.no_grad():
        want = copy.deepcopy(model).float()(ids, attention_mask=mask, use_cache=False).logits[:, 80:]
    errors = [(x - want).square().mean().sqrt().item() for x in outputs]
    assert errors[1] < 1.5 * errors[0] + 1e-3, errors
