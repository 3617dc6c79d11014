"""Xet without a Xet service: the client's file-system mode, in which a CAS address is ``local:///some/folder``.

Xet is the Hub's default transport; a publisher that was only tried on plain LFS has not been tried. The client's mode is
made for its own tests and may vanish: ``available`` says whether this version has it. What it leaves in a folder is
``xorbs`` (chunks), ``shards`` (which chunks are which file) and a database that one process locks for its lifetime. So
every writer gets a folder of its own, and every reader a folder with links to a writer's and a copy of the database.

A commit names a file by its sha256, a download by its Xet hash; the shards know both. Their layout: a 48-byte header;
per file a record of 48 bytes (hash 32, flags u32, n u32, 8 unused), n segments of 48, n more if flag bit 31 is set, then 48
bytes that begin with the sha256 if bit 30 is; a hash of all ``ff`` ends the list. Hashes print as four little-endian u64.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

RECORD = 48


def hash_text(raw: bytes) -> str:
    """32 bytes as Xet prints them."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def shard_files(shard: bytes) -> Iterator[tuple[str, str | None]]:
    """(Xet hash, sha256 or None) of every file that a shard describes."""
    position = RECORD
    while position + RECORD <= len(shard):
        raw, flags, count = struct.unpack_from("<32sII", shard, position)
        if raw == b"\xff" * 32:
            return
        position += RECORD * (1 + count * (2 if flags & 1 << 31 else 1))
        sha256 = None
        if flags & 1 << 30:
            sha256 = hash_text(shard[position : position + 32])
            position += RECORD
        yield hash_text(raw), sha256


class XetStore:
    """The folders of one server."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.folder.mkdir(parents=True)
        self._known: dict[str, tuple[str, str]] = {}  # sha256 -> (writer, Xet hash)

    def new_writer(self) -> Path:
        """A folder for the holder of one write token."""
        return Path(tempfile.mkdtemp(prefix="writer-", dir=self.folder))

    def new_reader(self, writer: str) -> Path:
        """A folder that reads what ``writer`` has written."""
        source = self.folder / writer / "xet" / "xorbs"
        target = Path(tempfile.mkdtemp(prefix="reader-", dir=self.folder))
        (target / "xet" / "xorbs").mkdir(parents=True)
        for name in ("xorbs", "shards"):
            (target / "xet" / "xorbs" / name).symlink_to(source / name)
        shutil.copy(source / "global_dedup_lookup.redb", target / "xet" / "xorbs")
        return target

    def find(self, sha256: str) -> tuple[str, str] | None:
        """The writer and the Xet hash of a file, if one has been uploaded."""
        if sha256 not in self._known:
            for shard in self.folder.glob("writer-*/xet/xorbs/shards/*.mdb"):
                for xet_hash, found in shard_files(shard.read_bytes()):
                    if found:
                        self._known.setdefault(found, (shard.relative_to(self.folder).parts[0], xet_hash))
        return self._known.get(sha256)

    def read(self, sha256: str) -> bytes:
        """The file, put together from its chunks by the client's own code; empty if it is not there."""
        known = self.find(sha256)
        return b"" if known is None else download(f"local://{self.new_reader(known[0])}", known[1])


def download(address: str, xet_hash: str) -> bytes:
    """A file from a CAS address."""
    from hf_xet import XetFileInfo, XetSession

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "file"
        with XetSession().new_file_download_group(endpoint=address, token="xet", token_expiry_unix_secs=2**40) as group:
            group.start_download_file(XetFileInfo(xet_hash, None), str(target))
        return target.read_bytes()


def available() -> bool:
    """Whether the installed hf_xet reads back what it has written in the file-system mode."""
    try:
        from hf_xet import COMPUTE_SHA256, XetSession
    except ImportError:
        return False
    with tempfile.TemporaryDirectory() as folder:
        store = XetStore(Path(folder) / "xet")
        content = bytes(range(256)) * 300
        try:
            with XetSession().new_upload_commit(
                endpoint=f"local://{store.new_writer()}", token="xet", token_expiry_unix_secs=2**40
            ) as commit:
                handle = commit.start_upload_bytes(content, sha256=COMPUTE_SHA256)
            return store.read(handle.result().xet_info.sha256) == content
        except Exception:  # whatever it is, the mode is not there
            return False
