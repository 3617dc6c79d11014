"""Prefill, the time to the first token of a long prompt: ours, fla's own model and a transformers Llama of the same size.

    python -m benchmarks.prefill                                             # 1.3B GatedDeltaNet 6-1, 512 to 32768 tokens
    python -m benchmarks.prefill --cell 340M-20B-GLA-hybrid-3-1 --batch 8

One forward pass over the whole prompt that fills a cache and computes the logits of the last token alone; the median of five
after two that compile, with the fastest and the slowest. Random weights: what is computed does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.common import write_result
from hybrid_models.suite import cell_config

from . import peers
from .decode import build

LENGTHS = (512, 2048, 8192, 32768)


@torch.no_grad()
def prefill_seconds(model, ids, repeats: int = 5) -> list[float]:
    """Sorted seconds of ``repeats`` forward passes over ``ids`` [B, T]."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])


def measure(who: str, cell: str, batch: int, lengths: list[int]) -> dict:
    """Seconds per prompt length; a length that fails becomes a row that says why."""
    rows = {}
    model = (build(cell_config(cell)) if who == "ours" else getattr(peers, who)(cell, use_cache=True)).eval()
    if who == "fla":
        peers.replay(cell)
    for length in lengths:
        ids = torch.randint(3, model.config.vocab_size, (batch, length), device="cuda")
        try:
            times = prefill_seconds(model, ids)
        except (RuntimeError, TypeError, ValueError) as error:
            rows[length] = {"error": str(error).strip().splitlines()[0][:300]}
            print(f"{who:6s} {length:6d} tokens: {rows[length]['error']}", flush=True)
            continue
        median = statistics.median(times)
        rows[length] = {"s": median, "s_range": [times[0], times[-1]], "tokens_per_s": ids.numel() / median}
        print(f"{who:6s} {length:6d} tokens: {1e3 * median:8.2f} ms, {ids.numel() / median:9.0f} tokens/s", flush=True)
    del model
    torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", default="1.3B-100B-GatedDeltaNet-hybrid-6-1")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--who", default="ours,fla,llama")
    args = parser.parse_args()
    lengths = list(map(int, args.lengths.split(",")))
    models = {who: measure(who, args.cell, args.batch, lengths) for who in args.who.split(",")}
    write_result("prefill", {"dtype": "bfloat16", "cell": args.cell, "batch": args.batch, "models": models})


if __name__ == "__main__":
    main()
