"""What a long context costs: prefill, decoding and cache, for the six levels of attention of one mixer.

    python -m benchmarks.context                                             # 1.3B GatedDeltaNet, 512 to 131072 tokens
    python -m benchmarks.context --levels 6-1,full --peers ''

Prefill goes through the model in pieces of 8192 tokens; decoding through generate() on that cache, batch 1, as the difference
of two calls (see ``benchmarks.decode``). ``cache_bytes`` is what the cache's tensors hold, ``formula_bytes`` what the
configuration says. Times are for random weights: what is computed does not depend on them. The peers, fla's own model at
6-1 and transformers' Llama of its size, generate after the whole prompt, in shorter runs (``benchmarks.peers``).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from transformers import DynamicCache

from benchmarks.common import rows_of, write_result
from hybrid_models.decode_step import release
from hybrid_models.info import cache_bytes, expected_cache_bytes
from hybrid_models.suite import cell_config

from . import peers
from .decode import PEER_LONG, PEER_SHORT, build, generate_seconds, read_bandwidth, step_bytes, step_milliseconds
from .prefill import prefill_seconds

CONTEXTS = (512, 2048, 8192, 32768, 131072)
PIECE = 8192
SHORT, LONG = 8, 72


@torch.no_grad()
def prefill(model, ids) -> tuple[DynamicCache, float]:
    """The cache of ``ids`` [1, T], and the seconds it took."""
    cache = DynamicCache(config=model.config)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for piece in ids.split(PIECE, 1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    torch.cuda.synchronize()
    return cache, time.perf_counter() - start


def measure(model, tokens: int, bandwidth: float, repeats: int) -> dict:
    ids = torch.randint(3, model.config.vocab_size, (1, tokens + 1), device="cuda")
    prefill(model, ids[:, :-1])  # compiles
    cache, seconds = prefill(model, ids[:, :-1])
    held, formula = cache_bytes(cache), expected_cache_bytes(model.config, tokens, model.dtype)
    times = []
    for _ in range(repeats + 1):  # the first captures
        pair = [
            generate_seconds(model, ids, new, do_sample=False, past_key_values=copy.deepcopy(cache))
            for new in (SHORT, LONG)
        ]
        times.append((pair[1] - pair[0]) / (LONG - SHORT))
    best = sorted(times[1:])
    step = best[len(best) // 2]
    release(model)
    return {
        "prefill_s": seconds,
        "prefill_tokens_per_s": tokens / seconds,
        "decode_ms": 1e3 * step,
        "decode_ms_range": [1e3 * best[0], 1e3 * best[-1]],
        "share_of_read": step_bytes(model, 1, tokens) / step / bandwidth,
        "cache_bytes": held.total,
        "formula_bytes": formula.total,
    }


def measure_peer(who: str, cell: str, contexts: list[int]) -> dict:
    """As ``measure``, without the cache."""

    def measure_one(model, tokens):
        ids = torch.randint(3, model.config.vocab_size, (1, tokens), device="cuda")
        seconds = statistics.median(prefill_seconds(model, ids, 1))
        steps = step_milliseconds(model, ids, 1, (PEER_SHORT, PEER_LONG), do_sample=False)
        return {"prefill_s": seconds, "prefill_tokens_per_s": tokens / seconds, "decode_ms": steps[0]}

    rows = rows_of(f"{who:5s} tokens", lambda: peers.for_inference(who, cell), contexts, measure_one)
    torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.3B-100B")
    parser.add_argument("--mixer", default="GatedDeltaNet")
    parser.add_argument("--levels", default="pure,24-1,12-1,6-1,3-1,full")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default="fla,llama", help="timed beside ours (default %(default)s)")
    args = parser.parse_args()
    contexts = list(map(int, args.contexts.split(",")))
    bandwidth = read_bandwidth()
    result = {"dtype": "bfloat16", "batch": 1, "read_tb_s": bandwidth / 1e12, "mixer": args.mixer, "levels": {}}
    for level in args.levels.split(","):
        name = {"full": "Transformer-seed1", "pure": f"{args.mixer}-pure"}.get(level, f"{args.mixer}-hybrid-{level}")
        model = build(cell_config(f"{args.size}-{name}"))
        rows = result["levels"][level] = {}
        for tokens in contexts:
            row = rows[tokens] = measure(model, tokens, bandwidth, args.repeats)
            print(
                f"{level:5s} {tokens:7,d} tokens: prefill {row['prefill_s']:.3f} s, decode {row['decode_ms']:.3f} ms, "
                f"cache {row['cache_bytes'] / 2**20:,.0f} MiB",
                flush=True,
            )
        del model
        torch.cuda.empty_cache()
    result["peers"] = {
        who: measure_peer(who, f"{args.size}-{args.mixer}-hybrid-6-1", contexts)
        for who in filter(None, args.peers.split(","))
    }
    write_result("context", {"size": args.size, **result})


if __name__ == "__main__":
    main()
