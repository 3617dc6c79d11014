"""Cards: they render from records, keep the Hub's rules, say what is missing, run as printed, and cannot be edited unseen."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hybrid_models import HybridLinearForCausalLM
from hybrid_models.results import FOLDER, metric, result, write
from hybrid_models.suite import cell_config
from upload import card
from upload.card import BEGIN, END, differences, files, main, outputs
from upload.metadata import LINKS, front_matter, problems
from upload.plot import memory_svg
from upload.suite import RECIPES, SUITE

ROOT = Path(__file__).resolve().parent.parent
TRAINED = "nano-7M-GLA-hybrid-3-1"
CELLS = (
    TRAINED,
    "nano-7M-GLA-pure",
    "nano-7M-Transformer-seed1",
    "340M-20B-GatedDeltaNet-pure",
    "1.3B-100B-HGRN-hybrid-6-1",
)
WEIGHTS = "c" * 64


@pytest.fixture
def root(tmp_path):
    """A checkout with five cells, of which one is trained and evaluated, and everything generated."""
    cards = tmp_path / "model_cards"
    cards.mkdir()
    for name in ("template.md.j2", "memory.svg.j2"):
        shutil.copy(ROOT / "model_cards" / name, cards)
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    (tmp_path / "README.md").write_text(f"# readme\n\n{BEGIN}\n{END}\n\nmore\n")
    lines = (ROOT / RECIPES).read_text().splitlines()
    (tmp_path / RECIPES).write_text("".join(line + "\n" for line in lines if json.loads(line)["cell"] in CELLS))
    plant(tmp_path)
    assert main(["--root", str(tmp_path)]) == 0
    return tmp_path


def plant(root):
    def one(evaluation, metrics, **fields):
        return result(evaluation, TRAINED, f"python -m evaluation.{evaluation}", metrics, weights=WEIGHTS, **fields)

    held_out = metric("held-out", "loss_nats", 2.3456, n=256, stderr=0.01, tokens=262144)
    write(
        one("training", [held_out, metric("training", "tokens_per_s", 654321.0)], seeds=[42], seconds=41.0),
        root / FOLDER,
    )
    ruler = [
        metric(task, name, 0.25 * (length == 512), n=100, ci95=(0.0, 0.5), length=length)
        for length in (512, 1024)
        for task in ("niah_single_1", "niah_multikey_2", "mean")
        for name in ("official", "strict", "shortcut", "gold_nats")
    ]
    write(one("ruler", ruler), root / FOLDER)
    cost = [
        metric("cache", "total_bytes", 1000 * length, closed_form=1000 * length, length=length)
        for length in (512, 1024)
    ]
    cost += [
        metric("decode", "ms_per_token", 15.25, n=30, quartiles=[15.0, 16.5], length=length) for length in (512, 1024)
    ]
    write(one("cost", cost), root / FOLDER)


def text_of(root, cell):
    return (root / card.CARDS / f"{cell}.md").read_text()


def test_committed_cards_are_what_the_command_writes_and_keep_the_rules():
    texts = outputs(ROOT)
    assert differences(texts, ROOT) == []
    cards = {path: text for path, text in texts.items() if path.parent == card.CARDS and path.suffix == ".md"}
    assert len(cards) == 144
    there = {str(path.relative_to(card.CARDS)) for path in texts if card.CARDS in path.parents}
    records = [json.loads(line) for line in texts[SUITE].splitlines()]
    for record in records:
        text = cards[card.CARDS / f"{record['cell']}.md"]
        there_too = {
            f"../results/{Path(one['file']).parent.name}/{Path(one['file']).name}" for one in record["results"]
        }
        assert problems(text, arxiv=card.arxiv_ids(record), files=there | there_too) == []
        assert "not evaluated" in text.lower() or len(record["results"]) > 6
        assert len(record["cell"]) <= 96 and "--" not in record["cell"] and ".." not in record["cell"]


# One character of a config, a result, a template, a card, a picture, a record and the README.
@pytest.mark.parametrize(
    "path, old, new",
    [
        (RECIPES, '"rope_theta": 10000.0', '"rope_theta": 10001.0'),
        (
            RECIPES,
            '"learning_rate": {"source": "assumed", "value": 0.003',
            '"learning_rate": {"source": "assumed", "value": 0.004',
        ),
        (FOLDER / TRAINED / "training.json", "2.3456", "2.3457"),
        (FOLDER / TRAINED / "ruler.json", '"date": "2', '"date": "3'),
        ("model_cards/template.md.j2", "## Limits", "## Limit"),
        ("model_cards/memory.svg.j2", "tokens in", "token in"),
        (card.CARDS / f"{TRAINED}.md", "2.346", "2.345"),
        (card.CARDS / "memory/nano-7M-GLA.svg", "GLA pure", "GLA pur"),
        (SUITE, "2.3456", "2.3455"),
        ("README.md", "MiB", "MB"),
        ("model_cards/README.md", "Do not edit", "Do edit"),
    ],
)
def test_one_character_is_noticed(root, path, old, new, capsys):
    assert main(["--root", str(root), "--check"]) == 0
    text = (root / path).read_text()
    assert old in text
    (root / path).write_text(text.replace(old, new, 1))
    try:
        status = main(["--root", str(root), "--check"])
    except SystemExit as stop:  # refused: the config is no longer the cell's
        status = stop.code
    assert status in (1, 2)
    said = "".join(capsys.readouterr())
    assert "differ" in said or "not the cell's" in said


def test_a_card_that_is_no_longer_generated_is_named_and_removed(root, capsys):
    stale = root / card.CARDS / "340M-20B-GLA-pure.md"
    stale.write_text("old")
    assert main(["--root", str(root), "--check"]) == 1 and stale.name in capsys.readouterr().out
    assert main(["--root", str(root)]) == 0 and not stale.exists()
    assert main(["--root", str(root), "--check"]) == 0


def test_a_trained_cell_shows_its_numbers_and_only_those(root):
    text = text_of(root, TRAINED)
    assert "| held-out | loss_nats | 262144 | 2.346 [2.326, 2.365] | 256 |" in text
    assert "| mean | strict | 0.250 [0.000, 0.500] | 0.000 [0.000, 0.500] |" in text.replace("|  |", "|")
    assert "| cache | total_bytes | 512,000 (formula 512,000) | 1,024,000 (formula 1,024,000) |" in text
    assert "15.250 (quartiles 15.000 to 16.500)" in text
    assert "gold_nats" not in text and "Not trained" not in text and WEIGHTS in text
    assert (
        "Not evaluated: language modelling; " in text and "RULER" not in text.split("Not evaluated:")[1].split("\n")[0]
    )
    assert f"../results/{TRAINED}/ruler.json" in text and "python -m evaluation.ruler" in text
    assert "in 41 s on" in text and "**Trained" not in text
    assert (
        "(2.346)" in (root / "README.md").read_text()
        and "5 cells, 1 of them trained" in (root / "README.md").read_text()
    )


def test_another_run_of_the_cell_is_told_of_but_not_shown(root):
    for evaluation in ("training", "lm"):
        numbers = [metric("held-out", "loss_nats", 9.8765, n=5)]
        write(result(evaluation, TRAINED, "python -m x", numbers, weights="e" * 64), root / FOLDER, "seed2")
    assert main(["--root", str(root)]) == 0
    text = text_of(root, TRAINED)
    assert "9.877" not in text and "9.8765" not in text and "Not evaluated: language modelling" in text
    assert "The cell was trained 1 more time with other seeds" in text
    assert "9.8765" in (root / SUITE).read_text()


def test_a_run_that_was_not_the_recipe_is_described_as_it_was(root):
    path = root / FOLDER / TRAINED / "training.json"
    protocol = {"tokens": 1_310_720, "sequence_length": 512, "learning_rate": 0.003, "dataset": "text/*.jsonl"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "protocol": protocol}))
    assert main(["--root", str(root)]) == 0
    text = text_of(root, TRAINED)
    assert "**The run was not what the recipe says** in: dataset 'text/*.jsonl', not 'installed-python'; " in text
    assert "learning_rate 0" not in text and "trained from scratch on 1.3 million tokens of `text/*.jsonl`" in text
    assert "20 steps of 65,536 tokens" in text and "Trained on sequences of 512 tokens" in text


def test_an_untrained_cell_says_so_and_shows_no_number(root):
    text = text_of(root, "340M-20B-GatedDeltaNet-pure")
    assert "**Not trained yet.**" in text and "to be trained from scratch" in text and "model-index" not in text
    assert "Not evaluated: held-out loss" in text and "not republished here" in text
    assert "`m-a-p/340M-20B-GatedDeltaNet-pure-baseline`" in text and "attn.D" in text
    assert "| learning rate | 0.0003 | flame default (Mar 2025) |" in text.split("Not stated by the paper")[1]
    assert "| optimizer | AdamW | paper v1" in text.split("Not stated by the paper")[0]


def test_front_matter_is_what_the_hub_reads(root):
    text = text_of(root, TRAINED)
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    results = {(r.dataset_type, r.dataset_config, r.metric_type): r.metric_value for r in data.eval_results}
    assert results["training/held-out", "tokens=262144", "loss_nats"] == 2.3456
    assert results["ruler/mean", "length=512", "strict"] == 0.25 and results["ruler/mean", "length=1024", "strict"] == 0
    assert not any(kind == "shortcut" for *_, kind in results)  # no score of the model
    assert front_matter(text_of(root, "340M-20B-GatedDeltaNet-pure"))["datasets"] == ["HuggingFaceFW/fineweb-edu"]


GOOD = "---\nlanguage: [en]\nlibrary_name: transformers\nlicense: apache-2.0\npipeline_tag: text-generation\ntags: [a]\n---\n# x\n"
INDEX = (
    "model-index:\n- name: m\n  results:\n"
    + 2 * "  - task: {type: t}\n    dataset: {type: d, name: d}\n    metrics: [{type: acc, value: 0.5}]\n"
)


@pytest.mark.parametrize(
    "text, message",
    [
        ("# x\n", "no front matter"),
        ("---\n[a, b]\n---\n", "not a mapping"),
        ("---\na: [\n---\n", "not YAML"),
        (GOOD.replace("apache-2.0", "apache"), "license is 'apache'"),
        (GOOD.replace("transformers", "torch"), "library_name"),
        (GOOD.replace("[en]", "[english]"), "ISO 639"),
        (GOOD.replace("tags:", "datasets: [fineweb]\ntags:"), "not ids of the Hub"),
        (GOOD.replace("tags:", INDEX + "tags:"), "twice, which the Hub merges"),
        (GOOD.replace("tags:", INDEX[: INDEX.rindex("  - task")].replace("0.5", ".nan") + "tags:"), "number nan"),
        (GOOD.replace("tags:", INDEX[: INDEX.rindex("  - task")].replace("type: d, ", "") + "tags:"), "dataset type"),
        (GOOD + "[a](https://arxiv.org/abs/1910.09700)\n", "1910.09700"),
        (GOOD + "[a](plots/no.svg)\n", "leads nowhere"),
        (GOOD + "hf_" + "a" * 30 + "\n", "an access token"),
        (GOOD + "see /home/me/runs\n", "somebody's home"),
        (GOOD + "[More Information Needed]\n", "left unfilled"),
        (GOOD + "x", "no end"),
    ],
)
def test_what_breaks_a_rule_is_found(text, message):
    assert problems(GOOD, arxiv=set(), files=set()) == []
    assert re.search(message, "; ".join(problems(text, arxiv=set(), files=set())))


def test_a_card_that_would_leak_a_path_is_refused(root, capsys):
    path = root / FOLDER / TRAINED / "ruler.json"
    path.write_text(path.read_text().replace("python -m evaluation.ruler", "python -m evaluation.ruler /home/me/model"))
    with pytest.raises(SystemExit) as stop:
        main(["--root", str(root)])
    assert stop.value.code == 2 and "somebody's home" in capsys.readouterr().err


def test_a_published_card_links_within_its_repository(root):
    found = files(TRAINED, root, f"someone/{TRAINED}", "v1.0", WEIGHTS)
    text = found["README.md"]
    assert (
        set(LINKS.findall(text))
        <= found.keys()
        == {"README.md", "memory/nano-7M-GLA.svg", "results/training.json", "results/ruler.json", "results/cost.json"}
    )
    assert f'repo = "someone/{TRAINED}"' in text and 'revision="v1.0"' in text and "not on the Hub" not in text
    assert text == card.render(TRAINED, root, f"someone/{TRAINED}", "v1.0")
    with pytest.raises(ValueError, match="another model"):
        files(TRAINED, root, weights="d" * 64)
    with pytest.raises(ValueError, match="about none"):
        files("nano-7M-GLA-pure", root, weights=WEIGHTS)
    with pytest.raises(ValueError, match="no recipe"):
        files("nano-7M-HGRN-pure", root)


def test_the_readme_must_have_a_place_for_the_table(root, capsys):
    (root / "README.md").write_text("# no place\n")
    with pytest.raises(SystemExit):
        main(["--root", str(root), "--check"])
    assert "no place for the suite's table" in capsys.readouterr().err


def test_the_picture_shows_the_formulas():
    text = memory_svg("1.3B-100B", "GLA", ROOT / "model_cards")
    lines = {
        label: points
        for points, label in re.findall(r'<path d="M([\d. L]+)".*?>([\w. -]+)</text>', text)
        if "L" in points
    }
    ends = {label: float(points.split(" ")[-1]) for label, points in lines.items()}
    # 131,072 tokens: 48 MiB for pure, 24 GiB for the Transformer, on an axis from 16 MiB to 64 GiB, 258 pixels high.
    assert ends["GLA pure"] == pytest.approx(292 - 258 * 1.585 / 12, abs=0.1)
    assert ends["Transformer"] == pytest.approx(292 - 258 * 10.585 / 12, abs=0.1)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE as the nano suite's, of the few tokens that its own text gives."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([Path(__file__).read_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_the_snippet_runs_as_printed(root, tokenizer):
    """Both cards', from a directory where their repo is a folder, by the code in it: the package is hidden."""
    printed = {}
    for number, repo_id in enumerate([None, f"someone/{TRAINED}"]):
        text = card.render(TRAINED, root, repo_id) if repo_id else text_of(root, TRAINED)
        (printed[number],) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        saved = root / (repo_id or f"runs/{TRAINED}")
        HybridLinearForCausalLM(cell_config(TRAINED)).save_pretrained(saved)
        tokenizer.save_pretrained(saved)
    runner = "import sys\nfor name in ('hybrid_models', 'fla', 'triton'): sys.modules[name] = None\n"
    runner += "".join(f"exec({snippet!r}, {{}})\nprint('ran')\n" for snippet in printed.values())
    home = {name: str(root / "home") for name in ("HF_HOME", "HF_MODULES_CACHE", "HOME")}
    environment = {**home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", runner], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("ran\n") == 2 and done.stdout.count("def read(self, path):") == 2
