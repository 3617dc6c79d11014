"""What the local Hub answers: one function for each request that huggingface_hub makes, by method and path.

``@route`` registers a function; it takes the hub, the request and the named parts of the path, and returns a Reply or
raises Refused. A path is matched as it came, still quoted, so that %2F within a revision can be told from a slash.
"""

from __future__ import annotations

import base64
import json
import math
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote

import yaml

from .hub_faults import Fault
from .hub_store import Blob, Refused, Repo, is_lfs

if TYPE_CHECKING:
    from .hub_server import LocalHub

TREE_PAGE = 1000
PREFIXES = {"": "models", "datasets/": "datasets", "spaces/": "spaces"}


@dataclass
class Request:
    """A request as it came; the path is still quoted, so that %2F can be told from a slash."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    user: str | None = None

    def json(self) -> dict:
        try:
            return json.loads(self.body or b"{}")
        except ValueError:
            raise Refused(400, "The body is not JSON") from None


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, content, status: int = 200, **headers) -> Reply:
        return cls(json.dumps(content).encode(), status, {"Content-Type": "application/json", **headers})


ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(method: str, pattern: str):
    """Register a method of LocalHub. ID in the pattern is owner/name, REV one quoted segment, T the repo's type."""
    names = {"ID": r"(?P<repo>[^/]+/[^/]+)", "REV": r"(?P<revision>[^/]+)", "T": r"(?P<kind>models|datasets|spaces)"}
    pattern = re.sub(r"\b(ID|REV|T)\b", lambda match: names[match[0]], pattern)

    def register(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


# ---------------------------------------------------------------------------------------------------- repositories


@route("GET", "/api/whoami-v2")
def whoami(hub: LocalHub, request: Request):
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    orgs = [{"name": name, "type": "org", "roleInOrg": "write"} for name in hub.state.users[request.user]]
    token = {"displayName": "test", "role": "write", "createdAt": "2025-01-01T00:00:00.000Z"}
    auth = {"type": "access_token", "accessToken": token}
    return Reply.of({"type": "user", "name": request.user, "fullname": request.user, "orgs": orgs, "auth": auth})


@route("POST", "/api/repos/create")
def create(hub: LocalHub, request: Request):
    wanted = request.json()
    name = f"{wanted.get('organization') or request.user}/{wanted['name']}"
    kind = f"{wanted.get('type', 'model')}s"
    if not hub.state.may_write(request.user, name.split("/")[0]):
        raise Refused(403 if request.user else 401, f"You may not create {name}")
    url = f"{hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
    if name in hub.state.repos:
        raise Refused(409, "You already created this model repo", extra={"url": url})
    hub.state.repos[name] = Repo(name, wanted.get("visibility") == "private", kind)
    return Reply.of({"url": url, "name": name, "id": secrets.token_hex(12)})


@route("DELETE", "/api/repos/delete")
def delete(hub: LocalHub, request: Request):
    wanted = request.json()
    name = f"{wanted.get('organization') or request.user}/{wanted['name']}"
    hub.state.repo(name, request.user, write=True)
    del hub.state.repos[name]
    return Reply.of({})


@route("PUT", "/api/T/ID/settings")
def settings(hub: LocalHub, request: Request, kind, repo):
    one = hub.state.repo(repo, request.user, write=True)
    if "visibility" in request.json():
        one.private = request.json()["visibility"] == "private"
    return Reply.of({"private": one.private})


@route("GET", "/api/T/ID/auth-check(/write)?")
def auth_check(hub: LocalHub, request: Request, kind, repo):
    hub.state.repo(repo, request.user, write=request.path.endswith("/write"))
    return Reply.of({})


@route("GET", "/api/T/ID(/revision/REV)?")
def info(hub: LocalHub, request: Request, kind, repo, revision):
    one = hub.state.repo(repo, request.user)
    commit = one.commits[one.resolve(unquote(revision or "main"))]
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    if "blobs" in request.query:
        for entry in siblings:
            blob = commit.files[entry["rfilename"]]
            entry |= {"size": blob.size, "blobId": blob.oid, **blob.lfs_json("sha256")}
    return Reply.of(
        {
            **{"id": repo, "modelId": repo, "sha": commit.id, "author": repo.split("/")[0]},
            **{"private": one.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []},
            **{"lastModified": commit.date, "createdAt": one.created, "siblings": siblings},
        }
    )


@route("GET", "/api/models")
def list_models(hub: LocalHub, request: Request):
    author = request.query.get("author", [""])[0]
    found = [
        {"id": one.id, "private": one.private, "tags": [], "likes": 0, "downloads": 0, "createdAt": one.created}
        for one in hub.state.repos.values()
        if one.kind == "models" and one.id.startswith(author)
        if not one.private or hub.state.may_write(request.user, one.id.split("/")[0])
    ]
    return Reply.of(found)


@route("GET", "/api/T/ID/tree/REV(/(?P<folder>.+))?")
def tree(hub: LocalHub, request: Request, kind, repo, revision, folder):
    one = hub.state.repo(repo, request.user)
    files = one.tree(unquote(revision))
    folder = f"{unquote(folder)}/" if folder else ""
    recursive = request.query.get("recursive", [""])[0].lower() in ("true", "1")
    entries = {}
    for path in sorted(files):
        if path.startswith(folder):
            for index in [i for i, letter in enumerate(path) if letter == "/" and i >= len(folder)]:
                entries[path[:index]] = {"type": "directory", "path": path[:index], "oid": "0" * 40, "size": 0}
            entries[path] = _file_entry(path, files[path])
    if folder and not entries:
        raise Refused(404, f"{folder[:-1]} does not exist on {unquote(revision)}", "EntryNotFound")
    shown = [entry for path, entry in entries.items() if recursive or "/" not in path[len(folder) :]]
    start = int(request.query.get("cursor", ["0"])[0])
    headers = {}
    if start + TREE_PAGE < len(shown):
        headers["Link"] = f'<{hub.url}{request.path}?recursive={recursive}&cursor={start + TREE_PAGE}>; rel="next"'
    return Reply.of(shown[start : start + TREE_PAGE], **headers)


@route("POST", "/api/T/ID/paths-info/REV")
def paths_info(hub: LocalHub, request: Request, kind, repo, revision):
    files = hub.state.repo(repo, request.user).tree(unquote(revision))
    paths = parse_qs(request.body.decode()).get("paths", [])
    return Reply.of([_file_entry(path, files[path]) for path in paths if path in files])


@route("GET", "/api/T/ID/refs")
def refs(hub: LocalHub, request: Request, kind, repo):
    one = hub.state.repo(repo, request.user)

    def shown(table: dict[str, str], folder: str) -> list[dict]:
        return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c} for n, c in table.items()]

    return Reply.of(
        {
            "branches": shown(one.branches, "heads"),
            "tags": shown(one.tags, "tags"),
            "converts": [],
            "pullRequests": [],
        }
    )


@route("GET", "/api/T/ID/commits/REV")
def commits(hub: LocalHub, request: Request, kind, repo, revision):
    history = hub.state.repo(repo, request.user).history(unquote(revision))
    fields = ("id", "title", "message", "date")
    return Reply.of([{**{name: getattr(c, name) for name in fields}, "authors": [{"user": "tester"}]} for c in history])


@route("POST", "/api/T/ID/branch/REV")
def create_branch(hub: LocalHub, request: Request, kind, repo, revision):
    one = hub.state.repo(repo, request.user, write=True)
    one.add_ref(one.branches, unquote(revision), request.json().get("startingPoint", "main"))
    return Reply.of({})


@route("DELETE", "/api/T/ID/branch/REV")
def delete_branch(hub: LocalHub, request: Request, kind, repo, revision):
    one = hub.state.repo(repo, request.user, write=True)
    one.delete_ref(one.branches, unquote(revision))
    return Reply.of({})


@route("POST", "/api/T/ID/tag/REV")
def create_tag(hub: LocalHub, request: Request, kind, repo, revision):
    one = hub.state.repo(repo, request.user, write=True)
    one.add_ref(one.tags, request.json()["tag"], unquote(revision))
    return Reply.of({})


@route("DELETE", "/api/T/ID/tag/REV")
def delete_tag(hub: LocalHub, request: Request, kind, repo, revision):
    one = hub.state.repo(repo, request.user, write=True)
    one.delete_ref(one.tags, unquote(revision))
    return Reply.of({})


# -------------------------------------------------------------------------------------------------------------- uploads


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: LocalHub, request: Request):
    errors = card_errors(request.json().get("content", ""))
    body = {"errors": [{"message": message} for message in errors], "warnings": []}
    return Reply.of(body, 400 if errors else 200)


@route("POST", "/api/T/ID/preupload/REV")
def preupload(hub: LocalHub, request: Request, kind, repo, revision):
    files = hub.state.repo(repo, request.user, write=True).tree(unquote(revision))
    reply = []
    for one in request.json()["files"]:
        present = files.get(one["path"])
        mode = "lfs" if is_lfs(one["path"], one["size"]) else "regular"
        reply.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False})
        if present:
            reply[-1]["oid"] = present.etag
    return Reply.of({"files": reply})


@route("POST", "/(?P<prefix>datasets/|spaces/|)ID.git/info/lfs/objects/batch")
def lfs_batch(hub: LocalHub, request: Request, prefix, repo):
    hub.state.repo(repo, request.user, write=True)
    objects = []
    for one in request.json()["objects"]:
        oid, size = one["oid"], one["size"]
        objects.append({"oid": oid, "size": size})
        if hub.state.objects.has(oid):
            continue
        target = f"{hub.url}/_lfs/{oid}"
        upload: dict = {"href": target}
        if size > hub.part_size:
            count = math.ceil(size / hub.part_size)
            parts = {str(number): f"{target}/{number}" for number in range(1, count + 1)}
            upload = {"href": f"{target}/complete", "header": {"chunk_size": str(hub.part_size), **parts}}
        verify = {"href": f"{hub.url}/{prefix}{repo}.git/info/lfs/verify"}
        objects[-1]["actions"] = {"upload": upload, "verify": verify}
    return Reply.of({"transfer": "multipart", "objects": objects})


@route("PUT", "/_lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(hub: LocalHub, request: Request, oid):
    hub.state.objects.put(oid, request.body)
    return Reply()


@route("PUT", "/_lfs/(?P<oid>[0-9a-f]{64})/(?P<number>[0-9]+)")
def lfs_put_part(hub: LocalHub, request: Request, oid, number):
    hub.parts.setdefault(oid, {})[int(number)] = request.body
    return Reply(headers={"ETag": f'"{secrets.token_hex(16)}"'})


@route("POST", "/_lfs/(?P<oid>[0-9a-f]{64})/complete")
def lfs_complete(hub: LocalHub, request: Request, oid):
    parts, named = hub.parts.get(oid, {}), [part["partNumber"] for part in request.json()["parts"]]
    if any(number not in parts for number in named):
        raise Refused(400, "A part is missing")
    hub.state.objects.put(oid, b"".join(parts[number] for number in named))
    hub.parts.pop(oid)
    return Reply()


@route("POST", "/(?P<prefix>datasets/|spaces/|)ID.git/info/lfs/verify")
def lfs_verify(hub: LocalHub, request: Request, prefix, repo):
    oid = request.json()["oid"]
    if not hub.state.objects.has(oid) or hub.state.objects.path(oid).stat().st_size != request.json()["size"]:
        raise Refused(404, f"Object {oid} is not stored")
    return Reply()


@route("GET", "/api/T/ID/xet-(?P<action>read|write)-token/REV")
def xet_token(hub: LocalHub, request: Request, kind, repo, action, revision):
    hub.state.repo(repo, request.user, write=action == "write")
    if hub.xet is None:
        raise Refused(404, "Xet is off")
    writer = request.query.get("writer", [None])[0]
    folder = hub.xet.new_writer() if action == "write" else hub.xet.new_reader(writer)
    token = {"casUrl": f"local://{folder}", "accessToken": "xet", "exp": int(time.time()) + 3600}
    headers = {
        "X-Xet-Cas-Url": token["casUrl"],
        "X-Xet-Access-Token": token["accessToken"],
        "X-Xet-Token-Expiration": str(token["exp"]),
    }
    return Reply.of(token, **headers)


@route("POST", "/api/T/ID/commit/REV")
def commit(hub: LocalHub, request: Request, kind, repo, revision):
    one = hub.state.repo(repo, request.user, write=True)
    header, additions, deletions = {}, {}, []
    for line in request.body.splitlines():
        key, value = (entry := json.loads(line))["key"], entry["value"]
        if key == "header":
            header = value
        elif key == "file":
            additions[value["path"]] = Blob.regular(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            additions[value["path"]] = Blob.lfs(value["oid"], _stored_size(hub, value["oid"]))
        elif key in ("deletedFile", "deletedFolder"):
            deletions.append(value["path"].rstrip("/") + ("/" if key == "deletedFolder" else ""))
        else:
            raise Refused(400, f"Unknown operation {key}")
    wrong = [path for path in additions if path.startswith(("/", ".git/")) or ".." in path.split("/")]
    if wrong:
        raise Refused(400, f"Paths are not allowed: {wrong}")
    name = one.commit(
        unquote(revision),
        additions,
        deletions,
        header["summary"],
        header["description"],
        header.get("parentCommit"),
    )
    return Reply.of({"success": True, "commitOid": name, "commitUrl": f"{hub.url}/{repo}/commit/{name}"})


def _stored_size(hub: LocalHub, oid: str) -> int:
    """Size of an object that an upload has left, by LFS or by Xet."""
    if not hub.state.objects.has(oid) and hub.xet is not None:
        hub.state.objects.put(oid, hub.xet.read(oid))
    if not hub.state.objects.has(oid):
        raise Refused(400, f"Object {oid} was not uploaded")
    return hub.state.objects.path(oid).stat().st_size


# ------------------------------------------------------------------------------------------------------------ downloads


@route("HEAD", "/(?P<prefix>datasets/|spaces/|)ID/resolve/REV/(?P<path>.+)")
@route("GET", "/(?P<prefix>datasets/|spaces/|)ID/resolve/REV/(?P<path>.+)")
def resolve(hub: LocalHub, request: Request, prefix, repo, revision, path):
    one = hub.state.repo(repo, request.user)
    commit = one.commits[one.resolve(unquote(revision))]
    headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    blob = commit.files.get(unquote(path))
    if blob is None:
        raise Refused(404, "Entry not found", "EntryNotFound", headers=headers)
    headers["ETag"] = f'"{blob.etag}"'
    if blob.sha256 and hub.xet is not None and (known := hub.xet.find(blob.sha256)):
        writer, xet_hash = known
        token_url = f"{hub.url}/api/{PREFIXES[prefix]}/{repo}/xet-read-token/{commit.id}?writer={writer}"
        headers |= {"X-Xet-Hash": xet_hash, "Link": f'<{token_url}>; rel="xet-auth"'}
        headers |= {"X-Linked-Size": str(blob.size)}
    elif blob.sha256 and hub.cdn:
        location = f"{hub.cdn_url}/{blob.sha256}"
        linked = {"X-Linked-Etag": headers.pop("ETag"), "X-Linked-Size": str(blob.size), "Location": location}
        return Reply(b"", 302, {**headers, **linked})
    return content(request, hub.state.objects.read(blob), headers)


def content(request: Request, content: bytes, headers: dict[str, str]) -> Reply:
    """A whole file or the range that is asked for."""
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
        start, stop = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1) + 1
        if start >= len(content):
            return Reply(b"", 416, {"Content-Range": f"bytes */{len(content)}"})
        span = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        return Reply(content[start:stop], 206, {**headers, **span})
    return Reply(content, 200, {"Content-Type": "application/octet-stream", **headers})


# --------------------------------------------------------------------------------------------- what a test asks by HTTP


@route("GET", "/_test/log")
def test_log(hub: LocalHub, request: Request):
    return Reply.of(hub.log)


@route("POST", "/_test/reset")
def test_reset(hub: LocalHub, request: Request):
    hub.reset()
    return Reply.of({})


@route("POST", "/_test/faults")
def test_faults(hub: LocalHub, request: Request):
    hub.faults.reset([Fault(**one) for one in request.json()])
    return Reply.of({})


@route("HEAD", "/(?P<oid>[0-9a-f]{64})")
@route("GET", "/(?P<oid>[0-9a-f]{64})")
def cdn_object(hub: LocalHub, request: Request, oid: str) -> Reply:
    return content(request, hub.state.objects.path(oid).read_bytes(), {"ETag": f'"{oid}"'})


def _file_entry(path: str, blob: Blob) -> dict:
    return {"type": "file", "path": path, "size": blob.size, "oid": blob.oid, **blob.lfs_json("oid")}


def card_errors(content: str) -> list[str]:
    """What the Hub rejects in a README's metadata: no mapping, or wrong shapes of the fields that it is strict about."""
    match = re.match(r"---\n(.*?)\n---(\n|$)", content, re.DOTALL)
    if not match:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    errors = []
    if "license" in data and not isinstance(data["license"], (str, list)):
        errors.append('"license" must be a string')
    datasets = data.get("datasets", [])
    if not isinstance(datasets, (str, list)) or not all(isinstance(name, str) for name in datasets):
        errors.append('"datasets" must be a list of strings')
    for model in data.get("model-index") or []:
        for one in model.get("results", []):
            for needed in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not one.get(needed[0], {}).get(needed[1]):
                    errors.append(f'"model-index" lacks {".".join(needed)}')
            for number in one.get("metrics", []):
                value = number.get("value")
                if "type" not in number or not (isinstance(value, (int, float)) and math.isfinite(value)):
                    errors.append('"model-index" has a metric without type or finite value')
    return errors
