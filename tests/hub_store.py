"""What the local Hub keeps: repositories with commits, branches and tags, large objects by sha256, collections.

Nothing here knows HTTP; ``hub_server`` does. It follows the real Hub where that is known (object hashes, a first commit
with ``.gitattributes``, parents that must be the head) and is strict where it is not: a title can be used for two
collections, so a client that creates without looking makes a duplicate, and a test sees it.

    >>> repo = Repo("me/model", private=True)
    >>> first = repo.head()
    >>> repo.commit("main", {"a.txt": Blob.regular(b"hello")}, [], "add", parent=first) == repo.head()
    True
    >>> sorted(repo.tree("main"))
    ['.gitattributes', 'a.txt']
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

REGULAR_LIMIT = 10 * 1024 * 1024
LFS_SUFFIXES = (".safetensors", ".png", ".parquet", ".bin", ".gz", ".zip", ".pt", ".arrow", ".npy", ".jpg", ".pdf")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
FULL_COMMIT = re.compile(r"[0-9a-f]{40}")


class Refused(Exception):
    """A request that the Hub answers with an error.

    Args:
        status: of HTTP.
        message: what the client shows.
        code: ``X-Error-Code``, from which the client chooses its exception.
        extra: fields beside ``error`` in the body.
        headers: of the reply.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, extra: dict | None = None, headers: dict | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.extra, self.headers = extra or {}, headers or {}


def git_sha1(content: bytes) -> str:
    """The name that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    """Whether the Hub stores a file outside of git: by its suffix, or above 10 MB; never an empty one."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > REGULAR_LIMIT)


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its content is either here or, for a large one, under its sha256 among the objects."""

    oid: str  # git sha1, of the content or of the pointer
    size: int
    content: bytes | None = None
    sha256: str | None = None

    @classmethod
    def regular(cls, content: bytes) -> Blob:
        return cls(git_sha1(content), len(content), content)

    @classmethod
    def lfs(cls, sha256: str, size: int) -> Blob:
        return cls(git_sha1(cls.pointer(sha256, size)), size, sha256=sha256)

    @staticmethod
    def pointer(sha256: str, size: int) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def lfs_json(self, oid: str) -> dict:
        """The ``lfs`` field of a listing, in which the sha256 is called ``oid`` or ``sha256``."""
        pointer_size = len(self.pointer(self.sha256, self.size))
        return {"lfs": {oid: self.sha256, "size": self.size, "pointerSize": pointer_size}} if self.sha256 else {}


@dataclass
class Commit:
    id: str
    title: str
    message: str
    date: str
    files: dict[str, Blob]
    parent: str | None


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass
class Repo:
    """A repository with its history."""

    id: str
    private: bool
    kind: str = "models"
    created: str = field(default_factory=now)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self._add("main", {".gitattributes": Blob.regular(GITATTRIBUTES)}, "initial commit", "")

    def _add(self, branch: str, files: dict[str, Blob], title: str, message: str) -> str:
        name = secrets.token_hex(20)
        self.commits[name] = Commit(name, title, message, now(), files, self.branches.get(branch))
        self.branches[branch] = name
        return name

    def head(self, branch: str = "main") -> str:
        return self.branches[branch]

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag, a full ref or a commit id names."""
        for prefix in ("refs/heads/", "refs/tags/"):
            revision = revision.removeprefix(prefix)
        found = self.branches.get(revision) or self.tags.get(revision) or (revision in self.commits and revision)
        if not found:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def tree(self, revision: str) -> dict[str, Blob]:
        return self.commits[self.resolve(revision)].files

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        commits, name = [], self.resolve(revision)
        while name is not None:
            commits.append(self.commits[name])
            name = commits[-1].parent
        return commits

    def commit(
        self,
        branch: str,
        additions: dict[str, Blob],
        deletions: list[str],
        title: str,
        message: str = "",
        parent: str | None = None,
    ) -> str:
        """Make a commit and return its id; a deletion that ends in a slash is a folder's.

        Raises:
            Refused: 412 for a parent that is not the head, 404 for a branch or a deleted file that is not there.
        """
        if branch not in self.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if parent is not None and not self.head(branch).startswith(parent):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(self.tree(branch))
        for path in deletions:
            gone = [name for name in files if name == path or (path.endswith("/") and name.startswith(path))]
            if not gone:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        return self._add(branch, files | additions, title, message)

    def add_ref(self, refs: dict[str, str], name: str, revision: str) -> None:
        """A branch or a tag; ``refs`` is the table that it goes to."""
        if name in refs:
            raise Refused(409, f"Reference {name} exists already")
        refs[name] = self.resolve(revision)

    def delete_ref(self, refs: dict[str, str], name: str) -> None:
        if name not in refs or name == "main":
            raise Refused(404, f"Reference {name} cannot be deleted", "RevisionNotFound")
        del refs[name]


@dataclass
class Collection:
    slug: str
    title: str
    owner: str
    private: bool
    description: str | None
    items: list[dict] = field(default_factory=list)
    updated: str = field(default_factory=now)

    def add(self, kind: str, name: str, note: str | None) -> None:
        if any((item["type"], item["id"]) == (kind, name) for item in self.items):
            raise Refused(409, "Item already in collection")
        self.items.append({"_id": secrets.token_hex(12), "id": name, "type": kind, "note": note})

    def index(self, object_id: str) -> int:
        for index, item in enumerate(self.items):
            if item["_id"] == object_id:
                return index
        raise Refused(404, "No such item in this collection")

    def json(self, listing: bool = False) -> dict:
        """As the Hub shows it. A listing cuts items to four and has no position."""
        items = [
            {**item, "position": position, "note": {"text": item["note"]} if item["note"] else None}
            for position, item in enumerate(self.items)
        ]
        return {
            "slug": self.slug,
            "title": self.title,
            "description": self.description,
            "owner": {"name": self.owner, "type": "org"},
            "items": items[:4] if listing else items,
            "lastUpdated": self.updated,
            "private": self.private,
            "theme": "blue",
            "upvotes": 0,
            **({} if listing else {"position": 0}),
        }


class Objects:
    """Large files by sha256, in a folder. What is stored is what was hashed.

    A copy shares the folder and knows only what was there when it was made, so that a state can be gone back to.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names: set[str] = set()

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def has(self, sha256: str) -> bool:
        return sha256 in self.names

    def put(self, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refused(400, f"The content does not have the sha256 {sha256}")
        temporary = self.folder / f".{secrets.token_hex(8)}"
        temporary.write_bytes(content)
        temporary.replace(self.path(sha256))
        self.names.add(sha256)

    def read(self, blob: Blob) -> bytes:
        return blob.content if blob.sha256 is None else self.path(blob.sha256).read_bytes()

    def flip_bit(self, sha256: str) -> None:
        """What a bad disk does."""
        content = bytearray(self.path(sha256).read_bytes())
        content[-1] ^= 1
        self.path(sha256).write_bytes(content)


@dataclass
class State:
    """Everything that the Hub knows. Users have every right in their own name space and in their organisations'."""

    objects: Objects
    users: dict[str, list[str]] = field(default_factory=lambda: {"tester": ["org"]})  # name -> organisations
    tokens: dict[str, str] = field(default_factory=lambda: {"hf_test": "tester"})
    repos: dict[str, Repo] = field(default_factory=dict)
    collections: dict[str, Collection] = field(default_factory=dict)

    def may_write(self, user: str | None, namespace: str) -> bool:
        return user is not None and (user == namespace or namespace in self.users[user])

    def repo(self, name: str, user: str | None, write: bool = False) -> Repo:
        """The repository, if ``user`` may see it, or change it.

        Raises:
            Refused: 401 without a token, 404 with a foreign one (a private repo's name is private), 403 to write.
        """
        repo = self.repos.get(name)
        allowed = self.may_write(user, name.split("/")[0])
        if repo is None or (repo.private and not allowed):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not allowed:
            raise Refused(403 if user else 401, f"You may not write to {name}")
        return repo

    def create_collection(self, title: str, namespace: str, private: bool, description: str | None) -> Collection:
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        one = Collection(f"{namespace}/{slug}-{secrets.token_hex(12)}", title, namespace, private, description)
        self.collections[one.slug] = one
        return one

    def collection(self, slug: str, user: str | None, write: bool = False) -> Collection:
        one = self.collections.get(slug)
        allowed = one is not None and self.may_write(user, one.owner)
        if one is None or (one.private and not allowed):
            raise Refused(404, "Collection not found")
        if write and not allowed:
            raise Refused(403, f"You may not write to {slug}")
        return one
