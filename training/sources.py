"""Where the text is, and how its documents become token numbers.

    >>> from training.sources import find_files, texts
    >>> [files] = find_files("notes.jsonl", cache)                      # doctest: +SKIP
    >>> place, documents = next(texts(files, files.paths[0]))           # doctest: +SKIP

A dataset is named as the command line names it: ``installed-python`` (``installed-python@2M`` for a part of it), a file or
folder of .parquet, .jsonl or .txt files (a .txt file is one document, a line of .jsonl has a field ``text``), a Hub
repository ``owner/name@subset`` or a folder laid out as one, or several of these with weights, ``code.jsonl:0.3 text/:0.7``.
Reading goes through ``datasets``, file by file: so a place in the data is a file and a place in it, and what cannot be
read is named. Either a source is tokenised while it is read (a stream, for what is remote or huge) or beforehand, in
parallel, and then read from the disk.

Documents whose content hashes to one class in HELD_OUT are never trained on, in any dataset; ``held_out_rows`` reads them.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
from datasets import Dataset, load_dataset, load_dataset_builder
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .corpus import MAX_BYTES, Corpus, installed_python, train_tokenizer

HELD_OUT = 50  # one document in so many
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".md": "text", ".py": "text"}
TOKENIZER_BYTES = 10_000_000  # text that a "bpe" tokenizer is trained on
NOT_TEXT = {"README.md", "corpus.json"}  # what lies beside text in a dataset's folder
CHUNK = 32  # documents read and tokenised at a time; a place is found again by reading at most these


class DataError(ValueError):
    """A dataset that cannot be read; the message names the file."""


def is_held_out(text: str) -> bool:
    """Whether a document is kept for evaluation: decided by its content, so wherever it turns up."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") % HELD_OUT == 0


# ------------------------------------------------------------------------------------------------------ where text is


class Files(NamedTuple):
    """The files of one dataset, all of a kind that ``datasets`` reads."""

    name: str
    kind: str  # "parquet", "json" or "text"
    paths: list[str]
    weight: float
    corpus: Corpus | None = None

    @property
    def remote(self) -> bool:
        return "://" in self.paths[0]


def find_files(spec: str, cache: Path) -> list[Files]:
    """The files behind a dataset specification; weights sum to 1.

    Raises:
        DataError: nothing is there, kinds are mixed, or a weight is not a positive number.
    """
    found = []
    for item in spec.split():
        name, _, weight = item.rpartition(":")
        try:
            weight = float(weight) if name else 1.0
        except ValueError:
            name, weight = item, 1.0  # the colon was a part of the name
        if not weight > 0:
            raise DataError(f"dataset={item!r}: the weight after the colon must be a positive number.")
        found.append(_find(name or item, cache)._replace(weight=weight))
    if not found:
        raise DataError("dataset is empty: name a file, a folder, a Hub repository or installed-python.")
    total = sum(one.weight for one in found)
    return [one._replace(weight=one.weight / total) for one in found]


def _find(name: str, cache: Path) -> Files:
    place, _, subset = name.partition("@")
    if place == "installed-python":
        corpus = installed_python(cache, _bytes(subset) if subset else MAX_BYTES)
        return Files(name, "parquet", sorted(map(str, Path(corpus.directory).glob("*.parquet"))), 1.0, corpus)
    path = Path(place)
    if path.is_file():
        paths = [path]
    elif path.is_dir() and not subset:
        paths = sorted(p for p in path.rglob("*") if p.suffix in KINDS and p.is_file() and p.name not in NOT_TEXT)
    elif path.is_dir() or (place.count("/") == 1 and not place.startswith((".", "/", "~"))):
        return _find_repository(name, place, subset or None)
    else:
        raise DataError(f"dataset={name!r} is neither a file nor a folder, nor a Hub repository (owner/name).")
    kinds = sorted({KINDS.get(p.suffix, p.suffix) for p in paths})
    if len(kinds) != 1 or kinds[0] not in KINDS.values():
        raise DataError(
            f"dataset={name!r} holds {', '.join(kinds) or 'no files'}: it must hold files of one kind, "
            f"{', '.join(KINDS)}."
        )
    return Files(name, kinds[0], [str(p) for p in paths], 1.0)


def _find_repository(name: str, place: str, subset: str | None) -> Files:
    """Files of the train split of a Hub repository, or of a folder with the same README and layout."""
    try:
        builder = load_dataset_builder(place, subset)
    except Exception as error:
        raise DataError(f"dataset={name!r} cannot be opened: {_short(error)}") from error
    files = (builder.config.data_files or {}).get("train")
    if not files or builder.name not in KINDS.values():
        raise DataError(f"dataset={name!r} has no train split of parquet, JSON or text files.")
    return Files(name, builder.name, [str(path) for path in files], 1.0)


def _bytes(text: str) -> int:
    factor = {"k": 10**3, "m": 10**6, "g": 10**9}.get(text[-1:].lower(), 1)
    try:
        return int(float(text.rstrip("kKmMgG")) * factor)
    except ValueError:
        raise DataError(f"dataset=installed-python@{text}: a size is a number with k, M or G, as in @5M.") from None


def _short(error: BaseException) -> str:
    """The last line of an exception's text, without its traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def texts(files: Files, path: str, state: dict | None = None) -> Iterator[tuple[dict | None, list[str]]]:
    """The documents of one file from a place on, CHUNK at a time, each chunk with the place where it begins.

    Args:
        state: such a place (``datasets``' own state of a stream); None: the beginning.

    Raises:
        DataError: the file cannot be read, or a document has no text.
    """
    try:
        options = {"sample_by": "document"} if files.kind == "text" else {}
        stream = load_dataset(files.kind, data_files={"train": [path]}, split="train", streaming=True, **options)
        if state is not None:
            stream.load_state_dict(copy.deepcopy(state))
        rows, place = iter(stream), state
        while True:
            found = []
            for row in islice(rows, CHUNK):
                if not isinstance(row.get("text"), str):
                    raise DataError(f"{path}: a document has no string in column 'text' (columns: {', '.join(row)}).")
                found.append(row["text"])
            if not found:
                return
            yield place, found
            place = stream.state_dict()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read: {_short(error)}") from error


# ------------------------------------------------------------------------------------------- documents as token numbers


@dataclass
class Source:
    """One dataset, tokenised while it is read."""

    files: Files
    tokenizer: PreTrainedTokenizerBase

    def documents(self, file: int, index: int, state, wanted) -> Iterator[tuple[int, Any, list[np.ndarray]]]:
        """Token numbers of a file's documents, CHUNK at a time.

        Args:
            file: which of ``files.paths``.
            index, state: a place: the number of documents before it, and the reader's own state there.
            wanted: a function of a document's number, False for those of other lanes.

        Yields:
            place of the chunk (index, state) and the wanted training documents in it, BOS and EOS included.
        """
        for place, chunk in texts(self.files, self.files.paths[file], state):
            mine = [text for i, text in enumerate(chunk, index) if wanted(i) and not is_held_out(text)]
            yield index, place, encode(self.tokenizer, mine)
            index += len(chunk)


@dataclass
class MappedSource(Source):
    """One dataset, tokenised beforehand and read from the disk; the same documents at the same places."""

    rows: Dataset
    first: list[int] = field(default_factory=list)  # row where each file begins, and the end

    def documents(self, file, index, state, wanted):
        start, end = self.first[file], self.first[file + 1]
        for begin in range(start + index, end, CHUNK):
            chunk = self.rows[begin : min(begin + CHUNK, end)]
            rows = enumerate(zip(chunk["input_ids"], chunk["held_out"]), begin - start)
            yield begin - start, None, [ids for i, (ids, held_out) in rows if wanted(i) and not held_out]


def encode(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> list[np.ndarray]:
    """Token numbers [length] of every document, between BOS and EOS."""
    if not documents:
        return []
    rows = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.array([tokenizer.bos_token_id, *row, tokenizer.eos_token_id], dtype=np.int32) for row in rows]


def _tokenised(paths: list[tuple[int, str]], files: Files, tokenizer) -> Iterator[dict]:
    for file, path in paths:
        for _, chunk in texts(files, path):
            for ids, text in zip(encode(tokenizer, chunk), chunk):
                yield {"input_ids": ids, "held_out": is_held_out(text), "file": file}


def open_sources(
    spec: str, tokenizer: PreTrainedTokenizerBase, cache: Path, streaming: bool | None = None
) -> list[Source]:
    """The datasets of a specification, ready to be read.

    Args:
        streaming: read and tokenise on the way; False: tokenise everything first, in parallel, and keep it below
            ``cache``. None: stream what is remote.

    Raises:
        DataError: see ``find_files`` and ``texts``.
    """
    sources = []
    for files in find_files(spec, cache):
        if files.remote if streaming is None else streaming:
            sources.append(Source(files, tokenizer))
        else:
            sources.append(_mapped(files, tokenizer, cache))
    return sources


def _mapped(files: Files, tokenizer, cache: Path) -> MappedSource:
    key = hashlib.sha256(f"{tokenizer_digest(tokenizer)} {files.kind} {HELD_OUT}\n".encode())
    for path in files.paths:
        status = None if files.remote else os.stat(path)
        key.update(f"{path} {status and (status.st_size, status.st_mtime_ns)}\n".encode())
    paths = list(enumerate(files.paths))
    try:
        rows = Dataset.from_generator(
            _tokenised,
            gen_kwargs={"paths": paths, "files": files, "tokenizer": tokenizer},
            num_proc=min(len(paths), os.cpu_count()),
            cache_dir=str(cache / "tokenised"),
            fingerprint=key.hexdigest()[:32],
        )
    except Exception as error:
        raise _data_error(error) or DataError(f"dataset={files.name!r} cannot be tokenised: {_short(error)}") from error
    counts = np.bincount(rows.with_format("numpy")["file"][:], minlength=len(paths))
    return MappedSource(files, tokenizer, rows.with_format("numpy"), [0, *np.cumsum(counts).tolist()])


def _data_error(error: BaseException | None) -> DataError | None:
    """The DataError behind an error of ``datasets``; from another process it comes as the text of its traceback."""
    while error is not None and not isinstance(error, DataError):
        _, found, message = str(error).rpartition(f"{DataError.__module__}.{DataError.__name__}: ")
        if found:
            return DataError(message.splitlines()[0])
        error = error.__cause__ or error.__context__
    return error


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of everything that decides how text becomes numbers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return hashlib.sha256(f"{facts} {special}".encode()).hexdigest()


def held_out_rows(spec: str, tokenizer, cache: Path, sequence_length: int, rows: int) -> torch.Tensor:
    """At most ``rows`` rows [rows, sequence_length] of held-out documents, one after the other, always the same.

    The datasets of a mixture give rows by their weight. Empty where there is not one row of them.
    """
    parts = []
    for files in find_files(spec, cache):
        wanted = round(rows * files.weight) * sequence_length
        ids: list[np.ndarray] = []
        chunks = (chunk for path in files.paths for _, chunk in texts(files, path))
        while sum(map(len, ids)) < wanted and (chunk := next(chunks, None)) is not None:
            ids += encode(tokenizer, [text for text in chunk if is_held_out(text)])
        stream = np.concatenate(ids or [np.empty(0, np.int32)])[:wanted].astype(np.int64)
        whole = len(stream) // sequence_length * sequence_length
        parts.append(torch.from_numpy(stream[:whole]).view(-1, sequence_length))
    return torch.cat(parts)[:rows]


def training_texts(spec: str, cache: Path, max_bytes: int) -> Iterator[str]:
    """The first training documents of a specification's datasets, by their weight; what a tokenizer is trained on."""
    for files in find_files(spec, cache):
        left = max_bytes * files.weight
        for text in (t for path in files.paths for _, chunk in texts(files, path) for t in chunk if not is_held_out(t)):
            yield text
            left -= len(text.encode("utf-8", "surrogatepass"))
            if left <= 0:
                break


def open_tokenizer(name: str, config, spec: str, cache: Path) -> PreTrainedTokenizerBase:
    """The tokenizer called ``name``, a Hub id or a path; "bpe" is trained on the dataset ``spec``, always the same.

    Raises:
        ValueError: it cannot be loaded, or does not fit ``config``, a HybridLinearConfig.
    """
    if name == "bpe":
        tokenizer = _trained_tokenizer(list(training_texts(spec, cache, TOKENIZER_BYTES)), config.vocab_size, cache)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except OSError as error:
            raise ValueError(f"tokenizer={name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"tokenizer={name!r} has {len(tokenizer)} tokens, the model vocab_size={config.vocab_size}: pass "
            f"--set vocab_size={len(tokenizer)} or another --tokenizer."
        )
    for field_name in ("bos_token_id", "eos_token_id"):
        have, want = getattr(tokenizer, field_name), getattr(config, field_name)
        if have is None or have != want:
            raise ValueError(
                f"tokenizer={name!r} has {field_name}={have}, the configuration {want}: they must be the same number; pass "
                f"--set {field_name}={have} or another --tokenizer."
            )
    return tokenizer


def _trained_tokenizer(documents: list[str], vocab_size: int, cache: Path) -> PreTrainedTokenizerBase:
    """``train_tokenizer``, once for the same text on a machine."""
    key = hashlib.sha256(f"{vocab_size} {tokenizers.__version__}\n".encode())
    for text in documents:
        key.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    directory = cache / f"tokenizer-{key.hexdigest()[:16]}"
    if not directory.exists():
        trained = train_tokenizer(documents, vocab_size)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".tokenizer-") as staging:
            trained.save_pretrained(f"{staging}/whole")
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(f"{staging}/whole", directory)
    return AutoTokenizer.from_pretrained(directory)


__all__ = [
    "DataError",
    "Files",
    "MappedSource",
    "Source",
    "encode",
    "find_files",
    "held_out_rows",
    "is_held_out",
    "open_sources",
    "open_tokenizer",
    "texts",
    "tokenizer_digest",
    "training_texts",
]
