"""What a repository shall hold, read from a bundle's folder: every file with its hashes, or a reason to refuse.

A publication is the list in SHA256SUMS and nothing else. A link that leads elsewhere, a dot file, a pickle (which runs
code when it is read), a file that the list does not name or that has changed since, a token in a text: each is refused
here, before anything is sent. Hashes are cached by path, size, time and inode, so that a second look at 240 GB of weights
reads none of them.

    >>> from upload.manifest import read_manifest
    >>> manifest = read_manifest("runs/bundles/nano-7M-GLA-pure")          # doctest: +SKIP
    >>> manifest.files["model.safetensors"].sha256[:8], manifest.bytes     # doctest: +SKIP
    ('1f0c8e7a', 28415320)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hybrid_models.results import write_atomically

from .remote import Trouble, redact

SUMS = "SHA256SUMS"
# What a checkpoint consists of. Anything else is asked for by adding it here, not by dropping it into a folder.
SUFFIXES = {".safetensors", ".json", ".py", ".md", ".svg", ".png", ".csv", ".txt", ".jinja"}
PLAIN_NAMES = {"LICENSE", SUMS}
SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
SECRETS = {
    "a token": re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a cloud key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a path of someone's machine": re.compile(r"(?:/home/|/Users/|/root/)[A-Za-z0-9._-]+"),
}
HEADER_LIMIT = 100 * 2**20  # of a safetensors header, as the format's own library has it


@dataclass(frozen=True)
class File:
    """A file by content: ``sha1`` is git's name for it, which the Hub shows for small files."""

    path: str
    size: int
    sha256: str
    sha1: str


@dataclass(frozen=True)
class Manifest:
    folder: Path
    files: dict[str, File]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files.values())


class RemoteFile(NamedTuple):
    """A file as the Hub lists it; ``sha256`` for large ones only."""

    size: int
    sha1: str
    sha256: str | None


class Difference(NamedTuple):
    """What a commit would do. All empty: the Hub holds exactly this."""

    add: tuple[str, ...]
    change: tuple[str, ...]
    delete: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(paths)} to {word}" for word, paths in zip(self._fields, self, strict=True) if paths]
        return ", ".join(parts) or "nothing to do"

    def __bool__(self) -> bool:
        return any(self)


def difference(files: Mapping[str, File], remote: Mapping[str, RemoteFile]) -> Difference:
    """Compare by size and hash. The Hub's own .gitattributes is left alone."""

    def same(file: File, there: RemoteFile) -> bool:
        content = (there.sha256, file.sha256) if there.sha256 else (there.sha1, file.sha1)
        return there.size == file.size and content[0] == content[1]

    present = {path: there for path, there in remote.items() if path != ".gitattributes"}
    return Difference(
        tuple(sorted(files.keys() - present.keys())),
        tuple(sorted(path for path in files.keys() & present.keys() if not same(files[path], present[path]))),
        tuple(sorted(present.keys() - files.keys())),
    )


def read_manifest(folder: str | Path, cache: HashCache | None = None) -> Manifest:
    """The files of a bundle, all of them checked.

    Raises:
        Trouble: SHA256SUMS is missing, or does not fit the folder, or a file may not be published.
    """
    folder, cache = Path(folder), cache or HashCache(None)
    if not (folder / SUMS).is_file():
        raise Trouble(f"{folder} has no {SUMS}: it is not a bundle. Make one with `python -m upload.bundle`.")
    wanted = _read_sums(folder / SUMS)
    found = list_files(folder)
    for path in found:
        if path not in wanted and path != SUMS:
            raise Trouble(f"{folder / path} is not named in {SUMS}: remove it, or bundle again.")
    files = {}
    for path in sorted([*wanted, SUMS]):
        if path not in found:
            raise Trouble(f"{folder / path} is named in {SUMS} and missing: bundle again.")
        file = cache.file(folder, path)
        if path != SUMS and file.sha256 != wanted[path]:
            raise Trouble(f"{folder / path} has changed since it was bundled: bundle again.")
        if path.endswith(".safetensors"):
            check_safetensors(folder / path)
        elif path != SUMS:
            check_text(folder / path)
        files[path] = file
    return Manifest(folder, files)


def list_files(folder: Path) -> set[str]:
    """Paths below ``folder``, relative and with slashes, if each is of a kind and a name that is published.

    Raises:
        Trouble: a link, a dot file, a strange name, a kind of file that does not belong into a checkpoint.
    """
    paths = set()
    for directory, subfolders, names in os.walk(folder):
        for name in (*subfolders, *names):
            full = Path(directory) / name
            path = full.relative_to(folder).as_posix()
            if full.is_symlink() or not (full.is_file() or full.is_dir()):
                raise Trouble(f"{full} is a link or a special file: what is published is a copy of its own.")
            if not SEGMENT.fullmatch(name):
                raise Trouble(f"{full}: names begin with a letter or a digit and hold letters, digits, '.', '_', '-'.")
            if full.is_file():
                if full.suffix not in SUFFIXES and path not in PLAIN_NAMES:
                    raise Trouble(
                        f"{full} is not of a kind that is published ({', '.join(sorted(SUFFIXES))}). Weights go as "
                        "safetensors: a pickle runs code when it is read."
                    )
                paths.add(path)
    return paths


def check_safetensors(path: Path) -> None:
    """Refuse a damaged header, and metadata that the library would write in random order (more than one key)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(HEADER_LIMIT, path.stat().st_size):
            raise Trouble(f"{path} is damaged: its header claims {length} bytes. Save the model again.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise Trouble(f"{path} is damaged: its header is not JSON ({error}). Save the model again.") from None
    end = (
        8 + length + max((one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"), default=0)
    )
    if end != path.stat().st_size:
        raise Trouble(f"{path} is cut short or has something behind its tensors: save the model again.")
    if (header.get("__metadata__") or {}).keys() - {"format"}:
        raise Trouble(
            f"{path} has metadata {sorted(header['__metadata__'])}: only 'format' may be there, as with more keys every "
            "save of the same tensors is another file. Save with model.save_pretrained(), and put facts into JSON files."
        )


def check_text(path: Path) -> None:
    """Refuse a text that gives away a secret. Says where, never what."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    for what, pattern in SECRETS.items():
        if match := pattern.search(text):
            line = text.count("\n", 0, match.start()) + 1
            raise Trouble(f"{path}, line {line}: this looks like {what}; it is not published.")
    if redact(text) != text:
        raise Trouble(f"{path} holds the token of this login; it is not published. Revoke the token if it got out.")


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS of all files below ``folder``, as ``sha256sum`` would."""
    lines = []
    for path in sorted(list_files(folder) - {SUMS}):
        with (folder / path).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path}\n")
    write_atomically(folder / SUMS, "".join(lines))


def _read_sums(path: Path) -> dict[str, str]:
    sums = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
        if not match or match[2] in sums or not all(SEGMENT.fullmatch(part) for part in match[2].split("/")):
            raise Trouble(f"{path}: {line!r} is not a line of {SUMS}: bundle again.")
        sums[match[2]] = match[1]
    return sums


class HashCache:
    """Hashes that were computed before, in a JSON file; None keeps them in memory alone."""

    def __init__(self, path: Path | None):
        self.path = path
        self._lock = threading.Lock()
        try:
            self._known = json.loads(path.read_text()) if path else {}
        except (OSError, ValueError):
            self._known = {}

    def file(self, folder: Path, path: str) -> File:
        """The file at ``folder/path``; read only if it is not the one that was read before."""
        full = folder.resolve() / path
        status = full.stat()
        key = f"{full}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
        if key not in self._known:
            sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % status.st_size)
            with full.open("rb") as file:
                while chunk := file.read(2**20):
                    sha256.update(chunk)
                    sha1.update(chunk)
            with self._lock:
                self._known[key] = [sha256.hexdigest(), sha1.hexdigest()]
        return File(path, status.st_size, *self._known[key])

    def save(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(self._known))
