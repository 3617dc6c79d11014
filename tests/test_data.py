"""The same batches whatever reads them, however many processes there are, and wherever a run was interrupted.

Everything here is compared exactly: these are token numbers.
"""

from __future__ import annotations

import json
import random
from itertools import islice

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from training import corpus, sources
from training.corpus import installed_python, train_tokenizer
from training.data import IGNORED, Lane, Stream, merge_states
from training.sources import (
    CHUNK,
    HELD_OUT,
    DataError,
    find_files,
    held_out_rows,
    is_held_out,
    open_sources,
    open_tokenizer,
    training_texts,
)
from training.trainer import Batches

WORDS = "state layer token mixer decay value query hybrid cache linear gate norm".split()
LENGTH = 48


def documents(count: int, seed: int = 0) -> list[str]:
    """Documents of 1 to 80 words, so that some fill several rows and some rows hold several."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 80))) for _ in range(count)]


def write_parquet(path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"text": texts, "id": [str(i) for i in range(len(texts))], "url": [""] * len(texts)})
    pyarrow.parquet.write_table(table, path, row_group_size=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten files of 150 documents, as parquet (a folder) and all of them as one .jsonl."""
    root = tmp_path_factory.mktemp("data")
    texts = documents(1500)
    for i in range(10):
        write_parquet(root / "parquet" / f"{i:03}.parquet", texts[150 * i : 150 * (i + 1)])
    (root / "one.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(documents(100), 300)


@pytest.fixture(scope="module")
def opened(folder, tokenizer):
    """Sources by (spec's name, streaming); reading them changes nothing."""
    specs = {
        "folder": f"{folder}/parquet",
        "file": f"{folder}/one.jsonl",
        "mixture": f"{folder}/parquet:0.25 {folder}/one.jsonl:0.75",
    }
    return {
        (name, streaming): open_sources(spec, tokenizer, folder / "cache", streaming)
        for name, spec in specs.items()
        for streaming in (True, False)
    }


def stream(found, **options) -> Stream:
    return Stream(found, **{**dict(sequence_length=LENGTH, seed=5, lanes=4, rows=2), **options})


def take(found, count: int, **options) -> list[dict]:
    return list(islice(stream(found, **options), count))


def same(a: list[dict], b: list[dict]) -> bool:
    names = ("input_ids", "labels", "position_ids")
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x[name], y[name]) for x, y in pairs for name in names if name in x)


# ------------------------------------------------------------------------------------------------------ the same batches


@pytest.mark.parametrize("name", ["folder", "file", "mixture"])
def test_streaming_and_mapped_data_give_the_same_batches(opened, name):
    """More than an epoch, so that the second order of the files is a part of it."""
    count = 2200
    streamed, mapped = take(opened[name, True], count), take(opened[name, False], count)
    assert same(streamed, mapped)
    places = [place for lane in streamed[-1]["state"]["lanes"].values() for place in lane["sources"]]
    assert max(place["epoch"] for place in places) >= 1
    assert not same(mapped[:20], take(opened[name, False], 20, seed=6)) or name == "file"


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "mapped"])
@pytest.mark.parametrize("name", ["folder", "file", "mixture"])
def test_the_next_batch_after_a_restart_is_the_one_that_would_have_come(opened, name, streaming):
    found = opened[name, streaming]
    whole = take(found, 640)
    for stop in (0, 1, 17, 333, 633):
        place = json.loads(json.dumps(whole[stop]["state"]))  # as it comes from a checkpoint
        again = take(found, 5, place=place)
        assert same(again, whole[stop + 1 : stop + 6])
        assert [batch["state"] for batch in again] == [batch["state"] for batch in whole[stop + 1 : stop + 6]]


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "mapped"])
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_sees_the_same_batches(opened, streaming, world):
    """Each batch of eight rows; a run may go on with another number of processes."""
    found = opened["mixture", streaming]
    whole = take(found, 12, rows=8)
    shares = [take(found, 12, rows=8 // world, rank=rank, world=world) for rank in range(world)]
    for i, batch in enumerate(whole):
        rows = torch.stack([share[i]["input_ids"] for share in shares], 1).reshape(8, LENGTH)
        assert torch.equal(rows, batch["input_ids"])
    place = merge_states([json.loads(json.dumps(share[6]["state"])) for share in shares])
    assert same(take(found, 5, rows=8, place=place), whole[7:])


def test_states_of_different_steps_do_not_merge(opened):
    one, two = take(opened["folder", False], 2)
    with pytest.raises(ValueError, match="different steps"):
        merge_states([one["state"], two["state"]])


def test_a_restart_does_not_read_what_was_read(opened, monkeypatch):
    """However far a run is, going on costs at most a chunk of each lane."""
    far = take(opened["folder", True], 400)[-1]["state"]
    counts = []
    plain = sources.encode
    monkeypatch.setattr(
        sources, "encode", lambda tokenizer, texts: counts.append(len(texts)) or plain(tokenizer, texts)
    )
    take(opened["folder", True], 1, place=far)
    assert 0 < sum(counts) <= 2 * 2 * CHUNK  # two rows, of two lanes, each of at most two chunks


def test_a_reading_process_gives_the_same_batches_and_their_places(opened):
    here = take(opened["mixture", True], 6)
    batches = Batches(stream(opened["mixture", True]), workers=1, pin_memory=False)
    for expected, found in zip(here, batches):
        assert same([found], [expected]) and "state" not in found
        assert batches.place == expected["state"]


def test_reading_leaves_the_random_numbers_alone(opened):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(Batches(stream(opened["folder", False]), workers=0, pin_memory=False)))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------- what is in them


def test_rows_are_the_documents_one_after_the_other(opened, tokenizer, folder):
    """A slow reference: lane 1 of 4 over files in the order of the seed, training documents only, cut anywhere."""
    files = list(range(10))
    random.Random("5 0").shuffle(files)
    texts = documents(1500)
    expected = []
    for file in files[1::4]:
        for text in texts[150 * file : 150 * (file + 1)]:
            if not is_held_out(text):
                expected += [1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2]
    lane = Lane(opened["folder", False][0], 1, 4, seed=5)
    found = np.concatenate([lane.row(LENGTH)[0] for _ in range(len(expected) // LENGTH)])
    assert found.tolist() == expected[: len(found)]
    batch = take(opened["folder", False], 1, rows=4)[0]
    assert batch["input_ids"][1].tolist() == expected[:LENGTH]
    assert torch.equal(batch["labels"], batch["input_ids"]) and "position_ids" not in batch


def test_boundaries_restart_positions_and_are_not_predicted(opened):
    plain, kept = (take(opened["folder", False], 30, boundaries=flag) for flag in (False, True))
    assert any((batch["input_ids"] == 1).sum() > 2 for batch in plain)
    for a, b in zip(plain, kept):
        assert torch.equal(a["input_ids"], b["input_ids"])
        for ids, labels, positions in zip(b["input_ids"], b["labels"], b["position_ids"]):
            expected = -1
            for column, token in enumerate(ids.tolist()):
                begins = token == 1 or column == 0
                expected = 0 if begins else expected + 1
                assert positions[column] == expected
                assert labels[column] == (IGNORED if begins else token)


def test_a_mixture_has_its_weights(opened):
    """600 rows at 0.25: three standard deviations are 0.053."""
    places = take(opened["mixture", False], 300)[-1]["state"]["lanes"]
    chosen = [stream(opened["mixture", False])._choose(lane, row) for lane in range(4) for row in range(150)]
    assert sum(place["rows"] for place in places.values()) == 600
    assert abs(chosen.count(0) / 600 - 0.25) < 0.053


def test_held_out_documents_are_never_trained_on(opened, folder, tokenizer):
    texts = documents(1500)
    kept = [text for text in texts if is_held_out(text)]
    assert len(texts) / HELD_OUT / 2 < len(kept) < 2 * len(texts) / HELD_OUT
    rows = held_out_rows(f"{folder}/parquet", tokenizer, folder / "cache", LENGTH, 10)
    expected = [id for text in kept for id in (1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2)]
    assert rows.flatten().tolist() == expected[: 10 * LENGTH]
    assert set(training_texts(f"{folder}/parquet", folder / "cache", 10**9)) == set(texts) - set(kept)
    found = held_out_rows(f"{folder}/parquet:0.5 {folder}/one.jsonl:0.5", tokenizer, folder / "cache", LENGTH, 10)
    assert len(found) == 10 and torch.equal(found[:5], rows[:5]) and torch.equal(found[5:], rows[:5])


# ----------------------------------------------------------------------------------------------------------- where text is


def test_a_hub_repository_is_read_as_it_is_laid_out(tmp_path, tokenizer):
    """fineweb-edu's layout: several subsets, one of them chosen by its name in the README."""
    subsets = {"default": "data/*/*", "sample-10BT": "sample/10BT/*", "sample-100BT": "sample/100BT/*"}
    lines = ["---", "configs:"]
    for name, pattern in subsets.items():
        lines += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {pattern}"]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---", "# fineweb-edu", ""]))
    write_parquet(tmp_path / "data/CC-MAIN-2013-20/train-00000-of-00001.parquet", ["other"] * 9)
    write_parquet(tmp_path / "sample/10BT/000_00000.parquet", ["another"] * 9)
    for i in range(3):
        write_parquet(tmp_path / f"sample/100BT/{i:03}_00000.parquet", documents(60, seed=i))

    [files] = find_files(f"{tmp_path}@sample-100BT", tmp_path)
    assert files.kind == "parquet"
    assert [path.rsplit("/", 2)[1:] for path in files.paths] == [["100BT", f"{i:03}_00000.parquet"] for i in range(3)]
    streamed, mapped = (open_sources(f"{tmp_path}@sample-100BT", tokenizer, tmp_path / "c", s) for s in (True, False))
    assert same(take(streamed, 40, lanes=2), take(mapped, 40, lanes=2))
    text = "".join(tokenizer.decode(ids) for batch in take(streamed, 40) for ids in batch["input_ids"])
    assert "other" not in text and "state" in text
    with pytest.raises(DataError, match="sample-1BT"):
        find_files(f"{tmp_path}@sample-1BT", tmp_path)


def test_a_text_file_is_one_document(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("state\n\nlayer\n")
    (tmp_path / "b.txt").write_text("token")
    [found] = open_sources(str(tmp_path), tokenizer, tmp_path / "cache", True)
    read = [ids for file in (0, 1) for *_, chunk in found.documents(file, 0, None, lambda i: True) for ids in chunk]
    assert [tokenizer.decode(ids[1:-1]) for ids in read] == ["state\n\nlayer\n", "token"]


BROKEN = {
    "magic.parquet": b"this is no parquet file at all" * 10,
    "line.jsonl": b'{"text": "fine"}\n{"text": "bro\n',
    "column.jsonl": b'{"txt": "a text"}\n',
    "number.jsonl": b'{"text": 5}\n',
    "bytes.txt": b"fine \xff\xfe not fine",
}


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "mapped"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_names_itself(tmp_path, tokenizer, name, streaming):
    """Last of three, behind ones of its kind that can be read."""
    kind = name.partition(".")[2]
    for i in range(2):
        path = tmp_path / "data" / f"{i}.{kind}"
        if kind == "parquet":
            write_parquet(path, documents(30, seed=i))
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"text": documents(1, seed=i)[0]}) + "\n")
    (tmp_path / "data" / name).write_bytes(BROKEN[name])
    with pytest.raises(DataError, match=f"data/{name}"):
        take(open_sources(str(tmp_path / "data"), tokenizer, tmp_path / "cache", streaming), 100, lanes=1)


def test_a_truncated_file_names_itself_when_it_is_reached(tmp_path, tokenizer, folder):
    good = (folder / "parquet/000.parquet").read_bytes()
    data = tmp_path / "data"
    write_parquet(data / "a.parquet", documents(30))
    (data / "b.parquet").write_bytes(good[: len(good) // 2])
    found = open_sources(str(data), tokenizer, tmp_path / "cache", True)
    seed = next(s for s in range(9) if Lane(found[0], 0, 1, s)._files(0)[0] == [0, 1])
    assert len(take(found, 5, lanes=1, seed=seed)) == 5
    with pytest.raises(DataError, match="b.parquet cannot be read"):
        take(found, 200, lanes=1, seed=seed)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("", "dataset is empty"),
        ("/nowhere/at/all", "neither a file nor a folder"),
        ("{folder}/one.jsonl:0", "must be a positive number"),
        ("{folder}", "files of one kind"),
        ("installed-python@much", "a number with k, M or G"),
    ],
)
def test_a_dataset_that_is_not_there_is_refused(folder, spec, message):
    with pytest.raises(DataError, match=message):
        find_files(spec.format(folder=folder), folder / "cache")


def test_too_little_text_is_refused(tmp_path, tokenizer):
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(3)))
    found = open_sources(f"{tmp_path}/few.jsonl", tokenizer, tmp_path / "cache", True)
    with pytest.raises(DataError, match="few.jsonl.*too small; use fewer lanes"):
        take(found, 4, lanes=8)
    assert len(take(found, 50, lanes=1)) == 50


def test_lanes_must_be_shared_evenly(opened):
    with pytest.raises(DataError, match="lanes=4 cannot be dealt to 3 processes"):
        stream(opened["folder", False], world=3)


# ------------------------------------------------------------------------------------------------- the built-in corpus


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A Python installation of 60 files, two of them equal, some too short or too long, one not UTF-8."""
    root = tmp_path / "packages"
    for i, text in enumerate(documents(60)):
        path = root / f"package{i % 3}" / f"m{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {i}\n" + text * (300 // len(text) + 1))
    (root / "package0/copy.py").write_bytes((root / "package1/m1.py").read_bytes())
    (root / "package0/short.py").write_text("x = 1\n")
    (root / "package0/table.py").write_text("x\n" * 300_000)
    (root / "package0/latin.py").write_bytes(b"# \xe9" * 200)
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(root))
    return root


def corpus_texts(found) -> list[str]:
    [files] = find_files(f"{found.directory}", None)
    return [text for path in files.paths for text in pyarrow.parquet.read_table(path)["text"].to_pylist()]


def test_the_corpus_is_every_file_once_in_an_order_of_its_content(packages, tmp_path):
    found = installed_python(tmp_path / "one")
    texts = corpus_texts(found)
    assert found.documents == len(texts) == len(set(texts)) == 60
    assert found.bytes == sum(len(text.encode()) for text in texts)
    for path in sorted(packages.rglob("m*.py")):
        path.rename(path.with_name("renamed_" + path.name))
    again = installed_python(tmp_path / "two")
    assert again.sha256 == found.sha256 and corpus_texts(again) == texts
    (packages / "package0/new.py").write_text("# new\n" * 100)
    assert installed_python(tmp_path / "one").sha256 != found.sha256


def test_a_part_of_the_corpus_is_its_beginning(packages, tmp_path):
    whole = corpus_texts(installed_python(tmp_path))
    part = installed_python(tmp_path, max_bytes=10_000)
    assert part.bytes <= 10_000 and corpus_texts(part) == whole[: part.documents]
    [files] = find_files("installed-python@10k", tmp_path)
    assert files.corpus == part


def test_no_source_no_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="installed-python"):
        installed_python(tmp_path / "cache")


# ----------------------------------------------------------------------------------------------------------- tokenizers


def test_the_trained_tokenizer_is_the_same_every_time_and_spells_anything(folder):
    texts = documents(200)
    one, two = train_tokenizer(texts, 290), train_tokenizer(iter(texts), 290)
    assert sources.tokenizer_digest(one) == sources.tokenizer_digest(two)
    assert sources.tokenizer_digest(one) != sources.tokenizer_digest(train_tokenizer(texts, 280))
    assert len(one) == 290 and (one.pad_token_id, one.bos_token_id, one.eos_token_id) == (0, 1, 2)
    assert one.decode(one("été \U0001f600\n\t x", add_special_tokens=False)["input_ids"]) == "été \U0001f600\n\t x"


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, tokenizer):
    from training.recipes import recipe

    config = recipe("tiny-GLA-pure").config
    tokenizer.save_pretrained(tmp_path / "t")
    assert open_tokenizer(str(tmp_path / "t"), config, "", tmp_path).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="vocab_size=299.*--set vocab_size=300"):
        open_tokenizer(str(tmp_path / "t"), type(config)(vocab_size=299), "", tmp_path)
    with pytest.raises(ValueError, match="eos_token_id=2, the configuration 5"):
        open_tokenizer(str(tmp_path / "t"), type(config)(vocab_size=300, eos_token_id=5), "", tmp_path)
    with pytest.raises(ValueError, match="tokenizer='/nowhere' cannot be loaded"):
        open_tokenizer("/nowhere", config, "", tmp_path)
    with pytest.raises(ValueError, match="at least 259"):
        train_tokenizer(["text"], 258)
