"""What a context costs: bytes of cache and time per token by length, measured, beside the closed form.

    python -m evaluation.cost 340M-20B-HGRN2-hybrid-6-1 --lengths 512,2048,8192
    python -m evaluation.cost runs/demo --device cuda --dtype bfloat16

generate() reads a prompt of random tokens and writes some more, with a cache of ours that is looked into afterwards. Its
tensors must have the bytes that the configuration predicts, to 1 %, or the command fails: plans for memory are made from
that formula. (The memory behind a tensor can be larger than the tensor, if it is a view: that is given too.) Next to it
stands a Transformer of the same width and depth. The time is that between tokens as they reach a streamer, so it is what a
reader sees; the quartiles tell how even it is. A cell's name stands for its architecture with random weights: the cost does
not depend on what they are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from hybrid_models import results
from hybrid_models.info import CacheBytes, cache_bytes, expected_cache_bytes, human_bytes, transformer_of_same_size

from .certify import load
from .scoring import DTYPES, add_device_arguments, comma_separated

LENGTHS = (512, 1024, 2048, 4096)
TIMED, UNTIMED = 30, 3  # tokens; the first ones capture the step on CUDA and fill caches elsewhere
TOLERANCE = 0.01  # of the cache's bytes against the closed form
CHUNK = 2048  # tokens of the prompt read at once


class Cost(NamedTuple):
    """One context length."""

    tokens: int  # in the cache at the end; the timed tokens are the last ones of them
    measured: CacheBytes  # of the whole batch
    expected: CacheBytes
    held: int  # bytes of memory that the cache keeps alive after the prompt: also what is behind a view
    transformer: CacheBytes  # closed form, attention at every layer
    token_ms: list[float]  # time between two tokens of the batch, sorted
    first_token_s: float  # from the call to the first token


class _Clock(BaseStreamer):
    """When tokens arrive, and what the cache holds when the first one does. generate() sends it the prompt, too."""

    def __init__(self, cache):
        self.cache, self.held = cache, 0
        self.times: list[float] = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self.held = storage_bytes(self.cache)

    def end(self) -> None:
        pass


def storage_bytes(cache) -> int:
    """Bytes of memory behind the cache's tensors, each storage once."""
    tensors = [x for layer in cache.layers for x in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    for layer in cache.layers:
        for slot in ("recurrent_states", "conv_states"):
            tensors += getattr(layer, slot, {}).values()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x is not None}
    return sum(storages.values())


def measure(model, tokens: int, batch: int = 1, seed: int = 0) -> Cost:
    """Write up to ``tokens`` tokens of context by generate(), greedily, and measure.

    Raises:
        ValueError: too few tokens to time, or no sequence.
        RuntimeError: the cache is not of the size that the configuration predicts, or generate() stopped early.
    """
    new = TIMED + UNTIMED + 1
    prompt = tokens - new + 1  # the last token that is written has not been read
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1.")
    if prompt < 1:
        raise ValueError(f"length={tokens} is too short: {new} tokens are written, so use at least {new}.")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator).to(model.device)
    cache = DynamicCache(config=model.config)
    clock = _Clock(cache)
    config = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, prefill_chunk_size=CHUNK
    )
    own, model.generation_config = model.generation_config, GenerationConfig()  # or its defaults would fill the gaps
    try:
        start = time.perf_counter()
        out = model.generate(ids, generation_config=config, past_key_values=cache, streamer=clock)
    finally:
        model.generation_config = own
    if out.shape[1] != prompt + new or cache.get_seq_length() != tokens:
        raise RuntimeError(f"generate() wrote {out.shape[1] - prompt} tokens instead of {new}: nothing was measured.")
    _, *times = clock.times
    config = model.config
    one = Cost(
        tokens=tokens,
        measured=cache_bytes(cache),
        expected=CacheBytes(*(batch * x for x in expected_cache_bytes(config, tokens, model.dtype))),
        held=clock.held,
        transformer=CacheBytes(
            *(batch * x for x in expected_cache_bytes(transformer_of_same_size(config), tokens, model.dtype))
        ),
        token_ms=sorted(1e3 * (b - a) for a, b in zip(times[UNTIMED:], times[UNTIMED + 1 :])),
        first_token_s=times[0] - start,
    )
    for kind in ("kv", "state"):
        found, wanted = getattr(one.measured, kind), getattr(one.expected, kind)
        if abs(found - wanted) > TOLERANCE * wanted:
            raise RuntimeError(
                f"{kind}: the cache of {batch} x {tokens} tokens has {found:,} bytes, but the configuration says {wanted:,}: "
                "one of the two is wrong."
            )
    return one


def evaluate(
    target: str,
    *,
    lengths: Sequence[int] = LENGTHS,
    batch: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    command: str = "",
) -> tuple[dict, list[Cost]]:
    """The cost of one model by length, as a result of ``hybrid_models.results``, and what was measured.

    Args:
        target: checkpoint directory, repo id, or a cell of the suite (random weights).
        lengths: tokens of context.

    Raises:
        ValueError: see ``measure`` and ``certify.load``.
        RuntimeError: see ``measure``.
    """
    start = time.perf_counter()
    model = load(target, DTYPES[dtype]).to(device)
    measure(model, TIMED + UNTIMED + 1, batch, seed)  # compiles what is compiled once
    costs = [measure(model, tokens, batch, seed) for tokens in tqdm(lengths, desc="lengths", disable=None)]
    numbers = []
    for cost in costs:
        where = dict(length=cost.tokens, batch=batch)
        for kind in ("kv", "state"):
            found, expected = getattr(cost.measured, kind), getattr(cost.expected, kind)
            numbers.append(results.metric("cache", f"{kind}_bytes", found, closed_form=expected, **where))
        total = cost.measured.total
        numbers.append(results.metric("cache", "total_bytes", total, transformer=cost.transformer.total, **where))
        numbers.append(results.metric("cache", "held_after_prompt_bytes", cost.held, **where))
        low, median, high = statistics.quantiles(cost.token_ms, n=4)
        numbers.append(
            results.metric("decode", "ms_per_token", median, n=len(cost.token_ms), quartiles=[low, high], **where)
        )
        numbers.append(results.metric("prefill", "first_token_s", cost.first_token_s, **where))
    one = results.result(
        "cost",
        Path(target).resolve().name if Path(target).is_dir() else target.rsplit("/", 1)[-1],
        command,
        numbers,
        weights=results.weights_sha256(target),
        protocol={"dtype": dtype, "device_type": model.device.type, "prefill_chunk": CHUNK, "timed_tokens": TIMED},
        seeds=[seed],
        seconds=round(time.perf_counter() - start, 1),
    )
    return one, costs


def table(costs: Sequence[Cost]) -> str:
    """What was measured, one line per length."""
    lines = [
        f"{'tokens':>8} {'KV cache':>9} {'state':>9}  {'closed form':>11}  {'held':>9}  {'Transformer':>11}  {'times':>5}"
        f"  {'ms/token':>8}  quartiles"
    ]
    for cost in costs:
        low, median, high = statistics.quantiles(cost.token_ms, n=4)
        lines.append(
            f"{cost.tokens:>8,} {human_bytes(cost.measured.kv):>9} {human_bytes(cost.measured.state):>9}"
            f"  {cost.measured.total / cost.expected.total - 1:>+10.2%} "
            f" {human_bytes(cost.held):>9}  {human_bytes(cost.transformer.total):>11}  {cost.transformer.total / cost.measured.total:>5.1f}"
            f"  {median:>8.2f}  {low:.2f}-{high:.2f}"
        )
    lines += [
        "closed form: deviation of the measured bytes from it; held: memory that the cache keeps alive after the prompt;",
        "times: a Transformer's closed form over the measured bytes",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m evaluation.cost",
        description="Cache bytes and time per token by context length, beside the closed form.",
        epilog="example:\n  python -m evaluation.cost 340M-20B-HGRN2-hybrid-6-1 --lengths 512,2048,8192",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="PATH_OR_NAME", help="checkpoint directory, repo id, or a cell of the suite")
    whole = ",".join(map(str, LENGTHS))
    parser.add_argument(
        "--lengths", type=comma_separated, default=LENGTHS, metavar="N,N", help=f"tokens (default {whole})"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompt (default %(default)s)")
    add_device_arguments(parser)
    options = vars(parser.parse_args(argv))
    folder = options.pop("output")
    try:
        one, costs = evaluate(**options, command=results.this_command("evaluation.cost", argv))
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    print(table(costs))
    label = f"{one['protocol']['device_type']}-{options['dtype']}-batch{options['batch']}"
    print(f"written to {results.write(one, folder, label)}")


if __name__ == "__main__":
    main()
