"""Decoding speed through generate(), beside the bytes that each token has to read.

    python -m benchmarks.decode                                              # 340M and 1.3B GatedDeltaNet 6-1, batch 1 and 32
    python -m benchmarks.decode --cells 1.3B-100B-HGRN2-hybrid-3-1 --batches 1 --peers ''

A step is timed as the difference of two calls with different numbers of new tokens, so the prompt, the capture and the
first token drop out. ``bytes`` is what a step must move at least: every weight but the embedding once, the recurrent
states twice (read and written), the key/value cache once. ``read_tb_s`` is what a plain read of the card gives in the same
run; ``share_of_read`` is the step's bytes over its time, divided by that. The peers are fla's own model of the cell and
transformers' Llama of its size, as they come (``benchmarks.peers``), in shorter runs, for they are slow.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.common import rows_of, write_result
from hybrid_models import HybridLinearForCausalLM
from hybrid_models.suite import cell_config

from . import peers

PROMPT = 128
SHORT, LONG = 16, 272
PEER_SHORT, PEER_LONG = 4, 28


def build(config, dtype=torch.bfloat16):
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return HybridLinearForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def read_bandwidth() -> float:
    """Bytes per second of summing 8 GiB, the best of five."""
    x = torch.ones(2**31, dtype=torch.float32, device="cuda")
    best = float("inf")
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        x.sum()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return x.numel() * 4 / best


def step_bytes(model, batch: int, context: int) -> int:
    config, width = model.config, model.dtype.itemsize
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.model.embed_tokens.weight.numel() * width
    return weights + batch * (2 * config.state_bytes(width) + context * config.kv_bytes_per_token(width))


def generate_seconds(model, ids, new_tokens: int, **options) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0, **options)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def step_milliseconds(model, ids, repeats: int = 5, lengths=(SHORT, LONG), **options) -> list[float]:
    """Sorted milliseconds per token over ``repeats`` pairs of calls."""
    generate_seconds(model, ids, lengths[1], **options)  # compiles and captures
    steps = []
    for _ in range(repeats):
        short, long = (generate_seconds(model, ids, n, **options) for n in lengths)
        steps.append(1e3 * (long - short) / (lengths[1] - lengths[0]))
    return sorted(steps)


def measure_peer(who: str, cell: str, batches: list[int]) -> dict:
    """Greedy milliseconds per step for each batch."""

    def measure_one(model, batch):
        ids = torch.randint(3, model.config.vocab_size, (batch, PROMPT), device="cuda")
        steps = step_milliseconds(model, ids, 3, (PEER_SHORT, PEER_LONG), do_sample=False)
        return {"ms_per_step": statistics.median(steps), "min_ms": steps[0], "max_ms": steps[-1]}

    return rows_of(f"{cell:40s} {who} batch", lambda: peers.for_inference(who, cell), batches, measure_one)


def measure(cell: str, batches: list[int], bandwidth: float) -> dict:
    start = time.perf_counter()
    model = build(cell_config(cell))
    rows = {}
    for batch in batches:
        ids = torch.randint(3, model.config.vocab_size, (batch, PROMPT), device="cuda")
        first = generate_seconds(model, ids, 2, do_sample=False)
        row = {"first_two_tokens_s": first}
        for name, options in (("greedy", dict(do_sample=False)), ("sampling", dict(do_sample=True, top_k=50))):
            steps = step_milliseconds(model, ids, **options)
            moved = step_bytes(model, batch, PROMPT + LONG // 2)
            row[name] = {
                "ms_per_step": statistics.median(steps),
                "min_ms": steps[0],
                "max_ms": steps[-1],
                "tb_s": moved / (statistics.median(steps) * 1e-3) / 1e12,
                "share_of_read": moved / (statistics.median(steps) * 1e-3) / bandwidth,
            }
        rows[batch] = row
        greedy = row["greedy"]
        print(
            f"{cell:40s} batch {batch:3d}: greedy {greedy['ms_per_step']:.3f} ms ({greedy['share_of_read']:.0%} of read), "
            f"sampling {row['sampling']['ms_per_step']:.3f} ms",
            flush=True,
        )
    del model
    torch.cuda.empty_cache()
    return {"batches": rows, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="340M-20B-GatedDeltaNet-hybrid-6-1,1.3B-100B-GatedDeltaNet-hybrid-6-1")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--peers", default="fla,llama", help="timed beside ours (default %(default)s)")
    parser.add_argument("--peers-for", help="cells that the peers are timed at (default: all)")
    parser.add_argument("--name", default="decode", help="name of the result file")
    args = parser.parse_args()
    bandwidth = read_bandwidth()
    batches = [int(batch) for batch in args.batches.split(",")]
    beside = (args.peers_for or args.cells).split(",")
    cells, timed = {}, {}
    for cell in args.cells.split(","):
        cells[cell] = measure(cell, batches, bandwidth)
        for who in filter(None, args.peers.split(",") if cell in beside else ()):
            same = who, cell.split("-")[0] if who == "llama" else cell  # Llama's size is all that it has of a cell
            timed[same] = timed.get(same) or measure_peer(who, cell, batches)
            cells[cell][who] = timed[same]
    write_result(args.name, {"dtype": "bfloat16", "prompt": PROMPT, "read_tb_s": bandwidth / 1e12, "cells": cells})


if __name__ == "__main__":
    main()
