"""Forward and backward of a 340M model on a GPU: ours, fla's own and a transformers Llama, side by side in one process.

    python -m benchmarks.train_step                        # six mixers, 32 sequences of 2048 tokens, bfloat16
    python -m benchmarks.train_step --mixers GLA --profile  # and where the time goes, kernel by kernel

Kernels are compiled first, in several processes at a time; the timed models then find them in Triton's cache. fla's kernels run
with the configurations that its own search found on this class of card (``peers``). Results: results/train_step.json,
tokens/s by the median step with the fastest and the slowest, peak memory, and MFU of the true operations.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.common import write_result
from hybrid_models import HybridLinearForCausalLM
from hybrid_models.suite import MIXERS, cell_config
from training.accounting import flops_per_token, peak_flops

from . import peers


def build_ours(cell: str):
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = HybridLinearForCausalLM(cell_config(cell)).to(torch.bfloat16).train()
    return lambda ids: model(ids, labels=ids, use_cache=False, skip_logits=True).loss, model


def build_fla(cell: str):
    model = peers.fla(cell)
    model.searched = peers.replay(cell)
    return lambda ids: model(input_ids=ids, labels=ids).loss, model


def build_llama(cell: str):
    model = peers.llama(cell)
    return lambda ids: model(input_ids=ids, labels=ids).loss, model


BUILD = {"ours": build_ours, "fla": build_fla, "llama": build_llama}


def time_steps(who: str, cell: str, batch: int, length: int, steps: int, profile: bool) -> dict:
    """Medians over ``steps`` steps after two; an exception becomes a row that says so."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        start = time.perf_counter()
        loss_of, model = BUILD[who](cell)
        ids = torch.randint(3, 32000, (batch, length), device="cuda")

        def step():
            model.zero_grad()
            loss = loss_of(ids)
            loss.backward()
            torch.cuda.synchronize()
            return loss.item()

        loss = step()
        first = time.perf_counter() - start
        step()
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        if profile:
            print_profile(step, f"{who} {cell}")
    except (RuntimeError, ImportError) as error:
        return {"error": str(error).strip().splitlines()[0][:300]}
    tokens = ids.numel()
    row = {
        "tokens_per_s": tokens / statistics.median(times),
        "tokens_per_s_range": [tokens / max(times), tokens / min(times)],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "first_step_s": first,
        "loss": loss,
    }
    if who == "fla":
        row["searched"] = model.searched
    peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16)
    if who == "ours" and peak:
        row["mfu"] = row["tokens_per_s"] * flops_per_token(model.config, length) / peak
    return row


def print_profile(step, title: str, rows: int = 40) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
    kernels = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels)
    print(f"--- {title}: {total / 1e3:.1f} ms in {sum(e.count for e in kernels)} kernels")
    for e in kernels[:rows]:
        print(f"{e.self_device_time_total / 1e3:8.2f} ms {e.count:6d}  {e.key[:110]}")


def warm_up(jobs: list[tuple[str, str]], at_once: int) -> None:
    """One small step of every job, ``at_once`` processes at a time: compiles what the timed steps will need."""
    waiting, running = list(jobs), []
    while waiting or running:
        while waiting and len(running) < at_once:
            who, cell = waiting.pop(0)
            command = [sys.executable, "-m", "benchmarks.train_step", "--one", who, cell]
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        running = [process for process in running if process.poll() is None]
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default=",".join(MIXERS))
    parser.add_argument("--size", default="340M-20B")
    parser.add_argument("--who", default="ours,fla,llama")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=6, help="processes that compile side by side")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-result", action="store_true", help="print, write no file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        time_steps(*args.one, 2, args.length, 1, False)
        return
    jobs = [
        (who, f"{args.size}-{mixer}-pure")
        for mixer in args.mixers.split(",")
        for who in args.who.split(",")
        if who != "llama"
    ]
    start = time.perf_counter()
    warm_up(jobs, args.at_once)
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    if "llama" in args.who:
        jobs.append(("llama", f"{args.size}-Transformer-seed1"))
    result = {"dtype": "bfloat16", "batch": [args.batch, args.length], "steps": args.steps, "models": {}}
    for who, cell in jobs:
        row = time_steps(who, cell, args.batch, args.length, args.steps, args.profile)
        result["models"].setdefault(cell, {})[who] = row
        text = row.get("error") or " ".join(f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, float))
        print(f"{who:6s} {cell:32s} {row.get('tokens_per_s', 0):9.0f} tokens/s  {text}", flush=True)
    if not args.no_result:
        write_result("train_step", result)


if __name__ == "__main__":
    main()
