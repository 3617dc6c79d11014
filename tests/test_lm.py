"""The evaluations find what a model was taught, and only that; their numbers are those of a slow sum; no network is needed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evaluation import lm, ruler
from evaluation.ruler_data import Draw, vocabulary
from evaluation.ruler_tasks import Ruler
from evaluation.scoring import Encoder, loglikelihoods
from hybrid_models.results import read_all

from .memorised import KINDS, VOCAB, build, save, teach
from .small_tokenizer import word_pieces

ITEMS = 40
LENGTH = 288  # at which three prompts are learnt in seconds


@pytest.fixture(autouse=True)
def data_sets_stay_here(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def four_way_items(shift: int = 0) -> list[dict]:
    """Questions in ARC's format; the key, moved on by ``shift``, names the right one of four nouns."""
    draw = Draw("four-way items")
    rows = []
    for i in range(ITEMS):
        key = (draw.below(4) + shift) % 4
        choices = {"text": draw.shuffled(vocabulary()[1])[:4], "label": list("ABCD")}
        rows.append({"question": f"What is number {i}?", "choices": choices, "answerKey": "ABCD"[key]})
    return rows


def accuracy(path: Path, root: Path) -> float:
    one = lm.evaluate(path, tasks=["arc_easy"], data_root=root)
    assert len(one["details"]["items"]["arc_easy/acc"]) == ITEMS
    return next(m["value"] for m in one["metrics"] if (m["task"], m["metric"]) == ("arc_easy", "acc"))


@pytest.mark.parametrize("kind", KINDS)
def test_finds_what_a_model_was_taught_and_nothing_else(kind, tmp_path):
    items = four_way_items()
    answers = [row["choices"]["text"]["ABCD".index(row["answerKey"])] for row in items]
    questions = [(f"Question: {row['question']}\nAnswer:", f" {answer}") for row, answer in zip(items, answers)]
    tasks = ["niah_single_1", "niah_multikey_2"]
    recall = Ruler(word_pieces(VOCAB))
    needles = [(s.prompt, f" {s.gold[0]}") for task in tasks for s in recall.samples(task, LENGTH, 3)]
    write_lines(tmp_path / "right" / "arc_easy" / "test.jsonl", items)
    write_lines(tmp_path / "wrong" / "arc_easy" / "test.jsonl", four_way_items(shift=1))

    model = build(kind)
    untrained = save(model, tmp_path / "untrained")
    assert teach(model, questions, needles) < 0.1  # nats per token, against 6.9 for guessing: every answer is certain
    taught = save(model, tmp_path / "taught")

    assert accuracy(taught, tmp_path / "right") == 1.0
    assert accuracy(taught, tmp_path / "wrong") == 0.0  # so nothing is right whatever is answered
    assert 0.05 < accuracy(untrained, tmp_path / "right") < 0.5  # .25, and three standard errors of .068

    options = dict(lengths=[LENGTH], tasks=tasks, samples=3, batch_size=4)
    one, other = ruler.evaluate(taught, **options), ruler.evaluate(untrained, **options)
    for name in ("official", "strict", "forced"):
        assert [m["value"] for m in one["metrics"] if m["metric"] == name] == [1.0] * 3  # two tasks and their mean
        assert [m["value"] for m in other["metrics"] if m["metric"] == name] == [0.0] * 3
    assert one["details"]["forced_unlike_generated"] == other["details"]["forced_unlike_generated"] == 0
    assert one["protocol"] == other["protocol"] and one["weights_sha256"] != other["weights_sha256"]


def test_lm_evals_loglikelihoods_are_ours(tmp_path):
    model = build("hybrid").eval()
    write_lines(tmp_path / "arc_easy" / "test.jsonl", four_way_items()[:6])
    data = {"data_files": {"test": str(tmp_path / "arc_easy" / "test.jsonl")}}
    splits = {"training_split": None, "validation_split": None}
    overrides = {"task": "arc_easy", "dataset_path": "json", "dataset_name": None, "dataset_kwargs": data, **splits}
    samples = lm.run_harness(model, word_pieces(VOCAB), "arc/arc_easy.yaml", overrides, max_length=256, batch_size=5)
    encode = Encoder(word_pieces(VOCAB))
    for sample, row in zip(samples, four_way_items(), strict=False):
        for choice, [(nats, greedy)] in zip(row["choices"]["text"], sample["resps"], strict=True):
            ids, spans = encode.spans([f"Question: {row['question']}\nAnswer:", f" {choice}"])
            start = spans[1][0]
            [one] = loglikelihoods(model, [(ids[:start], ids[start:])])
            assert float(nats) == pytest.approx(one.nats, abs=1e-5)  # float32's rounding in a batch of another shape
            assert (greedy in (True, "True")) == one.greedy


# ---------------------------------------------------------------------------------------------------------- held-out text


def slow_nats(model, ids: list[int], window: int, stride: int) -> list[float]:
    """Every token's loss from a forward of its own, over the context that ``text_loss`` promises."""
    found = []
    for i in range(1, len(ids)):
        end = i if i <= window else window + math.ceil((i - window) / stride) * stride
        end = max(end, min(window, len(ids) - 1))
        first = max(0, min(end, len(ids) - 1) - window)
        with torch.no_grad():
            logits = model(torch.tensor([ids[first:i]])).logits[0, -1].double()
        found.append(-float(logits.log_softmax(-1)[ids[i]]))
    return found


@pytest.mark.parametrize("window, stride", [(100, 100), (16, 16), (16, 5), (7, 1)])
def test_text_loss_is_the_sum_over_tokens(window, stride):
    model, encode = build("hybrid").double().eval(), Encoder(word_pieces(VOCAB))
    text = "Return the smallest element, or naïvely the first one, if there is none. " * 2
    ids = encode(text)
    one = lm.text_loss(model, encode, text, window=window, stride=stride, batch_size=3)
    slow = slow_nats(model, ids, window, stride)
    assert one.tokens == len(slow) == len(ids) - 1
    assert one.nats == pytest.approx(sum(slow), abs=1e-9)
    assert one.utf8_bytes == len(text) + 2  # one letter of two bytes, twice
    assert one.bits_per_byte == pytest.approx(sum(slow) / math.log(2) / (len(text) + 2))


def test_text_loss_refuses_what_it_cannot_measure():
    model, encode = build("attention"), Encoder(word_pieces(VOCAB))
    with pytest.raises(ValueError, match="stride=9 must be between 1 and window=8"):
        lm.text_loss(model, encode, "text", window=8, stride=9)
    with pytest.raises(ValueError, match="empty"):
        lm.text_loss(model, encode, "", window=8, stride=8)


# ---------------------------------------------------------------------------------------------------------------- the six

# ARC-c, ARC-e, HellaSwag, LAMBADA, OpenBookQA, PIQA and the average as printed in arXiv 2507.06457, in thousandths.
PAPER = """
340M: 299 594 410 334 334 675 441   291 602 415 348 338 661 442   287 588 421 343 334 671 441   298 601 433 339 340 678 448
340M: 300 617 436 347 346 690 456   287 574 411 309 364 672 436   276 612 424 353 330 670 444
1.3B: 403 730 586 475 384 741 553   410 733 598 502 406 741 565   398 721 586 488 388 725 551   392 732 602 482 412 733 559
1.3B: 404 729 604 500 420 733 565   380 718 584 475 400 727 547   395 704 589 474 400 729 548
"""


def test_the_papers_averages_are_the_plain_means():
    rows = [part.split() for line in PAPER.strip().splitlines() for part in line.split(": ")[1].split("   ")]
    assert len(rows) == 14
    for *accuracies, average in rows:
        found = lm.paper_average(dict(zip(lm.TASKS, map(float, accuracies), strict=True)))
        assert abs(found - float(average)) <= 1.0, (accuracies, found)  # each of the seven is rounded
    with pytest.raises(ValueError, match="lacks hellaswag, lambada_openai, openbookqa, piqa"):
        lm.paper_average({"arc_easy": 0.5, "arc_challenge": 0.5})


def write_all_six(root: Path, n: int = 4) -> None:
    words = vocabulary()[1]
    arc = four_way_items()[:n]
    write_lines(root / "arc_easy" / "test.jsonl", arc)
    write_lines(root / "arc_challenge" / "test.jsonl", arc)
    stem = [{"question_stem": row["question"], **{k: row[k] for k in ("choices", "answerKey")}} for row in arc]
    write_lines(root / "openbookqa" / "test.jsonl", stem)
    ends = [
        {"activity_label": "Rowing", "ctx_a": "A man rows.", "ctx_b": "then he", "endings": words[:4], "label": "2"}
    ]
    write_lines(root / "hellaswag" / "validation.jsonl", ends * n)
    write_lines(root / "lambada_openai" / "test.jsonl", [{"text": f"He saw the {word} again"} for word in words[:n]])
    write_lines(
        root / "piqa" / "validation.jsonl", [{"goal": "To row", "sol1": "oars", "sol2": "ears", "label": 0}] * n
    )


def without_network(code: str) -> list[str]:
    """A command that runs ``code`` in an empty network namespace, or where there are none with sockets that refuse."""
    try:
        subprocess.run(["unshare", "-rn", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        refuse = (
            "import socket\ndef no(*_): raise OSError('no network')\nsocket.socket.connect = socket.getaddrinfo = no\n"
        )
        return [sys.executable, "-c", refuse + code]
    return ["unshare", "-rn", sys.executable, "-c", code]


def test_both_commands_run_without_network(tmp_path):
    model, root, out = save(build("hybrid"), tmp_path / "a-model"), tmp_path / "data", tmp_path / "results"
    write_all_six(root)
    (tmp_path / "text.txt").write_text("Return the first item. " * 40)
    small = ["ruler_fwe", "ruler_cwe", "ruler_qa_squad"]
    calls = {
        "lm": ["--data-root", root, "--text", tmp_path / "text.txt", "--window", 64],
        "ruler": ["--lengths", 448, "--samples", 2, "--tasks", "niah_single_2", "niah_multikey_3", *small],
    }
    code = "from evaluation import lm, ruler\n"
    for name, options in calls.items():
        code += f"{name}.main({[str(x) for x in [model, '--device', 'cpu', '--output', out, *options]]})\n"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        without_network(code), env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the mean is over 3 tasks: the 13-task mean of RULER is not given" in done.stdout
    assert "needs squad dev-v2.0.json" in done.stdout
    found = {path.stem: one for path, one in read_all(out)}
    assert set(found) == {"lm", "ruler"} and found["lm"]["model"] == "a-model"
    assert found["ruler"]["details"]["not_run"]["ruler_cwe/448"].endswith("tokens.")
    metrics = {(m["task"], m["metric"]): m["value"] for m in found["lm"]["metrics"]}
    chosen = [metrics[task, lm.TASKS[task].metric] for task in lm.TASKS]
    assert metrics["mean", "accuracy"] == pytest.approx(sum(chosen) / 6)
    assert math.exp(metrics["held-out", "loss_nats"]) == pytest.approx(metrics["held-out", "perplexity"])
    assert metrics["lambada_openai", "perplexity"] > 100
    assert set(found["lm"]["protocol"]["data_sha256"]) == set(lm.TASKS)


# ---------------------------------------------------------------------------------------------------------------- refusals


def test_missing_data_are_listed_at_once(tmp_path, capsys):
    write_all_six(tmp_path)
    (tmp_path / "piqa" / "validation.jsonl").unlink()
    write_lines(tmp_path / "arc_easy" / "test.jsonl", [{"question": "?"}])
    with pytest.raises(SystemExit) as stopped:
        lm.main(["no-model", "--data-root", str(tmp_path)])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert "piqa/validation.jsonl is missing (JSON lines with goal sol1 sol2 label)" in shown
    assert "arc_easy/test.jsonl lacks answerKey, choices" in shown and "Traceback" not in shown


def test_an_item_that_would_be_cut_is_refused(tmp_path):
    write_all_six(tmp_path / "data")
    path = save(build("attention"), tmp_path / "model")
    with pytest.raises(ValueError, match="max_length=8, but an item of arc_easy takes"):
        lm.evaluate(path, tasks=["arc_easy"], data_root=tmp_path / "data", max_length=8)


@pytest.mark.parametrize(
    "command, message",
    [
        (["--lengths", "1k"], "'1k' is not of the form 512,1024"),
        (["--lengths", "63"], "64 tokens or more"),
        (["--samples", "0"], "samples=0 at least 1"),
        (["--tasks", "niah"], "task='niah' is not known"),
        (["--squad", "nowhere.json"], "nowhere.json"),
    ],
)
def test_ruler_says_what_is_wrong_in_a_line(command, message, tmp_path, capsys):
    path = save(build("attention"), tmp_path / "model")
    with pytest.raises(SystemExit) as stopped:
        ruler.main([str(path), *command])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
