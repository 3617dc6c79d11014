"""The invariance certificate: is every way of running a model the same function?

A hybrid model has a state to lose: in a cache, under padding, at the border of packed documents, when beams change places,
when drafted tokens are taken back. A model that loses it still writes fluent text, only worse, so it has to be measured.
This runs the nine properties of ``properties.py`` on a checkpoint, or on a cell of the suite with random weights, prints
what was compared and how far it was off, and exits with 1 if anything was:

    python -m evaluation.certify tiny-GatedDeltaNet-hybrid-3-1
    python -m evaluation.certify path/or/repo-id --dtype float32 --json certificate.json

In a program: ``certify(model).passed``. A tiny cell takes some seconds; a checkpoint of 340M parameters some minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from hybrid_models import HybridLinearForCausalLM
from hybrid_models.results import environment
from hybrid_models.suite import parse_cell

from .probe import Check, Probe, randomize
from .properties import PROPERTIES

# Of max |a - b| / max(1, std(b)). A wrong formula is off by far more, another order of summation by far less.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}


@dataclass
class Row:
    """A check and its verdict."""

    property: int
    check: str
    deviation: float | None
    tolerance: float
    status: str  # "pass", "fail" or "skip"
    note: str = ""

    def __str__(self) -> str:
        value = "" if self.deviation is None else f"{self.deviation:.1e} <= {self.tolerance:.0e}"
        return f"   {self.check:<60} {value:<18} {self.status.upper() if self.status == 'fail' else self.status}" + (
            f"  ({self.note})" if self.note else ""
        )


@dataclass
class Certificate:
    """What was checked on what, where, and the outcome."""

    target: str
    model: dict
    dtype: str
    device: str
    seed: int
    versions: dict = field(default_factory=dict)
    commit: str | None = None
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.rows) and not self.failures()

    def failures(self, property: int | None = None) -> list[Row]:
        """Rows that failed, of all properties or of one."""
        return [row for row in self.rows if row.status == "fail" and property in (None, row.property)]

    @property
    def failed_properties(self) -> set[int]:
        return {row.property for row in self.failures()}

    def summary(self) -> str:
        count = {status: sum(row.status == status for row in self.rows) for status in ("pass", "fail", "skip")}
        worst = max((row.deviation for row in self.rows if row.deviation is not None), default=0.0)
        return (
            f"{'PASS' if self.passed else 'FAIL'}: {count['pass']} checks passed, {count['fail']} failed, {count['skip']} "
            f"skipped; largest deviation {worst:.1e} in {self.dtype} on {self.device}; {self.seconds:.0f} s"
        )

    def __str__(self) -> str:
        lines, shown = [], None
        for row in self.rows:
            if row.property != shown:
                shown = row.property
                lines.append(heading(shown))
            lines.append(str(row))
        return "\n".join([*lines, "", self.summary()])

    def to_json(self) -> str:
        properties = {number: title for number, (title, _) in PROPERTIES.items()}
        return json.dumps({"passed": self.passed, **asdict(self), "properties": properties}, indent=1) + "\n"


def heading(number: int) -> str:
    return f"{number}. {PROPERTIES[number][0]}"


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> HybridLinearForCausalLM:
    """The cell called ``name``, every parameter random: at its initial value a norm or a bias would not show.

    Raises:
        ValueError: no cell is called so.
    """
    cell = parse_cell(name)
    return randomize(HybridLinearForCausalLM(cell.config()), seed + (cell.seed or 0)).to(dtype).eval()


def load(target: str, dtype: torch.dtype, seed: int = 0):
    """The model that a directory, a cell's name or a repo id means.

    Raises:
        ValueError: it is none of these, or its model is of another family.
    """
    if not Path(target).is_dir() and "/" not in target:
        try:
            return build(target, dtype, seed)
        except ValueError as error:
            raise ValueError(f"{target!r} is not a directory, and {error}") from error
    config = AutoConfig.from_pretrained(target)
    if config.model_type != HybridLinearForCausalLM.config_class.model_type:
        raise ValueError(
            f"{target} holds a {config.model_type!r} model, but only hybrid_linear ones can be certified: convert a checkpoint "
            "of fla with `hybrid-linear convert` first."
        )
    return AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval()


def certify(
    model,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    only: Iterable[int] | None = None,
    clean_process: bool = True,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Certificate:
    """Check the nine properties.

    Args:
        model: a HybridLinearForCausalLM in float64 or float32, which is left as it was, or what ``load`` takes.
        dtype, device: for a model that is loaded here. Default: float64, CPU.
        seed: of all random inputs, and of the weights of a fresh cell.
        only: numbers of the properties to check. Default: all nine.
        clean_process: load by remote code in a new interpreter too, which takes some seconds.
        on_row: called with every row as soon as it is known.

    Raises:
        ValueError: the model's dtype has no tolerance here, or see ``load``.
    """
    target = model if isinstance(model, str) else model.config.name_or_path or type(model).__name__
    if isinstance(model, str):
        model = load(model, dtype or torch.float64, seed).to(device or "cpu")
    elif dtype not in (None, model.dtype) or torch.device(device or model.device) != model.device:
        raise ValueError("dtype and device are for a model that is loaded here: pass one that is as you want it.")
    if model.dtype not in TOLERANCES:
        raise ValueError(f"The model is in {model.dtype}, but exactness can be told only in {' or '.join(DTYPES)}.")
    if model.dtype == torch.float64 and model.config._attn_implementation == "eager":
        raise ValueError("Eager attention computes its softmax in float32, so it is not exact in float64: use 'sdpa'.")

    start = time.perf_counter()
    certificate = Certificate(
        target, _describe(model), str(model.dtype).removeprefix("torch."), str(model.device), seed
    )
    found = environment()
    certificate.versions, certificate.commit = {"python": found["python"], **found["versions"]}, found["commit"]
    with _undisturbed(model, seed):
        for number in sorted(only or PROPERTIES):
            for check in _run(number, Probe(model, seed), clean_process):
                tolerance = 0.0 if check.exact else TOLERANCES[model.dtype]
                status = "skip" if check.deviation is None else "pass" if check.deviation <= tolerance else "fail"
                row = Row(number, check.name, check.deviation, tolerance, status, check.note)
                certificate.rows.append(row)
                on_row(row)
    certificate.seconds = time.perf_counter() - start
    return certificate


def _run(number: int, probe: Probe, clean_process: bool):
    """A property's checks; an exception is a failed one, and the property's last."""
    function = PROPERTIES[number][1]
    try:
        yield from function(probe, clean_process) if number == 7 else function(probe)
    except Exception as error:
        yield Check("(the check that follows raised)", float("inf"), f"{type(error).__name__}: {error}")


@contextmanager
def _undisturbed(model, seed: int):
    """Random state, mode and generation defaults as they were; inside, nothing ends a text or a draft early."""
    was_training, defaults = model.training, model.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.eval()
        model.generation_config = GenerationConfig(
            eos_token_id=None,
            pad_token_id=0,
            num_assistant_tokens=4,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        try:
            yield
        finally:
            model.train(was_training)
            model.generation_config = defaults


def _describe(model) -> dict:
    mixers = sorted({m for m, kind in zip(model.config.mixers, model.config.layer_types) if kind == "linear_attention"})
    return {
        "mixer": " and ".join(mixers) or None,
        "layers": model.config.layer_picture(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.certify",
        description="Check that every way of running a model is the same function (nine properties).",
        epilog="example: python -m evaluation.certify tiny-HGRN2-hybrid-3-1 --dtype float32 --json certificate.json",
    )
    parser.add_argument(
        "target", metavar="PATH_OR_NAME", help="a checkpoint's directory, a repo id, or a cell of the suite"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float64", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, help="of inputs and of a fresh cell's weights; default: %(default)s"
    )
    parser.add_argument(
        "--only", type=int, nargs="+", choices=PROPERTIES, metavar="N", help="check these properties only"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the certificate there")
    options = parser.parse_args(arguments)
    shown = set()

    def show(row: Row) -> None:
        if row.property not in shown:
            shown.add(row.property)
            print(heading(row.property))
        print(row, flush=True)

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        certificate = certify(
            options.target,
            dtype=DTYPES[options.dtype],
            device=options.device,
            seed=options.seed,
            only=options.only,
            on_row=show,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n" + certificate.summary())
    if options.json:
        options.json.write_text(certificate.to_json())
    return 0 if certificate.passed else 1


if __name__ == "__main__":
    sys.exit(main())
