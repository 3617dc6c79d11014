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

from benchmarks.common import rows_of, write_result
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
    """Seconds for each length of prompt."""

    def make():
        return build(cell_config(cell)) if who == "ours" else peers.for_inference(who, cell)

    def measure_one(model, length):
        ids = torch.randint(3, model.config.vocab_size, (batch, length), device="cuda")
        times = prefill_seconds(model, ids)
        median = statistics.median(times)
        return {"s": median, "s_range": [times[0], times[-1]], "tokens_per_s": ids.numel() / median}

    rows = rows_of(f"{who:6s} tokens", make, lengths, measure_one)
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
