"""The nine exactness properties of a hybrid model, one function each.

Each takes a ``Probe`` and yields a ``Check`` per comparison: a name, and how far some way of running the model was from the
plain forward. To add a check, yield one more; to add a property, add its function to PROPERTIES.

    >>> from evaluation.certify import build
    >>> from evaluation.probe import Probe
    >>> from evaluation.properties import cached_decoding
    >>> [check.name for check in cached_decoding(Probe(build("tiny-HGRN2-pure")))][:2]
    ['token by token', 'in chunks of random sizes']
"""

from __future__ import annotations

import copy
import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hybrid_models import kernels, recurrence

from .clean_process import run_remote_code
from .probe import NEW_TOKENS, Check, Probe, deviation, gradient_deviation, randomize

LONG = recurrence.CHUNK_SIZE + 19  # tokens: crosses the border between two chunks of the law
DOCUMENTS = ((1, 30, 7, 44, 3), (40, 2, 2, 41))  # lengths of packed documents, one row each; also across that border


def cached_decoding(probe: Probe) -> Iterator[Check]:
    """Decoding through a cache, token by token or in chunks, is the full forward."""
    ids = probe.tokens(2, LONG)
    expected = probe.full(ids)

    def fed(*sizes):
        total = sum(sizes)
        return deviation(probe.feed(ids[:, :total], sizes, DynamicCache(config=probe.config)), expected[:, :total])

    yield Check("token by token", fed(*[1] * 12))
    yield Check("in chunks of random sizes", fed(*probe.sizes(LONG, largest=25)))
    yield Check("one token, then a chunk longer than the law's", fed(1, LONG - 1))
    yield Check("a long prompt, then tokens", fed(LONG - 5, *[1] * 5))
    yield Check("generate()", probe.generated(probe.rows(9, 9)))
    yield Check("generate(), prompt read in chunks", probe.generated(probe.rows(23, 23), prefill_chunk_size=7))


def padding_and_neighbours(probe: Probe) -> Iterator[Check]:
    """A row does not depend on padding or on the rows beside it."""
    rows = probe.rows(LONG, 1, 9, 4)
    for side in ("left", "right", "middle"):
        ids, mask = probe.pad(rows, side)
        yield Check(f"padded {side}, forward", probe.rows_deviation(probe.full(ids, attention_mask=mask), mask, rows))
    ids = torch.where(mask.bool(), ids, probe.tokens(*ids.shape))
    yield Check("other ids in the padding", probe.rows_deviation(probe.full(ids, attention_mask=mask), mask, rows))
    yield Check(
        "other neighbours", deviation(probe.full(torch.stack((rows[0], probe.tokens(LONG))))[0], probe.full(rows[0]))
    )
    rows = probe.rows(19, 1, 6)
    ids, mask = probe.pad(rows, "anywhere", width=24)
    logits = probe.feed(ids, (5, 1, 9, 1, 1, 7), DynamicCache(config=probe.config), mask)
    yield Check("padded anywhere, in chunks through a cache", probe.rows_deviation(logits, mask, rows))
    rows = probe.rows(9, 1, 4)
    for side in ("left", "right", "middle"):
        yield Check(f"padded {side}, generate()", probe.generated(rows, side))


def packed_documents(probe: Probe) -> Iterator[Check]:
    """Documents packed into a row are separate documents, whichever way their borders are told."""
    packs = [probe.rows(*lengths) for lengths in DOCUMENTS]
    ids = torch.stack([torch.cat(pack) for pack in packs])
    positions = torch.stack([torch.cat([torch.arange(len(document)) for document in pack]) for pack in packs])
    positions = positions.to(probe.device)
    ends = torch.tensor([0, *itertools.accumulate(DOCUMENTS[0])], dtype=torch.int32, device=probe.device)
    numbers = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(DOCUMENTS[0])]).to(probe.device)
    longest = max(DOCUMENTS[0])
    lengths = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest)
    ways = {
        "position_ids": dict(position_ids=positions[:1]),
        "cu_seq_lens_q": lengths,
        "seq_idx": dict(seq_idx=numbers[None]),
        "all three": dict(position_ids=positions[:1], seq_idx=numbers[None], **lengths),
    }
    expected = [torch.cat([probe.full(document) for document in pack]) for pack in packs]
    for name, kwargs in ways.items():
        yield Check(f"{name}, forward", deviation(probe.full(ids[:1], **kwargs)[0], expected[0]))
    yield Check("position_ids, two rows", deviation(probe.full(ids, position_ids=positions), torch.stack(expected)))

    weights = torch.randn(expected[0].shape, generator=probe._generator).to(expected[0])
    separate = probe.gradients(weights, *(dict(input_ids=document[None]) for document in packs[0]))
    for name, kwargs in ways.items():
        gradients = probe.gradients(weights, dict(input_ids=ids[:1], **kwargs))
        yield Check(f"{name}, gradients", gradient_deviation(gradients, separate))
    with checkpointing(probe.model):
        gradients = probe.gradients(weights, dict(input_ids=ids[:1], **ways["position_ids"]))
    yield Check("position_ids, gradients with checkpointing", gradient_deviation(gradients, separate))


@contextmanager
def checkpointing(model):
    """Gradient checkpointing, which asks a layer whether it is training; what is inside stays in eval (no dropout)."""
    layers = model.model.layers
    was_on = model.is_activation_checkpointing
    model.activation_checkpointing_enable()
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        if not was_on:
            model.activation_checkpointing_disable()


def caches_agree(probe: Probe) -> Iterator[Check]:
    """Whatever holds the past, generate() writes what the full forward says."""
    rows = probe.rows(9, 4)
    yield Check("no cache", probe.generated(rows, use_cache=False))
    yield Check("dynamic", probe.generated(rows))
    yield Check("static", probe.generated(rows, cache_implementation="static"))
    static = StaticCache(config=probe.config, max_cache_len=64)
    yield Check("static, longer than needed", probe.generated(rows, past_key_values=static))
    static.reset()
    yield Check("static, reset and used again", probe.generated(probe.rows(5, 7), past_key_values=static))
    ids = probe.tokens(2, 20)
    static = StaticCache(config=probe.config, max_cache_len=32)
    yield Check("static, in chunks", deviation(probe.feed(ids, (7, 1, 1, 8, 3), static), probe.full(ids)))
    for name in ("offloaded", "offloaded_static"):
        if probe.device.type == "cuda":
            yield Check(name, probe.generated(rows, cache_implementation=name))
        else:
            yield Check(name, None, f"not applicable: offloading needs CUDA, this is {probe.device.type}")
    yield Check(
        "the user's DynamicCache(config)", probe.generated(rows, past_key_values=DynamicCache(config=probe.config))
    )
    yield Check("the user's DynamicCache()", probe.generated(rows, past_key_values=DynamicCache()))


def beams_and_batches(probe: Probe) -> Iterator[Check]:
    """Beams, several sequences per prompt, and the cache's batch operations follow the right row."""
    rows = probe.rows(9, 4)
    options = dict(num_beams=3, num_return_sequences=2, output_scores=True)
    pairs = [row for row in rows for _ in range(2)]
    uncached = probe.generate(rows, use_cache=False, **options).sequences_scores.double()
    for name, kwargs in {"dynamic": {}, "static": dict(cache_implementation="static")}.items():
        out = probe.generate(rows, **options, **kwargs)
        yield Check(f"beams, {name} cache", probe.written_deviation(pairs, out, greedy=False))
        yield Check(f"scores of beams, {name} cache", deviation(out.sequences_scores, uncached))
    out = probe.generate(rows, do_sample=True, num_return_sequences=3)
    repeated = [row for row in rows for _ in range(3)]
    yield Check("three samples of each prompt", probe.written_deviation(repeated, out, greedy=False))

    order = torch.tensor([2, 0, 0], device=probe.device)
    dynamic = {
        "reorder_cache": (lambda cache: cache.reorder_cache(order), [2, 0, 0]),
        "batch_select_indices": (lambda cache: cache.batch_select_indices(order[:2]), [2, 0]),
        "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    }
    for name, (operation, kept) in dynamic.items():
        yield Check(name, _after_operation(probe, DynamicCache(config=probe.config), operation, kept))
    static = StaticCache(config=probe.config, max_cache_len=20)
    operation, kept = dynamic["reorder_cache"]
    yield Check("reorder_cache, static", _after_operation(probe, static, operation, kept))
    recorded = DynamicCache(config=probe.config)
    recorded.activate_past_recording()
    yield Check("reorder_cache, then rollback", _after_operation(probe, recorded, operation, kept, crop=3))


def _after_operation(probe: Probe, cache, operation, kept: list[int], crop: int = 0) -> float:
    """Read a prompt, change the batch to rows ``kept``, perhaps take tokens back, continue."""
    ids = probe.tokens(3, 11)
    probe.feed(ids, (8, 3), cache)
    operation(cache)
    if crop:
        cache.crop(-crop)
    ids = torch.cat((ids[kept, : 11 - crop], probe.tokens(len(kept), 5)), 1)
    return deviation(probe.feed(ids[:, -5:], (3, 1, 1), cache), probe.full(ids)[:, -5:])


# What a forward reads (columns), and what is taken back (negative; 0: crop(0), as assisted decoding calls it).
MOVES = [
    (14, -5),
    (9, 5, 0),
    (7, 5, 2, -2),
    (9, 1, 1, 3, -4),
    (6, 1, 4, 3, -10),
    (9, 5, -5),
    (9, 5, -14),
    (9, 5, -4, 3, -2),
    (9, 5, -2, -4, -1),
]
PADDED_MOVES = [(9, 4, 1, 2, -2), (9, 4, 1, 2, -7), (9, 4, 3, -16)]


def rollback(probe: Probe) -> Iterator[Check]:
    """Taking tokens back and going on is never having been there, so assisted decoding is lossless."""
    for moves in MOVES:
        yield Check(", ".join(f"read {n}" if n > 0 else f"back {-n}" for n in moves), _after_moves(probe, moves))
    for moves in PADDED_MOVES:
        yield Check(f"padded rows, back {-moves[-1]} of 16 columns", _after_moves(probe, moves, padded=True))

    rows = [probe.tokens(5).repeat(3)]  # repeats itself, so that there is something to look up
    options = dict(max_new_tokens=2 * NEW_TOKENS)
    yield Check("prompt lookup", probe.generated(rows, prompt_lookup_num_tokens=4, **options))
    yield Check("assisted by a smaller model", probe.generated(rows, assistant_model=_assistant(probe), **options))
    depth = probe.config.num_hidden_layers
    for layers in sorted({1, depth - 1} - {0}):
        yield Check(f"early exit after layer {layers}", probe.generated(rows, assistant_early_exit=layers, **options))
    if depth < 2:
        yield Check("early exit", None, "not applicable: the model has one layer")


def _after_moves(probe: Probe, moves: tuple[int, ...], padded: bool = False) -> float:
    """Make the moves, then read five tokens more, which must not know of what was taken back."""
    cache = DynamicCache(config=probe.config)
    cache.activate_past_recording()
    ids = probe.tokens(2, 0)
    mask = torch.ones_like(ids)

    def read(new, mask_of_new):
        nonlocal ids, mask
        ids, mask = torch.cat((ids, new), 1), torch.cat((mask, mask_of_new), 1)
        return probe.feed(new, (new.shape[1],), cache, mask if padded else None)

    for n in moves:
        if n > 0:
            new = probe.tokens(2, n)
            read(new, (new % 3 > 0).long() if padded else torch.ones_like(new))
        else:
            cache.crop(n)
            ids, mask = ids[:, : ids.shape[1] + n], mask[:, : mask.shape[1] + n]
    seen = torch.cat([read(probe.tokens(2, n), mask.new_ones(2, n)) for n in (3, 1, 1)], 1)
    alone = [probe.full(row[m.bool()])[-5:] for row, m in zip(ids, mask)]
    return deviation(seen, torch.stack(alone))


def _assistant(probe: Probe):
    """A small model of the same vocabulary, with a recurrent and an attention layer."""
    config = type(probe.config)(
        mixer=probe.config.mixers[0],
        layer_types=["linear_attention", "full_attention"],
        vocab_size=probe.config.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    assistant = randomize(type(probe.model)(config)).to(probe.device, probe.model.dtype).eval()
    assistant.generation_config = probe.model.generation_config
    return assistant


def save_and_load(probe: Probe, clean_process: bool = True) -> Iterator[Check]:
    """What is saved comes back bit for bit, also where this package is not installed."""
    ids = probe.tokens(2, 40)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "saved")
        probe.model.save_pretrained(saved)
        loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=probe.model.dtype).to(probe.device).eval()
        yield Check("every tensor through safetensors", _tensor_differences(loaded, probe.model), exact=True)
        logits = Probe(loaded).full(ids)
        yield Check("logits after loading", deviation(logits, probe.full(ids)), exact=True)
        del loaded
        if not clean_process:
            yield Check("remote code in a clean process", None, "left out on request: it starts an interpreter")
            return
        result = run_remote_code(saved, ids)
        expected = probe.model.model(ids, use_cache=False).last_hidden_state.detach()
        yield Check("remote code in a clean process: logits", deviation(result["logits"], probe.full(ids)), exact=True)
        yield Check("remote code: AutoModel's hidden states", deviation(result["hidden"], expected), exact=True)
        again = AutoModelForCausalLM.from_pretrained(result["again"], dtype=probe.model.dtype)
        yield Check("remote code: saved again", _tensor_differences(again.to(probe.device), probe.model), exact=True)


def _tensor_differences(model, expected) -> float:
    """0 if both hold the same names with the same bits, else infinite."""
    a, b = model.state_dict(), expected.state_dict()
    same = a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in b)
    return 0.0 if same else float("inf")


def forms_agree(probe: Probe) -> Iterator[Check]:
    """chunk = step = reference, and every back end that is there."""
    if not probe.recurrent:
        yield Check("chunk = step = reference", None, "not applicable: no layer is linear attention")
        return
    ids, mask = probe.pad(probe.rows(LONG, 31), "middle")
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS[0]])[None].to(probe.device)
    inputs = {
        "plain": (probe.tokens(1, LONG), {}),
        "padded": (ids, dict(attention_mask=mask)),
        "packed": (probe.tokens(1, positions.shape[1]), dict(position_ids=positions)),
    }
    for form, law in {"the reference": recurrence.reference, "single steps": _single_steps}.items():
        for name, (ids, kwargs) in inputs.items():
            with kernels.use_law(law):
                expected = probe.full(ids, **kwargs)
            chosen = kwargs.get("attention_mask", torch.ones_like(ids)).bool()
            yield Check(f"model on {form}, {name}", deviation(probe.full(ids, **kwargs)[chosen], expected[chosen]))
    ids = probe.tokens(1, LONG)
    weights = torch.randn(LONG, probe.config.vocab_size, generator=probe._generator).to(probe.full(ids))
    with kernels.use_law(recurrence.reference):
        expected = probe.gradients(weights, dict(input_ids=ids))
    actual = probe.gradients(weights, dict(input_ids=ids))
    yield Check("model on the reference, gradients", gradient_deviation(actual, expected))
    for kind, sample in _law_inputs(probe).items():
        yield Check(f"gradcheck of chunk, {kind}", 0.0 if _gradcheck(sample) else float("inf"), exact=True)
    for backend in kernels.describe():
        if backend.name != "torch":
            yield from _on_backend(probe, backend)


def _on_backend(probe: Probe, backend: kernels.Choice) -> Iterator[Check]:
    if not backend.available:
        yield Check(f"back end {backend.name}", None, f"not available: {backend.reason}")
        return
    ids, rows = probe.tokens(1, LONG), probe.rows(9, 4)
    with _forced(backend.name):
        try:
            kernels.select(probe.device, probe.dtype, LONG)
        except RuntimeError as error:
            yield Check(f"back end {backend.name}", None, str(error))
            return
        logits, written = probe.full(ids), probe.generate(rows)
    with _forced("torch"):
        yield Check(f"back end {backend.name}", deviation(logits, probe.full(ids)))
        yield Check(f"back end {backend.name}, generate()", probe.written_deviation(rows, written))


@contextmanager
def _forced(backend: str):
    before = os.environ.get(kernels.ENVIRONMENT_VARIABLE)
    os.environ[kernels.ENVIRONMENT_VARIABLE] = backend
    try:
        yield
    finally:
        del os.environ[kernels.ENVIRONMENT_VARIABLE]
        if before is not None:
            os.environ[kernels.ENVIRONMENT_VARIABLE] = before


def _single_steps(q, k, v, log_decay=None, beta=None, initial_state=None, *, scale=None, valid=None, reset=None):
    """The law by ``recurrence.step`` alone; rows that are invalid or begin at a token are put right between steps."""
    outputs, state = [], initial_state
    for t in range(v.shape[1]):
        now = (None if x is None else x[:, t : t + 1] for x in (q, k, v, log_decay, beta))
        if state is not None and reset is not None:
            state = state * ~reset[:, t].reshape(-1, *[1] * (state.dim() - 1))
        before = state
        o, state = recurrence.step(*now, state, scale=scale)
        if valid is not None:
            keep = valid[:, t].reshape(-1, *[1] * (state.dim() - 1))
            state = torch.where(keep, state, torch.zeros_like(state) if before is None else before)
        outputs.append(o)
    return (None if q is None and k is not None else torch.cat(outputs, 1)), state


def _law_inputs(probe: Probe) -> dict[str, list[torch.Tensor | None]]:
    """What the model's own layers send to the law, cut to one row, 4 tokens, one head and 3 channels: q, k, v, log decay,
    beta and a state for every kind of call."""
    found = {}

    def record(q, k, v, log_decay=None, beta=None, initial_state=None, **options):
        result = recurrence.reference(q, k, v, log_decay, beta, initial_state, **options)
        if k is None:
            kind, sample, state = "vector state", (q, k, v[..., :3], log_decay[..., :3], beta), result[1][:, :3]
        else:
            decay = (
                "no decay"
                if log_decay is None
                else "a decay per head"
                if log_decay.dim() == 3
                else "a decay per channel"
            )
            kind = f"{decay}, {'plain write' if beta is None else 'delta rule'}"
            sample = (
                None if x is None else x[:, :, :1, :3] if x.dim() == 4 else x[:, :, :1]
                for x in (q, k, v, log_decay, beta)
            )
            state = result[1][:, :1, :3, :3]
        found[kind] = [None if x is None else x[:1, :4] for x in sample] + [state[:1]]
        return result

    with kernels.use_law(record):
        probe.full(probe.tokens(1, 4))
    return found


def _gradcheck(sample: list[torch.Tensor | None]) -> bool:
    """Autograd against finite differences in float64, without and with a document's border inside."""
    leaves = [None if x is None else x.detach().double().clone().requires_grad_() for x in sample]
    border = torch.arange(4, device=sample[2].device)[None] == 2
    return all(
        torch.autograd.gradcheck(
            lambda *x, reset=reset: recurrence.chunk(*x, reset=reset), leaves, raise_exception=False
        )
        for reset in (None, border)
    )


def reused_caches(probe: Probe) -> Iterator[Check]:
    """A prompt's cache serves several continuations; a returned cache is continued as if in one run."""
    prompt = probe.tokens(1, 12)
    cache = DynamicCache(config=probe.config)
    probe.feed(prompt, (12,), cache)
    for name in ("first", "second"):
        whole = torch.cat((prompt, probe.tokens(1, 5)), 1)
        seen = probe.feed(whole[:, 12:], (3, 1, 1), copy.deepcopy(cache))
        yield Check(f"deepcopy of a prompt's cache, {name} continuation", deviation(seen, probe.full(whole)[:, 12:]))
    whole = torch.cat((prompt[0], probe.tokens(3)))
    yield Check("deepcopy, then generate()", probe.generated([whole], past_key_values=copy.deepcopy(cache)))
    turns = {
        "no padding": ((9, 9), (4, 4), "left"),
        "padded left": ((9, 4), (2, 5), "left"),
        "padded right": ((9, 4), (2, 5), "right"),
    }
    for name, (first, second, side) in turns.items():
        yield Check(
            f"second turn on the returned cache, {name}",
            _two_turns(probe, probe.rows(*first), probe.rows(*second), side),
        )
    rows = [probe.tokens(5).repeat(3)]
    lookup = dict(prompt_lookup_num_tokens=4)
    yield Check("second turn after prompt lookup", _two_turns(probe, rows, probe.rows(4), "left", **lookup))


def _two_turns(probe: Probe, rows, more, side: str, **first) -> float:
    out = probe.generate(rows, side, **first)
    _, mask = probe.pad(rows, side)
    new = out.sequences[:, mask.shape[1] :]
    past = torch.stack((torch.cat((mask, torch.ones_like(new)), 1), out.sequences))
    again = probe.generate(more, side, past=past, past_key_values=out.past_key_values)
    return probe.written_deviation([torch.cat(parts) for parts in zip(rows, new, more)], again)


PROPERTIES = {
    1: ("cached decoding = full forward", cached_decoding),
    2: ("padding and neighbours change nothing", padding_and_neighbours),
    3: ("packed documents = separate documents", packed_documents),
    4: ("all caches agree", caches_agree),
    5: ("beams, samples and batch operations", beams_and_batches),
    6: ("rollback = never having been there", rollback),
    7: ("save, load, remote code: bit-identical", save_and_load),
    8: ("chunk = step = reference = every back end", forms_agree),
    9: ("caches copied, returned and continued", reused_caches),
}
