"""The library's main path in two minutes on two cores: train a nano hybrid, save it, load it, generate from it.

    python -m training.demo                                    # or: make demo
    python -m training.demo --max-steps 20 --output-dir runs/quick

Nothing is downloaded: the text is the source of this Python's standard library, the tokenizer is trained on it, and the
model learns from it through transformers' Trainer. What follows goes through the Auto classes and a pipeline, as it would
with any checkpoint; the output directory is a complete one. At the end the cache of a real forward is measured and set
beside the formulas of the configuration and beside a Transformer of the same size: that difference is what hybrids are
for. To try another architecture, change ``nano_config``.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from shutil import which

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from hybrid_models import HybridLinearConfig, HybridLinearForCausalLM
from hybrid_models.info import CacheBytes, cache_bytes, expected_cache_bytes, human_bytes, transformer_of_same_size

from .corpus import train_tokenizer

VOCAB_SIZE = 2048
BLOCK = 128  # tokens of one training sequence; short ones, so that a minute holds hundreds of steps
HELD_OUT = 20  # one file in so many is held out
CONTEXTS = (2048, 32768)
PROMPT = 'def read(self, path):\n    """'
# Not prose, not code that one would want imitated, or generated tables.
SKIPPED_FOLDERS = {"__pycache__", "encodings", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}


@dataclass(frozen=True)
class DemoResult:
    """What the demo found."""

    output_dir: Path
    steps: int
    loss_before: float  # nats per token on the held-out files
    loss_after: float
    text: str  # prompt and continuation
    tokens_per_second: float  # of generation, batch 1
    measured: CacheBytes  # one sequence of CONTEXTS[0] tokens
    expected: CacheBytes  # the same, from the configuration


def stdlib_files(max_bytes: int) -> list[str]:
    """Source files of this Python's standard library, at most ``max_bytes`` of them, in an order that mixes topics.

    Raises:
        FileNotFoundError: the standard library is not there as files (a frozen or zipped Python).
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in sorted(root.rglob("*.py")) if not SKIPPED_FOLDERS & set(p.relative_to(root).parts)]
    if not paths:
        raise FileNotFoundError(
            f"{root} holds no .py files to train on: use a Python that ships its library as source."
        )
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    texts, total = [], 0
    for path in (paths[i] for i in order):
        text = path.read_text(encoding="utf-8", errors="ignore")
        total += len(text)
        if total > max_bytes:
            break
        texts.append(text)
    return texts


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, torch.Tensor]]:
    """The texts one after the other, each between <s> and </s>, cut into sequences of BLOCK tokens."""
    ids = [torch.tensor(row + [tokenizer.eos_token_id]) for row in tokenizer(texts)["input_ids"]]
    stream = torch.cat(ids)
    rows = stream[: len(stream) // BLOCK * BLOCK].view(-1, BLOCK)
    return [{"input_ids": row, "labels": row} for row in rows]


def nano_config(tokenizer: PreTrainedTokenizerFast) -> HybridLinearConfig:
    """Six layers, of which the third and the sixth attend."""
    return HybridLinearConfig(
        mixer="gated_delta_net",
        ratio="3-1",
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=6,
        linear_num_key_heads=2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


class LossOnBar(ProgressCallback):
    """The Trainer's progress bar with the loss on it, instead of a line per log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.2f}")


class StopInTime(TrainerCallback):
    """Ends training after ``seconds``, so that a slow machine sees the rest of the demo too."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.deadline = time.monotonic() + self.seconds

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.monotonic() > self.deadline


def train(
    output_dir: Path, max_steps: int, max_seconds: float, max_bytes: int, seed: int
) -> tuple[int, float, float, HybridLinearConfig]:
    """Train tokenizer and model and save both; returns the steps, the held-out loss before and after, and the config."""
    set_seed(seed)
    texts = stdlib_files(max_bytes)
    held_out, texts = texts[::HELD_OUT], [text for i, text in enumerate(texts) if i % HELD_OUT]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    held_out_blocks = blocks(held_out, tokenizer)
    model = HybridLinearForCausalLM(nano_config(tokenizer))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output_dir),
            max_steps=max_steps,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=16,
            learning_rate=4e-3,
            warmup_steps=min(20, max_steps // 4),
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=10,
            save_strategy="no",  # saved once, at the end
            report_to="none",
            use_cpu=True,  # the sizes above are meant for one
            dataloader_pin_memory=False,
            seed=seed,
        ),
        train_dataset=blocks(texts, tokenizer),
        eval_dataset=held_out_blocks[:: max(1, len(held_out_blocks) // 128)],
        processing_class=tokenizer,
        callbacks=[StopInTime(max_seconds)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossOnBar)
    tokens = BLOCK * len(trainer.train_dataset)
    print(
        f"text:  {len(texts)} files of Python's standard library, {tokens / 1e6:.1f} M tokens of {len(tokenizer)} kinds"
    )
    print(
        f"model: {model.config.layer_picture()} (L {model.config.mixer}, A attention), {model.num_parameters():,} parameters"
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    return trainer.state.global_step, before, after, model.config


def generate(output_dir: Path, prompt: str, max_new_tokens: int, seed: int) -> tuple[str, float, CacheBytes]:
    """Load a checkpoint as anyone would; returns text, tokens per second, and the cache of CONTEXTS[0] tokens."""
    model = AutoModelForCausalLM.from_pretrained(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    set_seed(seed)
    start = time.perf_counter()
    text = writer(
        prompt, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, do_sample=True, temperature=0.6
    )[0]["generated_text"]
    tokens_per_second = max_new_tokens / (time.perf_counter() - start)

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(3, len(tokenizer), (1, CONTEXTS[0])), past_key_values=cache, logits_to_keep=1)
    return text, tokens_per_second, cache_bytes(cache)


def cache_table(config: HybridLinearConfig) -> str:
    """Cache of one sequence in float32 at every length in CONTEXTS, beside a Transformer's."""
    lines = [f"{'tokens':>8}  {'KV cache':>10}  {'state':>10}  {'Transformer':>11}"]
    for tokens in CONTEXTS:
        own = expected_cache_bytes(config, tokens)
        other = expected_cache_bytes(transformer_of_same_size(config), tokens)
        sizes = human_bytes(own.kv), human_bytes(own.state), human_bytes(other.total)
        lines.append(f"{tokens:>8,}  {sizes[0]:>10}  {sizes[1]:>10}  {sizes[2]:>11}")
    return "\n".join(lines)


def command() -> str:
    """How to call hybrid-linear from here: an environment that is not activated has it beside its Python."""
    return (
        "hybrid-linear" if which("hybrid-linear") else os.path.relpath(Path(sys.executable).with_name("hybrid-linear"))
    )


def run(
    output_dir: str | Path = "runs/demo",
    *,
    max_steps: int = 700,
    max_seconds: float = 80.0,
    max_bytes: int = 6_000_000,
    prompt: str = PROMPT,
    max_new_tokens: int = 120,
    seed: int = 0,
) -> DemoResult:
    """Train, save, load, generate and measure, printing on the way.

    Args:
        output_dir: becomes a checkpoint directory, model, tokenizer and modelling code.
        max_steps: optimiser steps of 4 sequences of 128 tokens.
        max_seconds: training ends then, whatever the steps.
        max_bytes: text to read.
    """
    output_dir = Path(output_dir)
    start = time.perf_counter()
    steps, before, after, config = train(output_dir, max_steps, max_seconds, max_bytes, seed)
    took = f"{steps} steps" if steps == max_steps else f"{steps} of {max_steps} steps (time is up)"
    print(f"\ntrained for {took}; held-out loss {before:.2f} -> {after:.2f} nats per token; saved in {output_dir}")

    text, tokens_per_second, measured = generate(output_dir, prompt, max_new_tokens, seed)
    print(
        f"\n--- {max_new_tokens} tokens from pipeline('text-generation'), {tokens_per_second:.0f} tokens/s ---\n{text}\n---"
    )
    expected = expected_cache_bytes(config, CONTEXTS[0])
    print("\nmemory of one sequence beside a Transformer of the same width and depth (float32)")
    print(cache_table(config))
    print(
        f"measured at {CONTEXTS[0]:,} tokens: {measured.kv:,} + {measured.state:,} bytes "
        f"(formula: {expected.kv:,} + {expected.state:,})"
    )
    print(f"\n{time.perf_counter() - start:.0f} s in all. Next: {command()} info {output_dir}")
    return DemoResult(output_dir, steps, before, after, text, tokens_per_second, measured, expected)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m training.demo",
        description="Train a nano hybrid on Python's standard library, save it, load it, generate from it.",
        epilog="example:\n  python -m training.demo --max-steps 20 --output-dir runs/quick",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output-dir", default="runs/demo", help="checkpoint directory (default runs/demo)")
    parser.add_argument("--max-steps", type=int, default=700, help="optimiser steps (default 700)")
    parser.add_argument("--max-seconds", type=float, default=80.0, help="training ends then at the latest (default 80)")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=120, help="(default 120)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    args = parser.parse_args(argv)
    disable_progress_bar()  # of loading and saving, which take no time here; the Trainer's stays
    run(**vars(args))


if __name__ == "__main__":
    main()
