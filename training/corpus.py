"""Text and tokenizer that need no network: the source of the Python packages installed here, and byte-level BPE.

    python -m training.corpus                        # what this machine's corpus holds

    >>> from training.corpus import installed_python
    >>> corpus = installed_python(cache, max_bytes=2_000_000)           # doctest: +SKIP
    >>> corpus.sha256[:12], corpus.documents                            # doctest: +SKIP

The corpus is one document per .py file of the standard library and of site-packages. Equal files count once, and the
order is that of the digests of their content, so it mixes topics and does not depend on where packages lie. Other
machines have other packages: every result therefore records the corpus' own digest and size, and only runs with the same
digest can be compared. It is written once per machine, as parquet files, and read as any other dataset is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

MAX_BYTES = 70_000_000  # some 21 M tokens of the nano tokenizer: a run of the nano suite reads it once
SHARDS = 16
FILE_BYTES = range(200, 500_000)  # shorter files say nothing, longer ones are tables
FORMAT = 1  # of the cache; raise it when the rules above change
MIN_VOCAB = 3 + 256  # special tokens and bytes


@dataclass(frozen=True)
class Corpus:
    """Where a corpus lies and what it is."""

    directory: str  # holds the parquet files
    sha256: str  # of the digests of its documents, in order
    documents: int
    bytes: int  # of UTF-8 text


def default_cache() -> Path:
    """$XDG_CACHE_HOME/hybrid_models, ~/.cache/hybrid_models without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid_models"


def installed_python(cache: Path, max_bytes: int = MAX_BYTES) -> Corpus:
    """The corpus of this machine, written below ``cache`` at the first call.

    Args:
        max_bytes: of text; the first documents in the corpus' order that fit are taken.

    Raises:
        FileNotFoundError: there is no Python source here (a frozen or zipped Python).
    """
    paths = _sources()
    if not paths:
        raise FileNotFoundError(
            "dataset=installed-python: this Python has no .py files; pass --dataset with text files."
        )
    key = hashlib.sha256(f"{FORMAT} {max_bytes}\n".encode())
    for path in paths:
        status = path.stat()
        key.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    directory = Path(cache) / f"installed-python-{key.hexdigest()[:16]}"
    facts = directory / "corpus.json"
    if not facts.exists():
        _write(paths, max_bytes, directory)
    return Corpus(str(directory), **json.loads(facts.read_text()))


def _sources() -> list[Path]:
    roots = sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})
    return sorted({path for root in roots for path in root.rglob("*.py") if path.is_file()})


def _write(paths: list[Path], max_bytes: int, directory: Path) -> None:
    documents: dict[bytes, str] = {}
    for path in paths:
        data = path.read_bytes()
        if len(data) in FILE_BYTES:
            try:
                documents[hashlib.sha256(data).digest()] = data.decode()
            except UnicodeDecodeError:
                continue  # a source file in another encoding: rare, and mostly a test of decoders
    taken, total = [], 0
    for digest in sorted(documents):
        total += len(documents[digest].encode())
        if total > max_bytes and taken:
            total -= len(documents[digest].encode())
            break
        taken.append(digest)
    identity = hashlib.sha256(b"".join(taken)).hexdigest()

    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".corpus-"))
    try:
        size = -(-len(taken) // SHARDS)
        for shard, start in enumerate(range(0, len(taken), size)):
            part = taken[start : start + size]
            table = pyarrow.table({"text": [documents[d] for d in part], "id": [d.hex() for d in part]})
            pyarrow.parquet.write_table(table, staging / f"{shard:05}.parquet", row_group_size=256)
        (staging / "corpus.json").write_text(json.dumps({"sha256": identity, "documents": len(taken), "bytes": total}))
        try:
            staging.rename(directory)
        except OSError:
            if not (directory / "corpus.json").exists():  # or another process was faster
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def train_tokenizer(texts: Iterable[str] | Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocab_size`` tokens; the same for the same texts.

    <pad> is 0, <s> 1 and </s> 2, as in the configurations. It adds none of them by itself, but encodes any text.

    Raises:
        ValueError: the vocabulary has no room for the 256 bytes.
    """
    if vocab_size < MIN_VOCAB:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for a byte-level tokenizer: use at least {MIN_VOCAB} "
            "(--set vocab_size=...), or pass --tokenizer."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m training.corpus",
        description="Write the corpus of installed Python source, where that has not been done, and say what it holds.",
        epilog="example:\n  python -m training.corpus --max-bytes 5000000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cache-dir", type=Path, default=default_cache(), help="(default: %(default)s)")
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(asdict(installed_python(args.cache_dir, args.max_bytes)), indent=1))
    except OSError as error:
        parser.error(str(error))
    return 0


__all__ = ["MAX_BYTES", "Corpus", "default_cache", "installed_python", "train_tokenizer"]

if __name__ == "__main__":
    raise SystemExit(main())
