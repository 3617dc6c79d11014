"""The command `hybrid-linear`: one row of ``COMMANDS`` per subcommand, each a thin front to a library function.

    hybrid-linear info                         this environment: versions, devices, back ends
    hybrid-linear info PATH                    a checkpoint: layers, parameters, cache beside a Transformer's
    hybrid-linear generate PATH --prompt "Once upon a time"

``convert`` and ``doctor`` tell of themselves in the modules of these names. To add a command, write
``add_arguments(parser)`` and ``run(args) -> exit status`` and put them in the table. An error that the user can
mend is one line on stderr; --traceback shows where it came from.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, TextStreamer, set_seed

from .configuration_hybrid_linear import HybridLinearConfig
from .convert import add_arguments as add_convert_arguments
from .convert import run as run_convert
from .doctor import add_arguments as add_doctor_arguments
from .doctor import run as run_doctor
from .info import describe, environment, human_bytes
from .kernels import describe as describe_backends
from .modeling_hybrid_linear import HybridLinearForCausalLM

# What bad input raises, here and in the libraries below; anything else is a defect and keeps its traceback.
USER_ERRORS = (OSError, ValueError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)


class Command(NamedTuple):
    """A subcommand; ``example`` is shown by its --help."""

    name: str
    help: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]  # returns the exit status


# ------------------------------------------------------------------------------------------------------------------ info


def add_info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", help="checkpoint directory or repo id; without it, the environment is shown")


def run_info(args: argparse.Namespace) -> int:
    print(format_environment() if args.path is None else format_model(args.path))
    return 0


def format_environment() -> str:
    """Versions, devices and which back ends can serve here, and why."""
    rows = environment()
    rows += [
        (f"back end {row.name}", f"{'yes' if row.available else 'no'}: {row.reason}") for row in describe_backends()
    ]
    return _align(rows)


def format_model(path: str) -> str:
    """Layers, parameters and cache sizes of the checkpoint at ``path``; reads config.json only."""
    facts = describe(load_config(path))
    layers = f"{facts.linear_layers} linear, {facts.full_layers} full attention"
    if facts.linear_layers and facts.full_layers:
        layers += f" (linear:full = {facts.linear_to_full})"
    rows = [
        ("model", path),
        ("mixer", ", ".join(facts.mixers) or "none (a Transformer)"),
        ("layers", facts.layer_picture),
        ("", layers),
        ("parameters", f"{facts.parameters:,}"),
        ("dtype", facts.dtype),
        ("KV cache", f"{facts.kv_bytes_per_token:,} bytes per token"),
        ("state", f"{facts.state_bytes:,} bytes per sequence, whatever its length"),
    ]
    table = [("context", "this model", "KV", "state", "Transformer *", "less")]
    for tokens, cache in facts.cache.items():
        transformer = facts.transformer_cache[tokens].total
        sizes = (human_bytes(size) for size in (cache.total, *cache, transformer))
        table.append((f"{tokens:,}", *sizes, f"{transformer / cache.total:.1f}x"))
    return "\n\n".join(
        (
            _align(rows),
            "Cache of one sequence\n" + _columns(table),
            "* the same width and depth with full attention at every layer",
        )
    )


def load_config(path: str) -> HybridLinearConfig:
    """The HybridLinearConfig at a path or repo id.

    Raises:
        ValueError: the checkpoint is another family's. OSError: there is none.
    """
    _check_exists(path)
    try:
        fields, _ = HybridLinearConfig.get_config_dict(path)
    except OSError as error:
        if Path(path).exists():
            raise
        raise OSError(f"{path} is no directory here, and as a repo id it did not load: {error}") from error
    model_type = fields.get("model_type")
    if model_type != HybridLinearConfig.model_type:
        raise ValueError(f"{path} has model_type={model_type!r}; this command reads {HybridLinearConfig.model_type!r}.")
    return HybridLinearConfig.from_pretrained(path)


def _check_exists(path: str) -> None:
    """Say so where ``path`` can only be a local path and nothing is there; the Hub's answer would mislead."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or os.path.exists(path)
    if not looks_local:
        return
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist. Give a checkpoint directory, or a repo id such as org/name.")
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json. Give the directory that save_pretrained wrote.")


def _align(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _columns(table: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in table)


# -------------------------------------------------------------------------------------------------------------- generate


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="checkpoint directory or repo id, with its tokenizer")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument(
        "--max-new-tokens", type=_positive_int, default=100, metavar="N", help="at most N (default 100)"
    )
    parser.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="sample at T; 0, the default, is greedy"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument("--device", help="such as cpu or cuda:0; default: cuda where there is one")


def run_generate(args: argparse.Namespace) -> int:
    tokens, seconds = stream(
        args.path, args.prompt, args.max_new_tokens, args.temperature, seed=args.seed, device=args.device
    )
    print(f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s, prompt included)", file=sys.stderr)
    return 0


def stream(
    path: str,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    *,
    seed: int = 0,
    device: str | None = None,
) -> tuple[int, float]:
    """Print ``prompt`` and its continuation as it is generated; returns the number of new tokens and the seconds.

    Raises:
        OSError: no checkpoint or no tokenizer at ``path``. ValueError: an empty prompt, or not a hybrid_linear model.
    """
    load_config(path)  # for its messages: an unknown model_type would otherwise only be a warning
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = HybridLinearForCausalLM.from_pretrained(path, dtype="auto").to(device)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    prompt_tokens = inputs["input_ids"].shape[1]
    if not prompt_tokens:
        raise ValueError(
            "--prompt is empty, and this tokenizer adds no token to start from: give at least one character."
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    set_seed(seed)
    start = time.perf_counter()
    output = model.generate(
        **inputs,
        **sampling,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )
    return output.shape[1] - prompt_tokens, time.perf_counter() - start


def _positive_int(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _temperature(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not a temperature: use 0 or a positive number")
    return value


# ------------------------------------------------------------------------------------------------------------------ main

COMMANDS = (
    Command(
        "info",
        "what this environment can run, or what a checkpoint is and costs",
        "hybrid-linear info runs/demo",
        add_info_arguments,
        run_info,
    ),
    Command(
        "generate",
        "continue a prompt, token by token",
        'hybrid-linear generate runs/demo --prompt "def main():" --max-new-tokens 60 --temperature 0.7',
        add_generate_arguments,
        run_generate,
    ),
    Command(
        "convert",
        "write a checkpoint in the other layout: flash-linear-attention's to this library's, or back",
        "hybrid-linear convert m-a-p/340M-20B-GatedDeltaNet-pure-baseline runs/gdn",
        add_convert_arguments,
        run_convert,
    ),
    Command(
        "doctor",
        "tell whether a checkpoint is what it says it is, and what is broken in it",
        "hybrid-linear doctor runs/gdn --text notes.txt",
        add_doctor_arguments,
        run_doctor,
    ),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hybrid-linear", description="Hybrid linear-attention language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.add_argument("--traceback", action="store_true", help="on an error, show where it was raised")
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status: the command's own, or 1 after an error that is told on stderr."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `hybrid-linear info | head`
        sys.stderr.close()
        return 0
    except USER_ERRORS as error:
        if args.traceback:
            raise
        print(f"hybrid-linear {args.command}: error: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
