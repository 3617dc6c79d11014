"""``--compat lm-eval`` gives lm-eval's own prompts, answers and scores, and refuses where lm-eval would not return."""

from __future__ import annotations

import contextlib
import io
import random

import numpy as np
import pytest

from evaluation import ruler_compat
from evaluation.lm import run_harness
from evaluation.ruler_compat import STOCK, Compat
from evaluation.ruler_scoring import official_score
from evaluation.ruler_tasks import TASKS
from evaluation.scoring import Encoder, generate

from .memorised import VOCAB, build, save
from .small_tokenizer import word_pieces

LENGTH = 1536  # VT and CWE fit it with this tokenizer; at 1024 they would not
COUNT = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return str(save(build("attention"), tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def data_sets_stay_here(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def theirs(task: str, tokenizer) -> list[dict]:
    """The first samples from lm-eval's own functions, in the state in which its command calls them."""
    with ruler_compat._no_download_of_punkt():
        from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, vt_utils
    random.seed(0)
    np.random.seed(1234)
    if task == "ruler_vt":
        options = dict(tokenizer=tokenizer, max_seq_length=500, incremental=5)
        [example] = vt_utils.sys_vartrack_w_noise_random(num_samples=1, **options)
        return vt_utils.sys_vartrack_w_noise_random(tokenizer, COUNT, LENGTH, icl_example=example)
    if task == "ruler_cwe":
        cwe_utils.RNG.seed(42)  # as after an import: the generator's first work is to shuffle the words
        cwe_utils.WORDS.sort()
        cwe_utils.RNG.shuffle(cwe_utils.WORDS)
        return cwe_utils.sys_word_pair_random(COUNT, LENGTH, tokenizer)
    if task == "ruler_fwe":
        return fwe_utils.sys_kwext(tokenizer, LENGTH, COUNT)
    haystack, keys = ("repeat", "words") if task == "niah_single_1" else ("needle", "words")
    return niah_utils.generate_samples(
        niah_utils.get_haystack(haystack),
        TOKENIZER=tokenizer,
        max_seq_length=LENGTH,
        type_haystack=haystack,
        type_needle_k=keys,
        type_needle_v="numbers",
        template=niah_utils.TEMPLATE,
        num_samples=COUNT,
    )


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "ruler_vt", "ruler_cwe", "ruler_fwe"])
def test_prompts_answers_and_scores_are_lm_evals(task, source, monkeypatch):
    model, tokenizer = build("attention").eval(), word_pieces(VOCAB)
    seen: list[dict] = []

    def record(*args, **kwargs):
        seen.extend(found := run_harness(*args, **kwargs))
        return found

    monkeypatch.setattr(ruler_compat, "run_harness", record)
    random.seed(7)
    state = random.getstate()
    compat = Compat(model, tokenizer, source, batch_size=2)
    cell = compat.cell(task, LENGTH, COUNT)
    assert not cell.refused and random.getstate() == state
    if task == "ruler_cwe":  # whose words are drawn by a generator that outlives a run
        assert compat.cell(task, LENGTH, COUNT).data_sha256 == cell.data_sha256
        del seen[COUNT:]

    with contextlib.redirect_stdout(io.StringIO()):
        expected = theirs(task, tokenizer)
    kept = ("input", "outputs", "gen_prefix", "length", "max_length")
    assert [{k: sample["doc"][k] for k in kept} for sample in seen] == [{k: one[k] for k in kept} for one in expected]

    # The text that was generated, in lm-eval's padded batches, is what our generate() writes to the same prompt, so the
    # score is RULER's of that text.
    encode = Encoder(tokenizer)
    for sample, score in zip(seen, cell.scores["official"], strict=True):
        [[text]] = sample["resps"]
        delimiter = "\n\n" if task == "ruler_cwe" else " "
        prompt = sample["doc"]["input"] + delimiter + sample["doc"]["gen_prefix"]
        ids = encode(prompt)[-(LENGTH - TASKS[task].budget) :]  # what does not fit is cut on the left: defect R9
        [written] = generate(model, [ids], TASKS[task].budget, eos=tokenizer.eos_token_id)
        assert encode.decode(written) == text
        assert score == official_score(sample["doc"]["outputs"], "all", text)


def test_refuses_where_lm_eval_would_not_return(source):
    compat = Compat(build("attention"), word_pieces(VOCAB), source, batch_size=2)
    for task, length in (("ruler_vt", 512), ("ruler_cwe", 512), ("ruler_fwe", 128)):
        assert "lm-eval would not return, or ask for nothing: it needs" in compat.cell(task, length, 2).refused


def test_every_task_has_its_definition_in_lm_eval():
    import lm_eval

    for task, stock in STOCK.items():
        text = next(path for path in lm_eval.__path__) + f"/tasks/{stock}"
        with open(text) as file:
            assert f"task: {task}\n" in file.read()
