"""What is there, what is wanted, and the one step that comes next: a publication as a function of the remote state.

    absent -> create (private) -> commit -> verify (which ends in the release's tag) -> publish -> done

A public repository gets new content through a branch: it is verified there before ``main`` moves. No step trusts a
journal or an earlier answer: after a kill at any point the same reading of the state leads to the same next step. The tag
is the mark of a verified commit, and the only one.

    >>> from upload.manifest import File, Manifest
    >>> target = Target("org/nano", Manifest(None, {"a.json": File("a.json", 2, "ab", "cd")}), release="v1.0")
    >>> next_step(State(), target), next_step(State(exists=True, private=True, head="1f0c"), target)
    (<Step.CREATE: 'create'>, <Step.COMMIT: 'commit'>)
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from .manifest import Manifest, RemoteFile, difference
from .remote import Pace, Transient, Trouble

OURS = "provenance.json"  # every bundle has one; a repository without it is somebody else's work
GITATTRIBUTES = ".gitattributes"


class Step(enum.Enum):
    CREATE = "create"
    HIDE = "hide"
    BRANCH = "branch"
    COMMIT = "commit"
    STAGE = "stage"
    VERIFY = "verify"
    PROMOTE = "promote"
    CLEAN = "clean"
    PUBLISH = "publish"


@dataclass(frozen=True)
class Target:
    """A bundle and where it goes: ``main`` is the model, another branch a training step of it."""

    repo_id: str
    manifest: Manifest
    release: str
    branch: str = "main"
    note: str = ""
    adopt: bool = False  # a repository whose content is not a bundle's is taken over

    @property
    def tag(self) -> str:
        return self.release if self.branch == "main" else f"{self.branch}-{self.release}"

    @property
    def staging(self) -> str:
        """The branch on which a public repository's next content is verified."""
        return f"staging-{self.branch}"

    def __str__(self) -> str:
        return self.repo_id if self.branch == "main" else f"{self.repo_id}@{self.branch}"


@dataclass(frozen=True)
class State:
    """A repository as the Hub shows it, with the files of the target's branch (of ``main`` if there is none yet)."""

    exists: bool = False
    private: bool = True
    head: str | None = None  # of the branch; None if it is not there
    files: dict[str, RemoteFile] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    staged: dict[str, RemoteFile] | None = None  # of the staging branch

    @property
    def empty(self) -> bool:
        return not self.files.keys() - {GITATTRIBUTES}


def observe(api: HfApi, target: Target) -> State:
    """Read the state: two requests, one for a repository that is absent or empty, more for branches."""
    try:
        info = api.model_info(target.repo_id, files_metadata=True)
    except RepositoryNotFoundError:
        return State()
    if info.private is None or not info.sha or info.siblings is None:
        raise Transient(f"{target.repo_id}: the Hub's answer is incomplete")
    files = {
        one.rfilename: RemoteFile(one.size or 0, one.blob_id or "", one.lfs.sha256 if one.lfs else None)
        for one in info.siblings
    }
    if target.branch == "main" and files.keys() <= {GITATTRIBUTES}:
        return State(True, info.private, info.sha, files, {"main": info.sha})  # fresh: no tag to look for
    refs = api.list_repo_refs(target.repo_id)
    branches = {one.name: one.target_commit for one in refs.branches}
    tags = {one.name: one.target_commit for one in refs.tags}
    head = branches.get(target.branch)
    if target.branch == "main":
        if head != info.sha:
            raise Transient(f"{target.repo_id}: somebody else is writing to it")
    elif head:
        files = _tree(api, target.repo_id, head)
    staged = _tree(api, target.repo_id, branches[target.staging]) if target.staging in branches else None
    return State(True, info.private, head, files, branches, tags, staged)


def _tree(api: HfApi, repo_id: str, commit: str) -> dict[str, RemoteFile]:
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {
        one.path: RemoteFile(one.size, one.blob_id, one.lfs.sha256 if one.lfs else None)
        for one in entries
        if isinstance(one, RepoFile)
    }


def next_step(state: State, target: Target) -> Step | None:
    """The step that this state asks for; None: all of it is done, verified and public.

    Raises:
        Trouble: the repository holds somebody else's files, or the release's tag is at another commit.
    """
    if not state.exists:
        if target.branch != "main":
            raise Trouble(f"{target}: the repository is not there yet; publish its main branch first.")
        return Step.CREATE
    if not state.empty and OURS not in state.files and not target.adopt:
        names = sorted(state.files)[:5]
        raise Trouble(
            f"{target} holds files that no bundle made ({', '.join(names)}, ...): use --adopt to replace them."
        )
    if state.head is None:
        return Step.BRANCH
    wanted = target.manifest.files
    if not difference(wanted, state.files):
        tagged = state.tags.get(target.tag)
        if tagged is None:
            return Step.VERIFY
        if tagged != state.head:
            raise Trouble(
                f"{target}: tag {target.tag} is at {tagged[:10]}, not at {state.head[:10]}: choose another --release."
            )
        if state.staged is not None:
            return Step.CLEAN
        return Step.PUBLISH if state.private else None
    if target.tag in state.tags:
        raise Trouble(
            f"{target}: release {target.tag} holds other content, and a tag does not move: choose another --release."
        )
    if state.private:
        return Step.COMMIT
    if state.empty:  # nobody has it yet, so nobody loses it
        return Step.HIDE
    if state.staged is None or difference(wanted, state.staged):
        return Step.STAGE
    return Step.PROMOTE


def describe(state: State, target: Target) -> dict:
    """What would change, as data: the step that comes next, files, bytes to send."""
    changes = difference(target.manifest.files, state.files) if state.exists else difference(target.manifest.files, {})
    sent = [*changes.add, *changes.change]
    step = next_step(state, target)
    return {
        "repo": str(target),
        "visibility": "absent" if not state.exists else "private" if state.private else "public",
        "commit": state.head,
        "verified": bool(state.head) and not changes and state.tags.get(target.tag) == state.head,
        "next": step.value if step else None,
        **{name: list(paths) for name, paths in changes._asdict().items()},
        "bytes": sum(target.manifest.files[path].size for path in sent),
    }


def waves(targets: Iterable[Target], private_bytes: int | None) -> list[list[Target]]:
    """Groups that are private together: as many repositories, in order, as the storage holds; a repository is not split.

    Raises:
        Trouble: one repository alone is larger than ``private_bytes``.
    """
    repos: dict[str, list[Target]] = {}
    for target in targets:
        repos.setdefault(target.repo_id, []).append(target)
    groups, size = [[]], 0
    for repo_id, members in repos.items():
        needed = sum(target.manifest.bytes for target in members)
        if private_bytes is not None and needed > private_bytes:
            raise Trouble(f"{repo_id} has {needed} bytes, more than private_bytes={private_bytes}: raise the limit.")
        if groups[-1] and private_bytes is not None and size + needed > private_bytes:
            groups.append([])
            size = 0
        groups[-1] += members
        size += needed
    return groups


def requests_of_a_push(target: Target) -> dict[str, int]:
    """Requests that a first publication of ``target`` needs, its place in a collection included; see ``rehearse``.

    API: ten for reading the state between steps, create, card check, file modes, upload permission, one check for each large
    file (its content goes to storage, which is not counted), commit, listing for the download, tag, visibility, collection
    item. Downloads: two for each file, .gitattributes included, but one for a large one, which storage sends; and the load looks for an adapter.
    """
    uploads = sum(path.endswith((".safetensors", ".png")) for path in target.manifest.files)
    return {"api": 19 + uploads, "resolve": 2 * (len(target.manifest.files) + 1) - uploads + 1}


def paced_seconds(targets: Iterable[Target], pace: Pace) -> float:
    """How long a first publication of all targets takes under the Hub's limits, transfers aside."""
    counts = [requests_of_a_push(target) for target in targets]
    return pace.seconds(**{kind: sum(count[kind] for count in counts) for kind in ("api", "resolve")})
