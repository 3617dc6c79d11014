"""The recall slices: hits, gaps and rarity as a slow reading of their definitions gives them, and losses as brute force."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evaluation.recall import (
    Contexts,
    count_pairs,
    cut,
    distance_bins,
    gaps,
    main,
    mean_loss,
    measure,
    read_documents,
    slices,
)

from .common import VOCAB, tiny_model, tokens


def slow_gaps(ids: list[int]) -> list[int]:
    last, found = {}, [0]
    for t in range(1, len(ids)):
        pair = (ids[t - 1], ids[t])
        found.append(t - last[pair] if pair in last else 0)
        last[pair] = t
    return found


@pytest.mark.parametrize("vocabulary, length", [(3, 50), (20, 400), (2, 1), (2, 2)])
def test_gap_to_the_last_occurrence_of_a_pair(vocabulary, length):
    ids = np.random.RandomState(0).randint(vocabulary, size=length)
    assert gaps(ids).tolist() == slow_gaps(ids.tolist())


def test_counts_of_pairs_within_documents():
    documents = [np.random.RandomState(i).randint(5, size=30).tolist() for i in range(3)] + [[2], []]
    expected = Counter(pair for ids in documents for pair in zip(ids, ids[1:]))
    table = count_pairs(documents)
    assert table.tokens == 91 and table.counts.sum() == 87
    asked = np.array([[a, b] for a in range(6) for b in range(6)])
    counts = table[asked[:, 0].astype(np.int64) << 32 | asked[:, 1]]
    assert counts.tolist() == [expected[tuple(pair)] for pair in asked.tolist()]
    assert count_pairs([])[np.array([7])].tolist() == [0]
    assert table.sha256() == count_pairs(documents[::-1]).sha256() != count_pairs(documents[:2]).sha256()


@pytest.mark.parametrize("bos", [None, 1])
def test_every_token_has_its_loss_gap_and_rarity(bos):
    """Against one forward per context, and dictionaries."""
    model = tiny_model("gated_delta_net", "3-1")
    random = np.random.RandomState(0)
    documents = [(3 + random.randint(6, size=n)).tolist() for n in (50, 7, 1, 23)]
    training = [(3 + random.randint(6, size=100)).tolist()]
    counted = Counter(zip(training[0], training[0][1:]))
    context = 20
    found = measure(model, documents, count_pairs(training), context=context, rare=2, bos=bos, batch_size=3)

    nats, gap, rare, document = [], [], [], []
    step = context if bos is None else context - 1
    for d, ids in enumerate(documents):
        for start in range(0, len(ids), step):
            row = ids[start : start + step]
            front = [] if bos is None else [bos]
            with torch.no_grad():
                logits = model(torch.tensor([front + row])).logits[0].log_softmax(-1)
            last = {}
            for t in range(1, len(row)):  # the first token has no pair
                pair = (row[t - 1], row[t])
                nats.append(-float(logits[t - 1 + len(front), row[t]]))
                gap.append(t - last[pair] if pair in last else 0)
                rare.append(counted[pair] <= 2)
                document.append(d)
                last[pair] = t
    order = np.lexsort((nats, document))
    seen = np.lexsort((found.nats, found.document))
    assert np.allclose(found.nats[seen], np.array(nats)[order], atol=1e-8)  # sums over another batch
    assert found.document[seen].tolist() == np.array(document)[order].tolist()
    assert found.gap[seen].tolist() == np.array(gap)[order].tolist()
    assert found.rare[seen].tolist() == np.array(rare)[order].tolist()
    assert 0 < found.rare.sum() < len(found.rare) and 0 < (found.gap > 0).sum() < len(found.gap)


def test_contexts_hold_their_bos():
    assert cut(range(5, 10), 4, None) == [[5, 6, 7, 8], [9]]
    assert cut(range(5, 10), 4, 1) == [[1, 5, 6, 7], [1, 8, 9]]


def some_contexts(n: int = 600, documents: int = 12) -> Contexts:
    random = np.random.RandomState(1)
    return Contexts(
        random.random_sample(n),
        random.randint(0, 700, size=n) * (random.random_sample(n) < 0.7),
        random.random_sample(n) < 0.5,
        np.sort(random.randint(documents, size=n)),
    )


def test_slices_and_bins_are_partitions():
    contexts = some_contexts()
    masks = slices(contexts, far=128)
    assert masks["all"].all() and (masks["new"] ^ masks["hit"]).all()
    rare_hits = contexts.rare & (contexts.gap > 0)
    assert np.array_equal(masks["near_rare"] | masks["far_rare"], rare_hits)
    assert contexts.gap[masks["far_rare"]].min() > 128 and 1 <= contexts.gap[masks["near_rare"]].max() <= 128
    assert slices(Contexts(*[np.ones(2)] * 2, np.ones(2, bool), np.ones(2)), far=1)[
        "near_rare"
    ].all()  # a gap of ``far``
    bins = distance_bins(contexts)
    assert np.array_equal(np.sum(list(bins.values()), 0), rare_hits)
    far = [mask for (low, _), mask in bins.items() if low > 128]
    assert np.array_equal(np.sum(far, 0), masks["far_rare"])  # so bins and slices can be read side by side


def test_interval_is_over_documents():
    random = np.random.RandomState(0)
    per_document = random.randn(40)
    sizes = random.randint(1, 30, size=40)
    document = np.repeat(np.arange(40), sizes)
    contexts = Contexts(per_document[document], np.zeros_like(document), document > 0, document)
    found = mean_loss(contexts, np.ones(len(document), bool))
    mean = (per_document * sizes).sum() / sizes.sum()
    assert found.nats == pytest.approx(mean) and found.documents == 40 and found.tokens == sizes.sum()
    # The delta method for a ratio of sums over documents; the bootstrap agrees to its own noise and second order.
    expected = np.sqrt((((per_document - mean) * sizes) ** 2).sum()) / sizes.sum()
    assert found.stderr == pytest.approx(expected, rel=0.1)
    low, high = found.ci95
    assert low < mean < high and high - low == pytest.approx(2 * 1.96 * expected, rel=0.1)
    assert found.per_document == pytest.approx(per_document.tolist())
    assert mean_loss(contexts, document == 3).ci95 is None
    assert mean_loss(contexts, document == 99) is None


def test_documents_come_from_files_and_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntext")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    assert read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == ["one\ntext", "two", "three"]
    (tmp_path / "c.jsonl").write_text('{"text": "two"}\n["three"]\n')
    with pytest.raises(ValueError, match="line 2"):
        read_documents([tmp_path / "c.jsonl"])


# --------------------------------------------------------------------------------------------------------------- command


def word_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """Token i is written w<i>; w1 is BOS."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", unk_token="w0")


def written(*shape: int, seed: int = 0) -> str:
    # One digit each: BOS is a special token, and w1 would be found inside of w10.
    return " ".join(f"w{3 + i % 7}" for i in tokens(*shape, seed=seed).flatten().tolist())


@pytest.fixture(params=["hybrid", "another family"])
def checkpoint(request, tmp_path):
    if request.param == "hybrid":
        model = tiny_model("hgrn2", "3-1", dtype=torch.float32)
    else:
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    for name, seed in (("held_out_1", 1), ("held_out_2", 2), ("training", 3)):
        (tmp_path / f"{name}.txt").write_text(written(300, seed=seed))
    return tmp_path


def run(folder, *more: str) -> dict:
    held_out = [str(folder / f"held_out_{i}.txt") for i in (1, 2)]
    command = [str(folder / "model"), "--text", *held_out, "--counts", str(folder / "training.txt"), "--context", "150"]
    main([*command, "--rare", "4", "--far", "20", "--device", "cpu", "--output", str(folder / "results"), *more])
    return json.loads((folder / "results" / "model" / "recall.json").read_text())


def test_command(checkpoint, capsys):
    one = run(checkpoint)
    by_task = {m["task"]: m for m in one["metrics"] if "gap" not in m}
    assert list(by_task) == ["all", "new", "new_rare", "hit", "near_rare", "far_rare"]
    assert by_task["all"]["tokens"] == by_task["new"]["tokens"] + by_task["hit"]["tokens"] == 2 * (300 - 3)
    assert by_task["all"]["n"] == 2 and len(by_task["all"]["ci95"]) == 2
    assert one["protocol"]["count_table_tokens"] == 300 and one["protocol"]["bos"] == 1
    assert one["weights_sha256"] and len(one["details"]["items"]["hit"]) == 2
    printed = capsys.readouterr().out
    assert "far_rare" in printed and "at most 4 times in 300 tokens" in printed

    other = run(checkpoint, "--batch-size", "1")
    assert [m["value"] for m in other["metrics"]] == pytest.approx([m["value"] for m in one["metrics"]], abs=1e-5)
    (checkpoint / "training.txt").write_text(written(300, seed=4))
    assert run(checkpoint)["protocol"]["count_table_sha256"] != one["protocol"]["count_table_sha256"]


def test_command_refuses_in_one_line(tmp_path, capsys):
    tiny_model("hgrn", "pure", dtype=torch.float32).save_pretrained(tmp_path / "model")
    word_tokenizer(bos=False).save_pretrained(tmp_path / "model")
    (tmp_path / "held_out_1.txt").write_text("w3 w4 w5")
    (tmp_path / "held_out_2.txt").write_text("w3 w4 w6")
    (tmp_path / "training.txt").write_text("w3 w4 w5")
    for more, message in (((), "share 1 documents"), (("--context", "2"), "context=2")):
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, *more)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
        (tmp_path / "training.txt").write_text("w7 w8 w9")
