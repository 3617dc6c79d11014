"""On the CPU, beside transformers' own hybrid: prefill, training step, decode; growth with length; import time.

    python -m benchmarks.cpu                 # everything, about ten minutes on two cores
    python -m benchmarks.cpu --only compare  # compare, dense, law, growth or import

The peer is OLMo-Hybrid, the library's GatedDeltaNet hybrid with the same projections, convolution and gate as ours, on
its torch fallback; both get the same sizes, one process, float32, two threads, and are timed in turn. Most of a model's
time goes into dense matrix products, which the peer leaves to MKL and we hand to oneDNN (``hybrid_models.dense``); ``dense``
compares the two alone. ``matmul_share`` is the part of our time that they take, and ``bound`` is the ratio that would be
reached if everything else took no time at all. ``law`` compares the chunk forms alone.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import subprocess
import sys
import time

import torch
from torch.profiler import profile

from benchmarks.common import time_in_turn, write_result
from hybrid_models import HybridLinearConfig, HybridLinearForCausalLM
from hybrid_models.configuration_hybrid_linear import MIXERS
from hybrid_models.dense import dense
from hybrid_models.recurrence import chunk

SIZES = {  # hidden size: (layers, MLP width, heads of the mixer, width of a head, attention heads)
    256: (6, 768, 2, 128, 4),
    512: (6, 1408, 4, 128, 8),
    1024: (6, 2816, 4, 256, 16),
}
VOCAB = 8192
DENSE = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
TOKENS = 2048


def pair(hidden: int) -> dict[str, torch.nn.Module]:
    """Ours and the peer, with the same sizes: five linear layers and one attention layer."""
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    layers, mlp, heads, width, attention_heads = SIZES[hidden]
    shared = dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        vocab_size=VOCAB,
        num_attention_heads=attention_heads,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=width,
        linear_value_head_dim=width,
        max_position_embeddings=8192,
        eos_token_id=None,
        pad_token_id=None,
    )
    kinds = ["linear_attention"] * (layers - 1) + ["full_attention"]
    return {
        "ours": HybridLinearForCausalLM(HybridLinearConfig(mixer="gated_delta_net", layer_types=kinds, **shared)),
        "olmo_hybrid": OlmoHybridForCausalLM(OlmoHybridConfig(layer_types=kinds, **shared)),
    }


def prefill(model, ids):
    model.eval()
    with torch.no_grad():
        return model(ids, use_cache=True, logits_to_keep=1).past_key_values


def training_step(model, ids):
    model.train()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()


def training_step_without_logits(model, ids):
    """As the training command does it; a model that has no such way takes its own."""
    model.train()
    model.zero_grad()
    without = {"skip_logits": True} if isinstance(model, HybridLinearForCausalLM) else {}
    model(ids, labels=ids, use_cache=False, **without).loss.backward()


def decode(model, ids, cache, tokens: int = 20):
    model.eval()
    with torch.no_grad():
        for _ in range(tokens):
            model(ids[:, :1], past_key_values=cache)


def matmul_share(function) -> float:
    """Share of a call's CPU time in dense matrix products of the projections."""
    with profile() as profiler:
        function()
    events = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return sum(events.get(name, 0) for name in DENSE) / sum(events.values())


def compare(hidden: int, repeats: int) -> dict:
    models = pair(hidden)
    ids = torch.randint(3, VOCAB, (1, TOKENS))
    caches = {name: prefill(model, ids[:, :512]) for name, model in models.items()}
    phases = {
        "prefill": {name: lambda m=model: prefill(m, ids) for name, model in models.items()},
        "training_step": {name: lambda m=model: training_step(m, ids) for name, model in models.items()},
        "training_step_without_logits": {
            name: lambda m=model: training_step_without_logits(m, ids) for name, model in models.items()
        },
        "decode_20_tokens": {name: lambda m=model, c=caches[name]: decode(m, ids, c) for name, model in models.items()},
    }
    out = {}
    for phase, functions in phases.items():
        times = time_in_turn(functions, repeats)
        ratio = times["olmo_hybrid"]["median_s"] / times["ours"]["median_s"]
        share = matmul_share(functions["ours"])
        bound = ratio / share  # our time, were it all matmul, is share * ours
        out[phase] = {**times, "times_as_fast": ratio, "matmul_share": share, "bound": bound}
        print(
            f"hidden {hidden:5d} {phase:28s} {ratio:5.2f} x (matmul {share:.0%} of ours, bound {bound:.2f} x)",
            flush=True,
        )
    return out


def dense_layers(width: int, repeats: int) -> dict:
    """A square layer, as ``dense`` takes it and as nn.Linear does: many rows, with and without backward, and one row.

    For one row the weights of a hundred layers come from memory in turn, as a model's do.
    """
    x, layer = torch.randn(1, TOKENS, width, requires_grad=True), torch.nn.Linear(width, width, bias=False)
    row, layers = torch.randn(1, 1, width), [torch.nn.Linear(width, width, bias=False) for _ in range(100)]
    calls = {"ours": dense, "linear": lambda layer, x: layer(x)}
    out = {}
    with torch.no_grad():
        out["rows"] = time_in_turn({name: lambda f=f: f(layer, x) for name, f in calls.items()}, repeats)
        out["one_row"] = time_in_turn(
            {n: lambda f=f: [f(one, row) for one in layers] for n, f in calls.items()}, repeats
        )
    out["rows_backward"] = time_in_turn(
        {n: lambda f=f: f(layer, x).sum().backward() for n, f in calls.items()}, repeats
    )
    for phase, times in out.items():
        times["times_as_fast"] = times["linear"]["median_s"] / times["ours"]["median_s"]
        print(f"dense {width:5d} wide {phase:17s} {times['times_as_fast']:5.2f} x", flush=True)
    return out


def law(length: int, repeats: int) -> dict:
    """The gated delta rule alone, forward and forward with backward: ours against the library's torch function."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    fallback = inspect.unwrap(torch_chunk_gated_delta_rule)
    q, k, v = (torch.randn(1, length, 4, 128, requires_grad=True) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1).detach().requires_grad_()
    g, beta = (-torch.rand(1, length, 4)).requires_grad_(), torch.rand(1, length, 4, requires_grad=True)
    functions = {
        "ours": lambda: chunk(q, k, v, g, beta)[0],
        "fallback": lambda: fallback(q, k, v, g, beta, output_final_state=True)[0],
    }
    out = {}
    with torch.no_grad():
        out["forward"] = time_in_turn(functions, repeats)
    out["forward_backward"] = time_in_turn({n: lambda f=f: f().sum().backward() for n, f in functions.items()}, repeats)
    for phase, times in out.items():
        times["times_as_fast"] = times["fallback"]["median_s"] / times["ours"]["median_s"]
        print(f"law {length:5d} tokens {phase:17s} {times['times_as_fast']:5.2f} x", flush=True)
    return out


_GROWTH = """
import re, torch
from benchmarks.cpu import growth_model, training_step
def kib(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads({threads})
model, ids = growth_model({mixer!r}), torch.randint(3, 100, (1, {length}))
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far, that of importing
before = kib("VmRSS")
training_step(model, ids)
print(kib("VmHWM") - before)
"""


def growth_model(mixer: str):
    torch.manual_seed(0)
    return HybridLinearForCausalLM(
        HybridLinearConfig(mixer=mixer, ratio="pure", hidden_size=256, num_hidden_layers=2, vocab_size=512)
    )


def growth(mixer: str, repeats: int) -> dict:
    """Training step at 4096 and 8192 tokens: time, and peak memory (of a fresh process each)."""
    model = growth_model(mixer)
    steps = {n: lambda n=n: training_step(model, torch.randint(3, 100, (1, n))) for n in (4096, 8192)}
    times = time_in_turn(steps, repeats)
    peaks = {}
    for length in (2048, 4096, 8192):
        code = _GROWTH.format(mixer=mixer, length=length, threads=torch.get_num_threads())
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks[length] = int(run.stdout.split()[-1]) / 1024
    ratio = times[8192]["median_s"] / times[4096]["median_s"]
    # Linear growth: what 4096 more tokens cost is twice what 2048 more cost.
    memory = (peaks[8192] - peaks[4096]) / (peaks[4096] - peaks[2048])
    print(f"{mixer:16s} 8192 / 4096 tokens: time {ratio:.2f} x, memory increments {memory:.2f} (linear: 2)", flush=True)
    return {"time_8192_over_4096": ratio, "times": times, "peak_mib": peaks, "memory_increment_ratio": memory}


def import_seconds(repeats: int = 5) -> list[float]:
    """Importing hybrid_models after what any script with a transformers model has imported, in fresh processes."""
    code = (
        "import time, torch, transformers; from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer\n"
        "start = time.perf_counter(); import hybrid_models; print(time.perf_counter() - start)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(repeats)
    ]
    seconds = sorted(float(run.stdout.split()[-1]) for run in runs)
    print(f"import hybrid_models after transformers: {seconds[len(seconds) // 2]:.2f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=["compare", "dense", "law", "growth", "import"], help="one part, not written to a file"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per figure (default 5)")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # the peer announces its fallback once per function
    torch.set_num_threads(2)
    start = time.time()
    parts = {
        "import": lambda: import_seconds(),
        "dense": lambda: {width: dense_layers(width, args.repeats) for width in SIZES},
        "law": lambda: {length: law(length, args.repeats) for length in (2048, 8192)},
        "compare": lambda: {hidden: compare(hidden, args.repeats) for hidden in SIZES},
        "growth": lambda: {mixer: growth(mixer, args.repeats) for mixer in MIXERS},
    }
    if args.only:
        print(parts[args.only]())
        return
    result = {name: part() for name, part in parts.items()}
    write_result("cpu", {"dtype": "float32", "tokens": TOKENS, **result, "seconds": round(time.time() - start)})


if __name__ == "__main__":
    main()
