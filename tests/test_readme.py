"""The README's commands come first, its examples run as they stand, and what it names exists."""

import json
import re
from pathlib import Path

import torch

from training import demo

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_it_begins_with_two_commands():
    assert re.search(r"^```\w*\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)[1] == "make demo\nmake test\n"


def test_files_and_modules_that_it_names_exist():
    paths = set(re.findall(r"`([\w./-]+\.(?:py|cfg|txt|toml))`", TEXT))
    assert paths and not [path for path in sorted(paths) if not (ROOT / path).exists()]
    modules = set(re.findall(r"python -m ([\w.]+)", TEXT))
    assert modules and not [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").exists()]


def test_examples_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demo.run("runs/demo", max_steps=1, max_bytes=100_000, max_new_tokens=1)
    ids = torch.arange(3, 35)
    names = {"dataset": [{"input_ids": ids, "labels": ids}] * 8}
    blocks = [block for block in code_blocks("python") if "from_fla" not in block]  # which downloads
    assert len(blocks) == 5
    for block in blocks:
        exec(block.replace("max_steps=100", "max_steps=1, use_cpu=True"), names)

    assert names["config"].layer_picture() == "LLLLLALLLLLA"
    assert "def main():" in capsys.readouterr().out
    assert (tmp_path / "runs/tuned/modeling_hybrid_linear.py").is_file()
    assert names["model"].active_adapter == "default"


def test_the_entry_to_other_checkpoints_is_exported():
    (block,) = [block for block in code_blocks("python") if "from_fla" in block]
    module, name = re.search(r"(hybrid_models[\w.]*)\.(from_fla)\(", block).groups()
    assert callable(getattr(__import__(module), name))


def test_decode_times_are_those_of_the_result_file():
    result = json.loads((ROOT / "benchmarks/results/decode.json").read_text())
    rows = re.findall(r"^\| `([\w.-]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE)
    assert [row[0] for row in rows] == list(result["cells"])
    for cell, *shown in rows:
        one, many = (result["cells"][cell]["batches"][batch] for batch in ("1", "32"))
        figures = (one["greedy"]["ms_per_step"], one["greedy"]["tb_s"], one["sampling"]["ms_per_step"])
        assert shown == [f"{figure:.2f}" for figure in (*figures, many["greedy"]["ms_per_step"])]


def test_the_sentences_on_speed_say_what_the_result_files_do():
    decode, context, cold = (
        json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        for name in ("decode", "context", "cold_start")
    )
    one, two = list(decode["cells"].values())[:2]
    fla, llama = ([cell[who]["1"]["ms_per_step"] for cell in (one, two)] for who in ("fla", "llama"))
    at = {
        (level, tokens): context["levels"][level][tokens]["decode_ms"]
        for level in ("6-1", "full")
        for tokens in ("32768", "131072")
    }
    at |= {("llama", tokens): context["peers"]["llama"][tokens]["decode_ms"] for tokens in ("32768", "131072")}
    waits = [sum(row[part] for part in ("import_s", "build_s", "first_s"))
             for phase in ("generation", "training") for row in cold[phase].values()]  # fmt: skip
    imports = next(iter(cold["generation"].values()))["import_s"]
    text = " ".join(TEXT.split())
    for said in (
        f"take {fla[0]:.0f} and {fla[1]:.0f} ms a token, and transformers' Llama of their sizes {llama[0]:.0f} and {llama[1]:.0f}.",
        f"With 32,768 tokens behind it a token of the 6-1 hybrid takes {at['6-1', '32768']:.2f} ms, one of our Transformer "
        f"{at['full', '32768']:.2f} and one of Llama {at['llama', '32768']:.1f}; with 131,072, {at['6-1', '131072']:.2f}, "
        f"{at['full', '131072']:.2f} and {at['llama', '131072']:.1f}.",
        f"comes after {waits[0]:.1f} s, {imports:.1f} of them imports",
        f"ends after {waits[1]:.0f} s with GatedDeltaNet and {waits[2]:.0f} s with GLA",
    ):
        assert said in text
    assert all(
        row["cache_bytes"] == row["formula_bytes"] for rows in context["levels"].values() for row in rows.values()
    )


def test_the_speed_on_a_cpu_is_that_of_the_result_file():
    sizes = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["compare"].values()

    def span(phase):
        ratios = [size[phase]["times_as_fast"] for size in sizes]
        return f"{min(ratios):.1f} to {max(ratios):.1f}"

    text = " ".join(TEXT.split())
    assert (
        f"a prompt of 2048 tokens is {span('prefill')} times as fast, a training step on it {span('training_step')} times, "
        f"a decoded token {span('decode_20_tokens')} times"
    ) in text


def test_training_speeds_are_those_of_the_result_file():
    result = json.loads((ROOT / "benchmarks/results/train_step.json").read_text())
    cells = r"^\| `([\w.-]+)` \| (\d+) \| (\d+) \| ([\d.]+) \| (\d+)% \| ([\d.]+) \| ([\d.]+) \|$"
    rows = re.findall(cells, TEXT, re.MULTILINE)
    assert [row[0] for row in rows] == [cell for cell, row in result["models"].items() if "ours" in row]
    for cell, *shown in rows:
        ours, fla = (result["models"][cell][who] for who in ("ours", "fla"))
        speeds = ours["tokens_per_s"], fla["tokens_per_s"]
        wanted = [f"{speed / 1e3:.0f}" for speed in speeds] + [
            f"{speeds[0] / speeds[1]:.2f}",
            f"{100 * ours['mfu']:.0f}",
        ]
        assert shown == [*wanted, f"{ours['peak_gib']:.1f}", f"{fla['peak_gib']:.1f}"]


def test_the_training_commands_speeds_are_those_of_the_result_file():
    models = json.loads((ROOT / "benchmarks/results/trainer.json").read_text())["models"]["340M-20B-GatedDeltaNet-pure"]
    text = " ".join(TEXT.split())
    ours, fla = (
        f"{row['tokens_per_s'] / 1e3:.0f} thousand{unit} and {row['peak_bytes'] / 2**30:.1f} GiB"
        for row, unit in ((models["ours"], " tokens/s"), (models["fla"], ""))
    )
    assert f"takes {ours}; fla's model, trained by the same code on the same batches, {fla}" in text


def test_the_fine_tuning_figures_are_those_of_the_result_files():
    after = {}
    for method in ("full", "lora", "s0"):
        metrics = json.loads((ROOT / f"benchmarks/results/finetune-{method}.json").read_text())["metrics"]
        loss = {metric["metric"]: metric["value"] for metric in metrics}
        after[method], before = f"{loss['loss_nats_after']:.2f}", f"{loss['loss_nats_before']:.2f}"
    wanted = f"from {before} nats a token to {after['full']} in full, {after['lora']} by LoRA, and {after['s0']} by initial states"
    assert wanted in " ".join(TEXT.split())
