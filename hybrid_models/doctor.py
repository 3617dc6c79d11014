"""`hybrid-linear doctor PATH`: is this checkpoint what it says it is, and is anything in it broken?

    hybrid-linear doctor runs/gdn
    hybrid-linear doctor m-a-p/340M-20B-GatedDeltaNet-pure-baseline --text wiki.txt --json
    hybrid-linear doctor runs/gdn --repair last-tap-conv --output runs/gdn-repaired

Native checkpoints and fla's. Exit status: 0 healthy, 1 warnings, 2 errors. Weights are read one tensor at a time; only
``--text`` builds the model. Nothing is repaired unless asked, the source is never touched, and a repair is recorded in the
copy's config.json and provenance.json.

What the conv taps are suspected of is told in ``conv_taps``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from .configuration_hybrid_linear import HybridLinearConfig
from .conv_taps import REPAIR, conv_names, losses, repair_last_tap_conv, taps_verdict
from .convert import SAMPLE_TEXT, TOKENIZER_FILES, ids_differ
from .fla_format import FLOAT32, Checkpoint, open_checkpoint

LEVELS = ("ok", "note", "warning", "error")


@dataclass
class Report:
    """What the doctor found: one row (level, subject, what) per check, and the numbers behind them."""

    source: str
    layout: str = ""
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    numbers: dict = field(default_factory=dict)

    def add(self, level: str, subject: str, what: str) -> None:
        self.rows.append((level, subject, what))

    @property
    def status(self) -> int:
        """0 healthy, 1 warnings, 2 errors."""
        return max(0, max((LEVELS.index(level) for level, _, _ in self.rows), default=0) - 1)

    def __str__(self) -> str:
        width = max(len(subject) for _, subject, _ in self.rows)
        lines = [f"{self.source} ({self.layout} checkpoint)" if self.layout else self.source]
        lines += [f"  {level:<8}{subject:<{width + 2}}{what}" for level, subject, what in self.rows]
        return "\n".join([*lines, ("healthy", "usable, with warnings", "broken")[self.status]])

    def to_json(self) -> str:
        rows = [dict(zip(("level", "check", "message"), row)) for row in self.rows]
        verdict = ("healthy", "warnings", "errors")[self.status]
        content = asdict(self) | {"rows": rows, "status": self.status, "verdict": verdict}
        return json.dumps(content, indent=2, ensure_ascii=False)


def doctor(path: str | os.PathLike, text: str | None = None, max_tokens: int = 8192, **download) -> Report:
    """Examine the checkpoint ``path``, native or fla's.

    Args:
        text: what to measure the loss on, with the whole convolution and with its last tap alone; loads the model.
        max_tokens: tokens of ``text`` that are used, in windows of 1024.
        download: revision, subfolder, token, cache_dir, local_files_only, force_download, proxies.

    Returns:
        the report. A checkpoint that cannot be read gives one with an error, not an exception.
    """
    report = Report(os.fspath(path))
    try:
        checkpoint = open_checkpoint(path, **download)
    except (ValueError, OSError) as error:
        report.add("error", "files", str(error))
        return report
    report.layout = checkpoint.layout
    for problem in checkpoint.problems:
        report.add("error", "tensors", problem)
    if not checkpoint.problems:
        report.add("ok", "tensors", f"{len(checkpoint.tensors)}, none missing, none unexpected, shapes as configured")
    if dropped := checkpoint.record.get("fla", {}).get("dropped"):
        report.add("note", "dropped", f"{len(dropped)} tensors of the file that nothing reads, such as {dropped[0]}")
    if checkpoint.record.get("repairs"):
        report.add("note", "repairs", ", ".join(map(str, checkpoint.record["repairs"])))

    _check_count(report, checkpoint)
    _check_values(report, checkpoint)
    _check_dtypes(report, checkpoint)
    _check_decay(report, checkpoint)
    _check_taps(report, checkpoint)
    tokenizer = _check_tokenizer(report, checkpoint)
    if text is not None:
        _check_loss(report, checkpoint, tokenizer, text, max_tokens)
    return report


# ------------------------------------------------------------------------------------------------------------- weights


def parameter_count(config: HybridLinearConfig) -> int:
    """Parameters of a model in closed form, from the sizes alone; a second opinion on what the code builds."""
    d, L = config.hidden_size, config.num_hidden_layers
    total = config.vocab_size * d * (1 if config.tie_word_embeddings else 2) + d
    total += L * (2 * d + 3 * d * config.intermediate_size)
    bounds = 0
    for i, kind in enumerate(config.layer_types):
        if kind == "full_attention":
            layer = config.per_layer_config[i]
            query, shared = layer.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
            total += 2 * d * (query + shared) + (query + 2 * shared if layer.attention_bias else 0)
            continue
        q, k, v, K, V = config.linear_dims(i)
        qk, values, out, mixer = (q + k) * K, v * V, max(q, v) * V, config.mixers[i]
        conv = config.linear_conv_kernel_dim if config.uses_short_conv(i) else 0
        gate = d * out if config.uses_output_gate(i) else 0
        if mixer in ("hgrn", "hgrn2") and i > 0 and config.linear_use_lower_bound:
            bounds = L * (V if mixer == "hgrn" else k * K)
        total += {
            "hgrn": lambda: 4 * d * V + V + conv * 2 * V,
            "hgrn2": lambda: d * (qk + 2 * values) + values + conv * (qk + values),
            "retnet": lambda: d * (qk + values + out) + gate + V,
            "gla": lambda: d * (qk + values + out) + gate + V + 16 * d + 17 * k * K + conv * (qk + values),
            "delta_net": lambda: d * (qk + 2 * values) + gate + v * d + V + conv * (qk + values),
            "gated_delta_net": lambda: d * (qk + 2 * values) + gate + 2 * v * (d + 1) + V + conv * (qk + values),
        }[mixer]()
    return total + bounds


def _check_count(report: Report, checkpoint: Checkpoint) -> None:
    count, formula = sum(t.numel() for t in checkpoint.tensors.values()), parameter_count(checkpoint.config)
    report.numbers |= {"parameters": count, "parameters_by_formula": formula}
    if count == formula:
        report.add("ok", "parameters", f"{count:,}, as the closed form has it")
    else:
        report.add(
            "error", "parameters", f"{count:,} in the file, {formula:,} by the closed form ({count - formula:+,})"
        )


def _check_values(report: Report, checkpoint: Checkpoint) -> None:
    dead, broken = [], []
    for name, tensor in checkpoint.tensors.items():
        value = tensor[...]
        bad = value.numel() - int(value.isfinite().sum())
        if bad:
            broken.append(f"{name} ({bad} of {value.numel()})")
        elif not value.any() and not name.endswith((*FLOAT32, ".bias")):
            dead.append(name)
    report.numbers |= {"nan_or_inf": broken, "all_zero": dead}
    if broken:
        report.add("error", "NaN or Inf", f"in {len(broken)} tensors: {', '.join(broken[:4])}")
    if dead:
        report.add("warning", "dead", f"{len(dead)} tensors are zero throughout: {', '.join(dead[:4])}")
    if not broken and not dead:
        report.add("ok", "values", "all finite, no tensor is zero throughout")
    tied = checkpoint.config.tie_word_embeddings
    report.add("ok", "embeddings", "tied: one matrix in the file" if tied else "not tied: two matrices in the file")


def _check_dtypes(report: Report, checkpoint: Checkpoint) -> None:
    stored = {str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values()}
    rounded = dict(checkpoint.record.get("fla", {}).get("dtypes", {}))
    if checkpoint.layout == "native":
        rounded = {
            n: str(t.dtype) for n, t in checkpoint.tensors.items() if n.endswith(FLOAT32) and t.dtype.itemsize < 4
        }
    report.add("ok", "dtypes", ", ".join(sorted(stored)))
    if rounded:
        what = "were rounded to 16 bits when saved; they are used in float32, with what precision is left"
        report.add("warning", "decay dtypes", f"{len(rounded)} tensors, such as {next(iter(rounded))}, {what}")


def _check_decay(report: Report, checkpoint: Checkpoint) -> None:
    """Half-lives in tokens: per head; per channel for GLA; the shortest that the bound allows for HGRN and HGRN2."""
    half_lives = {}
    for i, kind in enumerate(checkpoint.config.layer_types):
        rate = _decay_rate(checkpoint, i) if kind == "linear_attention" else None
        if rate is not None:
            half_lives[i] = (math.log(2) / rate.double()).clamp(max=1e9)
    if not half_lives:
        return
    report.numbers["half_lives"] = {
        i: [round(x, 4) for x in h.tolist()] for i, h in half_lives.items() if h.numel() < 512
    }
    every = torch.cat(list(half_lives.values()))
    if every.isnan().any():
        report.add("error", "half-lives", "NaN: the decay parameters are broken")
        return
    lowest, middle, highest = (float(every.quantile(p)) for p in (0.0, 0.5, 1.0))
    mixer, level = checkpoint.config._mixers_in_use()[0], "ok"
    what = {"gla": "per channel, without input", "hgrn": "shortest that the bound allows", "retnet": "fixed"}
    what = what.get(mixer.removesuffix("2"), "per head, without input")
    shown = f"{lowest:.3g} to {highest:.3g} tokens, median {middle:.3g} ({what})"
    untouched = [i for i in half_lives if _is_untouched(checkpoint, i)]
    if untouched:
        level = "warning"
        shown += (
            f"; A_log and dt_bias are zero in {len(untouched)} layers, as a faulty initialisation left them in 2025"
        )
    elif mixer == "gated_delta_net" and highest < 1:
        level = "warning"
        shown += "; no head remembers the token before"
    report.add(level, "half-lives", shown)
    if mixer == "gated_delta_net":
        for i, heads in half_lives.items():
            report.add("ok", f"  layer {i}", " ".join(f"{x:.3g}" for x in heads.tolist()))
    if mixer in ("hgrn", "hgrn2"):
        bounds = checkpoint.tensors.get("model.lower_bounds")
        flat = bounds is not None and not bounds[...].any()
        stuck = float(sum((h > 1e5).sum() for h in half_lives.values()) / every.numel())
        report.numbers["bounds_stuck"] = stuck
        if flat:
            report.add("warning", "lower bounds", "zero throughout: as initialised, never trained")
        else:
            text = f"{stuck:.1%} of the channels may never forget (bound above 0.99999)"
            report.add("warning" if stuck > 0.1 else "ok", "lower bounds", text)


def _decay_rate(checkpoint: Checkpoint, i: int) -> torch.Tensor | None:
    """-log of the decay per token in layer ``i``, at no input: [heads], or [channels]; None where nothing decays."""
    config, prefix = checkpoint.config, f"model.layers.{i}.linear_attn."
    tensors, mixer = checkpoint.tensors, config.mixers[i]
    if mixer == "retnet":
        return -torch.log1p(-torch.exp2(-5.0 - torch.arange(config.linear_dims(i).num_heads, dtype=torch.float64)))
    if mixer == "gated_delta_net" and {prefix + "A_log", prefix + "dt_bias"} <= tensors.keys():
        return tensors[prefix + "A_log"][...].double().exp() * F.softplus(tensors[prefix + "dt_bias"][...].double())
    if mixer == "gla" and prefix + "gk_proj.1.bias" in tensors:
        return -F.logsigmoid(tensors[prefix + "gk_proj.1.bias"][...].double()) / 16
    if mixer in ("hgrn", "hgrn2") and i > 0 and "model.lower_bounds" in tensors:
        share = tensors["model.lower_bounds"][...].double().softmax(0)
        return -share[1 : i + 1].sum(0).log()
    return None


def _is_untouched(checkpoint: Checkpoint, i: int) -> bool:
    names = [f"model.layers.{i}.linear_attn.{name}" for name in ("A_log", "dt_bias")]
    return all(name in checkpoint.tensors and not checkpoint.tensors[name][...].any() for name in names)


def _check_taps(report: Report, checkpoint: Checkpoint) -> None:
    names = conv_names(checkpoint)
    if not names:
        return
    taps = torch.cat([checkpoint.tensors[name][...].double()[:, 0] for name in names])  # [channels of all layers, W]
    rms = taps.square().mean(0).sqrt()
    layers = [checkpoint.tensors[name][...].double().square().mean((0, 1)).sqrt().tolist() for name in names]
    report.numbers["conv_rms"] = {"all": rms.tolist(), **dict(zip(names, layers))}
    verdict, level = taps_verdict(taps), "ok"
    ratio = float(rms[:-1].square().mean().sqrt() / rms[-1])
    report.numbers |= {"conv_verdict": verdict, "conv_ratio": ratio}
    shown = f"rms per tap {', '.join(f'{x:.3g}' for x in rms)}: "
    if verdict == "last tap only":
        recorded = any(REPAIR in str(repair) for repair in checkpoint.record.get("repairs", ()))
        level = "ok" if recorded else "warning"
        shown += "all but the last are zero, " + ("as repaired" if recorded else "and no repair is recorded")
    elif verdict == "untrained":
        level = "warning"
        shown += (
            f"all but the last look untrained (alike, unrelated, {ratio:.2f} of the last). Measure the loss both ways with "
            f"--text FILE; if the last tap alone is better, make a copy with --repair {REPAIR}"
        )
    else:
        shown += "trained"
    report.add(level, "conv taps", shown)


def _check_loss(report: Report, checkpoint: Checkpoint, tokenizer, text: str, max_tokens: int) -> None:
    ids = None if tokenizer is None else tokenizer(text, return_tensors="pt").input_ids[0, :max_tokens]
    if checkpoint.problems or ids is None or len(ids) < 2:
        report.add("warning", "loss", "not measured: it needs an intact checkpoint, a tokenizer and two tokens of text")
        return
    loss = report.numbers["loss"] = losses(checkpoint.load(), ids)
    whole, alone = loss["whole"], loss.get("last_tap_only")
    better_than_chance = whole < math.log(checkpoint.config.vocab_size)
    shown = f"{whole:.4f} (perplexity {math.exp(min(whole, 700)):.4g}) on {len(ids)} tokens"
    report.add(
        "ok" if better_than_chance else "warning", "loss", shown + ("" if better_than_chance else ": worse than chance")
    )
    if alone is not None:
        better = alone < whole - 0.01
        confirmed = better and report.numbers["conv_verdict"] == "untrained"
        shown = f"{alone:.4f} with the last tap only, {whole:.4f} with the whole convolution"
        shown += f": the other taps are noise, make a copy with --repair {REPAIR}" if confirmed else ""
        report.add("error" if confirmed else "warning" if better else "ok", "loss by taps", shown)


# ----------------------------------------------------------------------------------------------------------- tokenizer


def _check_tokenizer(report: Report, checkpoint: Checkpoint):
    config = checkpoint.config
    found = checkpoint.files.get(*TOKENIZER_FILES)
    if not found:
        report.add("note", "tokenizer", "none in the checkpoint")
        return None
    folder = next(iter(found.values())).parent
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=copy.deepcopy(config))
    except Exception as error:  # whatever the tokenizer's library raises
        report.add("error", "tokenizer", f"does not load: {error}")
        return None
    size, trouble = len(tokenizer), []
    if size > config.vocab_size:
        report.add(
            "error", "tokenizer", f"has {size} tokens, the model only {config.vocab_size}: it belongs to another"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ours, theirs = getattr(config, name), getattr(tokenizer, name)
        if ours != theirs and None not in (ours, theirs) and not (isinstance(ours, list) and theirs in ours):
            trouble.append(f"{name} is {theirs}, but {ours} in config.json")
    if tokenizer.pad_token is None:
        trouble.append("no pad token, which batches need: hybrid-linear convert sets one")
    back = tokenizer.decode(
        tokenizer(SAMPLE_TEXT, add_special_tokens=False).input_ids, clean_up_tokenization_spaces=False
    )
    if back != SAMPLE_TEXT:
        trouble.append(f"a sample text comes back changed: {back!r}")
    if ids_differ(tokenizer, folder / "tokenizer.json"):
        trouble.append(
            "AutoTokenizer gives other ids than tokenizer.json, its class rebuilds it: convert corrects that"
        )
    for what in trouble:
        report.add("warning", "tokenizer", what)
    if size <= config.vocab_size and not trouble:
        report.add(
            "ok", "tokenizer", f"{size} tokens of {config.vocab_size}, pad {tokenizer.pad_token!r}, text round trip"
        )
    return tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="checkpoint folder or Hub repository, fla's or native")
    parser.add_argument("--json", action="store_true", help="the report as JSON, with all numbers")
    parser.add_argument(
        "--text", metavar="FILE", help="measure the loss on this text, with the whole conv and the last tap"
    )
    parser.add_argument("--max-tokens", type=int, default=8192, help="of the text (default: 8192)")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--repair", choices=(REPAIR,), help="write a copy in which only the last conv tap is not zero")
    parser.add_argument("--output", metavar="DIR", help="where to write it (default: PATH-last-tap-conv)")


def run(args: argparse.Namespace) -> int:
    if args.repair:
        output = args.output or f"{Path(args.path).name}-{REPAIR}"
        if args.output is None and Path(args.path).is_dir():
            output = Path(args.path).resolve().with_name(output)
        written = repair_last_tap_conv(args.path, output, revision=args.revision)
        print(
            f"{written}: the repaired copy; {args.path} is as it was. Now compare the loss: doctor {written} --text FILE"
        )
        return 0
    text = None if args.text is None else Path(args.text).read_text(encoding="utf-8")
    report = doctor(args.path, text, args.max_tokens, revision=args.revision)
    print(report.to_json() if args.json else report)
    return report.status


__all__ = ["Report", "add_arguments", "doctor", "parameter_count", "repair_last_tap_conv", "run", "taps_verdict"]
