"""Search the block sizes of the decode kernels on this card; the winners are written into triton_kernels by hand.

    python -m benchmarks.tune_decode --hidden 2048 --rows 1,32

Every shape runs over as many copies of its weights as exceed the L2 cache, inside one CUDA graph, as in a decode step.
"""

from __future__ import annotations

import argparse
import itertools

import torch

from hybrid_models.triton_attention import attend
from hybrid_models.triton_kernels import linear_rows
from hybrid_models.triton_steps import delta_step


def graph_microseconds(launch, copies: int, repeats: int = 5) -> float:
    """Microseconds per launch of ``launch(i)`` for i in range(copies), replayed as one graph; the best of ``repeats``."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            launch(i)
    best = float("inf")
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) * 1e3 / copies)
    return best


def shapes(d: int, mlp: int, vocab: int):
    """name: (K, sizes of the weights, options)"""
    heads = d // 256
    return {
        "projections": (d, [d, d, d, heads, heads, d], dict(norm=d)),
        "output": (d, [d], dict(norm=256, head=256, gate=True, residual=True)),
        "attention_qkv": (d, [d, d, d], dict(norm=d)),
        "attention_out": (d, [d], dict(residual=True)),
        "gate_up": (d, [mlp, mlp], dict(norm=d, swiglu=True)),
        "down": (mlp, [d], dict(residual=True)),
        "head": (d, [vocab], dict(norm=d)),
    }


def tune_linear(name, rows, K, sizes, options, activations) -> None:
    options = dict(options)
    bytes_ = 2 * K * sum(sizes)
    copies = max(4, min(24, int(3e8 // bytes_)))
    weights = [[torch.randn(n, K, device="cuda", dtype=torch.bfloat16) for n in sizes] for _ in range(copies)]
    x = torch.randn(rows, K, device="cuda").to(
        torch.bfloat16 if "norm" in options and name != "output" else activations
    )
    norm = options.pop("norm", None)
    if norm:
        options["norm"] = torch.ones(norm, device="cuda", dtype=torch.bfloat16)
    if options.pop("gate", False):
        options["gate"] = torch.randn(rows, K, device="cuda")
    out = (
        torch.bfloat16
        if options.get("residual") or name == "head"
        else (activations if name == "gate_up" else torch.float32)
    )
    y = torch.zeros(rows, sizes[0] if options.get("swiglu") else sum(sizes), device="cuda", dtype=out)
    found = []
    if rows <= 4:
        grid = itertools.product((1, 2, 4), (1024, 2048, 4096, 8192), (4, 8), (1,))
    else:
        grid = itertools.product((16, 32, 64), (128, 256), (4,), (3, 4))
    for BN, BK, warps, stages in grid:
        tile = BN * BK * (2 if options.get("swiglu") else 1)
        if rows <= 4 and (tile * max(rows, 1) > 65536 or tile < warps * 32 * 8 or BK > 2 * K):
            continue
        try:
            time = graph_microseconds(
                lambda i: linear_rows(x, weights[i], y, config=(BN, BK, warps, stages), **options), copies, 3
            )
        except Exception:  # too much shared memory, and the like
            continue
        found.append((time, (BN, BK, warps, stages)))
    found.sort()
    text = ", ".join(f"{config} {time:.1f}" for time, config in found[:4])
    print(
        f"rows {rows:2d} {name:14s} K {K}: best {found[0][0]:6.1f} us {bytes_ / found[0][0] / 1e6:.2f} TB/s | {text}",
        flush=True,
    )


def tune_delta(rows, d) -> None:
    import hybrid_models.triton_steps as kernels

    heads, copies = d // 256, 20
    states = [torch.randn(rows, heads, 256, 256, device="cuda") for _ in range(copies)]
    y, o = torch.randn(rows, 4 * d, device="cuda"), torch.zeros(rows, d, device="cuda")
    a = torch.zeros(heads, device="cuda")
    original = kernels._value_block
    for block in (8, 16, 32, 64):
        kernels._value_block = lambda programs, V, block=block: block
        columns = [0, d, 2 * d, 3 * d, 3 * d + heads]
        time = graph_microseconds(lambda i: delta_step(y, states[i], o, heads, columns, 1.0, a, a), copies)
        moved = 2 * states[0].numel() * 4
        print(f"rows {rows:2d} delta step block {block}: {time:.1f} us {moved / time / 1e6:.2f} TB/s", flush=True)
    kernels._value_block = original


def tune_attention(rows, d, length) -> None:
    heads, D = d // 128, 128
    bytes_ = 4 * rows * length * d
    copies = max(2, min(8, int(4e8 // bytes_)))
    caches = [torch.randn(2, rows, heads, length, D, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    y, o = torch.randn(rows, 3 * d, device="cuda"), torch.zeros(rows, d, device="cuda")
    valid, position = torch.ones(rows, length, device="cuda", dtype=torch.bool), torch.zeros(rows, device="cuda").long()
    last, inv_freq = torch.tensor(length - 1, device="cuda"), torch.ones(D // 2, device="cuda")
    found = []
    for splits, *config in itertools.product((1, 2, 4, 8, 16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2)):
        if not 256 <= splits * rows * heads <= 4096:
            continue
        partial = torch.zeros(rows * heads * splits, D + 2, device="cuda")
        time = graph_microseconds(
            lambda i: attend(y, *caches[i], valid, last, position, inv_freq, partial, o, heads, config=config),
            copies,
            3,
        )
        found.append((time, (splits, *config)))
    found.sort()
    text = ", ".join(f"{config} {time:.1f}" for time, config in found[:6])
    print(
        f"rows {rows:2d} attention {length:6d} tokens: best {found[0][0]:6.1f} us {bytes_ / found[0][0] / 1e6:.2f} TB/s | "
        f"{text}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=0, help="default: 2.75 hidden")
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--only", default="", help="names of shapes, delta, attention; comma-separated")
    parser.add_argument("--activations", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    print(torch.cuda.get_device_name())
    for rows in map(int, args.rows.split(",")):
        for name, (K, sizes, options) in shapes(args.hidden, args.mlp or args.hidden * 11 // 4, 32000).items():
            if not args.only or name in args.only.split(","):
                tune_linear(name, rows, K, sizes, options, getattr(torch, args.activations))
        if not args.only or "delta" in args.only.split(","):
            tune_delta(rows, args.hidden)
        if not args.only or "attention" in args.only.split(","):
            for length in (2048, 32768) if rows > 1 else (2048, 32768, 131072):
                tune_attention(rows, args.hidden, length)


if __name__ == "__main__":
    main()
