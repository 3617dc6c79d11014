"""The local Hub is one: the real client uploads, downloads and organises on it, by every transport; and its faults are real.

The client runs in a process of its own, without any network but its own loopback where the system allows that: what it
needs to know, it reads when it is imported.
"""

from __future__ import annotations

import doctest
import hashlib
import http.client
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from . import hub_faults, hub_store, hub_xet
from .hermetic import without_network
from .hub_faults import Fault
from .hub_routes import card_errors
from .hub_server import LocalHub, client_environment

ROOT = Path(__file__).parents[1]
MODES = {
    "one piece, by the CDN": {},
    "in parts": {"part_size": 100_000},
    "one origin": {"cdn": False},
    "xet": {"xet": True},
}

# Runs in a namespace of its own, with the server in the same process tree.
SERVE = """
import json, os, subprocess, sys
from pathlib import Path
from tests.hermetic import has_network, loopback_up
from tests.hub_server import LocalHub, client_environment
if not has_network():
    loopback_up()
folder, options, script = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
with LocalHub(**options) as hub:
    env = client_environment(hub.url, folder, xet=options.get("xet", False))
    if status := subprocess.run([sys.executable, "-c", script, str(folder)], env=env).returncode:
        sys.exit(status)
    puts = sum(entry["method"] == "PUT" and "/_lfs/" in entry["path"] for entry in hub.log)
    print(json.dumps({"cdn_tokens": hub.cdn_tokens, "puts": puts}))
"""

CLIENT = """
import sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

folder, api = Path(sys.argv[1]), HfApi()

def refused(status, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except HfHubHTTPError as error:
        assert error.response.status_code == status, (error.response.status_code, status)
    else:
        raise AssertionError(f"{function.__name__} should have been refused with {status}")

assert api.whoami()["orgs"][0]["name"] == "org"
try:
    api.model_info("org/one")
except RepositoryNotFoundError:
    pass
assert api.create_repo("org/one", private=True).repo_id == "org/one"
refused(409, api.create_repo, "org/one")
assert api.create_repo("org/one", exist_ok=True).repo_id == "org/one"
refused(403, api.create_repo, "stranger/one")
info = api.model_info("org/one", files_metadata=True)
assert info.private and [one.rfilename for one in info.siblings] == [".gitattributes"]

large = bytes(range(256)) * 2000
(folder / "model.safetensors").write_bytes(large)
def files():
    return [
        CommitOperationAdd("model.safetensors", folder / "model.safetensors"),
        CommitOperationAdd("README.md", b"---\\nlicense: mit\\n---\\nhello"),
        CommitOperationAdd("some/folder/x.txt", b"x"),
        CommitOperationAdd("empty.txt", b""),
    ]
first = api.create_commit("org/one", files(), commit_message="add", parent_commit=info.sha).oid
again = api.create_commit("org/one", files(), commit_message="add", parent_commit=first).oid
assert again == first and len(api.list_repo_commits("org/one")) == 2  # nothing changed: no commit
new = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("some/", is_folder=True)]
refused(412, api.create_commit, "org/one", new, commit_message="stale", parent_commit=info.sha)
new = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("some/", is_folder=True)]
second = api.create_commit("org/one", new, commit_message="change", parent_commit=first).oid
try:
    api.create_commit("org/one", [CommitOperationAdd("README.md", b"---\\n- a list\\n---\\n")], commit_message="bad card")
    raise AssertionError("a card without a mapping was taken")
except ValueError:
    pass

at_first = {entry.path for entry in api.list_repo_tree("org/one", recursive=True, revision=first)}
assert at_first == {".gitattributes", "README.md", "empty.txt", "model.safetensors", "some", "some/folder", "some/folder/x.txt"}
assert {entry.path for entry in api.list_repo_tree("org/one", "some", revision=first)} == {"some/folder"}
assert [entry.size for entry in api.get_paths_info("org/one", ["model.safetensors", "nowhere"])] == [len(large)]
local = snapshot_download("org/one", revision=first)
assert Path(local, "model.safetensors").read_bytes() == large and Path(local, "some/folder/x.txt").read_bytes() == b"x"
checked = api.verify_repo_checksums("org/one", revision=first)
assert checked.checked_count == 5 and not checked.mismatches and not checked.missing_paths and not checked.extra_paths

api.create_tag("org/one", tag="v1.0", revision=first)
refused(409, api.create_tag, "org/one", tag="v1.0", revision=second)
api.create_branch("org/one", branch="step/100", revision=first)
refs = api.list_repo_refs("org/one")
assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1.0", first)]
assert {branch.name: branch.target_commit for branch in refs.branches} == {"main": second, "step/100": first}
assert api.model_info("org/one", revision="step/100").sha == first
api.delete_branch("org/one", branch="step/100")
api.delete_tag("org/one", tag="v1.0")
try:
    api.model_info("org/one", revision="v1.0")
except RevisionNotFoundError:
    pass
stranger = HfApi(token=False)
refused(401, stranger.model_info, "org/one")
api.update_repo_settings("org/one", private=False)
assert stranger.model_info("org/one").private is False
refused(401, stranger.create_tag, "org/one", tag="theirs")
api.auth_check("org/one", write=True)
assert [model.id for model in api.list_models(author="org")] == ["org/one"]

slug = api.create_collection("A title", namespace="org", description="words").slug
assert [one.slug for one in api.list_collections(owner="org")] == [slug]
api.create_repo("org/two")
api.add_collection_item(slug, "org/one", "model", note="first")
api.add_collection_item(slug, "org/two", "model")
refused(409, api.add_collection_item, slug, "org/two", "model")
items = api.get_collection(slug).items
api.update_collection_item(slug, items[1].item_object_id, position=0, note="second")
assert [(one.item_id, one.note) for one in api.get_collection(slug).items] == [("org/two", "second"), ("org/one", "first")]
api.delete_collection_item(slug, items[0].item_object_id)
assert [one.item_id for one in api.get_collection(slug).items] == ["org/two"]
api.delete_collection(slug)
api.delete_repo("org/two")
refused(404, api.delete_repo, "org/two")
"""


@pytest.mark.parametrize("module", [hub_faults, hub_store], ids=lambda module: module.__name__)
def test_examples_in_the_documentation(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "xet" or hub_xet.available()])
def test_the_real_client(mode, tmp_path):
    command = without_network(sys.executable, "-c", SERVE, str(tmp_path), json.dumps(MODES[mode]), CLIENT)
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    # No token reaches the other origin; six parts of 100,000 bytes; by Xet nothing is put here at all.
    assert json.loads(process.stdout) == {"cdn_tokens": 0, "puts": {"in parts": 6, "xet": 0}.get(mode, 1)}


# ----------------------------------------------------------------------------------------------- faults, without a client


class Wire:
    """One connection to the hub, with a token."""

    def __init__(self, hub: LocalHub):
        self.connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=10)

    def __call__(self, method: str, path: str, body=None, token: str | None = "hf_test", **headers):
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        self.connection.request(method, path, content, headers)
        reply = self.connection.getresponse()
        return reply.status, reply.headers, reply.read()


@pytest.fixture
def hub():
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def wire(hub):
    return Wire(hub)


NEW = ("POST", "/api/repos/create", {"name": "one", "organization": "org", "visibility": "private"})


def with_file(hub: LocalHub, content: bytes = b"0123456789") -> str:
    repo = hub_store.Repo("org/one", private=False)
    hub.state.repos["org/one"] = repo
    repo.commit("main", {"a.txt": hub_store.Blob.regular(content)}, [], "add")
    return "/org/one/resolve/main/a.txt"


@pytest.mark.parametrize("kind, done", [("drop", False), ("hang", False), ("lose", True)])
def test_a_fault_without_an_answer(kind, done, hub, wire):
    hub.faults.reset([Fault(kind, at=1, seconds=0.2)])
    assert wire("GET", "/api/whoami-v2")[0] == 200
    start = time.monotonic()
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        wire(*NEW)
    assert (time.monotonic() - start > 0.2) == (kind == "hang")
    assert ("org/one" in hub.state.repos) == done
    assert wire("GET", "/api/whoami-v2")[0] == 200
    assert [entry["fault"] for entry in hub.log] == [None, kind, None]


def test_a_status_for_a_while(hub, wire):
    hub.faults.reset([Fault("status", at=0, times=2, status=429, headers={"RateLimit": '"api";r=0;t=7'})])
    assert [wire(*NEW)[0] for _ in range(3)] == [429, 429, 200]  # on one connection: bodies are read, errors included
    assert hub.faults.hit == 2


def test_bodies_that_are_cut_or_wrong(hub, wire):
    path = with_file(hub)
    hub.faults.reset([Fault("truncate", at=0), Fault("corrupt", at=1)])
    with pytest.raises(http.client.IncompleteRead) as cut:
        wire("GET", path)
    assert cut.value.partial == b"01234"
    wire = Wire(hub)
    status, headers, body = wire("GET", path)
    assert status == 200 and len(body) == 10 and sum(a != b for a, b in zip(body, b"0123456789")) == 1
    assert headers["ETag"] == f'"{hub_store.git_sha1(b"0123456789")}"'
    assert wire("GET", path)[2] == b"0123456789"


@pytest.mark.parametrize("kind, done", [("signal-before", False), ("signal-after", True)])
def test_a_request_that_is_held(kind, done, hub):
    hub.faults.reset([Fault(kind, at=0)])

    def send():
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            Wire(hub)(*NEW)

    client = threading.Thread(target=send)
    client.start()
    assert hub.faults.signalled.wait(5)
    assert ("org/one" in hub.state.repos) == done
    hub.faults.reset()
    client.join(5)
    assert not client.is_alive()


def test_an_unknown_fault_is_refused():
    with pytest.raises(ValueError, match="kind='explode'.*drop"):
        Fault("explode", at=0)


def test_ranges(hub, wire):
    path = with_file(hub)
    assert wire("GET", path, Range="bytes=3-5")[2] == b"345"
    status, headers, body = wire("GET", path, Range="bytes=7-")
    assert (status, headers["Content-Range"], body) == (206, "bytes 7-9/10", b"789")
    assert wire("GET", path, Range="bytes=10-")[0] == 416
    status, headers, body = wire("HEAD", path)
    assert (status, headers["Content-Length"], body) == (200, "10", b"")


def test_what_is_not_there_says_so_in_the_header(hub, wire):
    with_file(hub)
    status, headers, _ = wire("GET", "/org/one/resolve/main/b.txt")
    assert (status, headers["X-Error-Code"]) == (404, "EntryNotFound") and len(headers["X-Repo-Commit"]) == 40
    assert wire("GET", "/api/models/org/one/revision/v9")[1]["X-Error-Code"] == "RevisionNotFound"
    hub.state.repos["org/one"].private = True
    for token, expected in ((None, 401), ("hf_test", 200)):
        status, headers, _ = wire("GET", "/api/models/org/one", token=token)
        assert status == expected and (headers["X-Error-Code"] == "RepoNotFound") == (expected == 401)
    assert wire("GET", "/api/models/org/one", token="hf_wrong")[0] == 401


def test_uploads_are_what_they_say(hub, wire):
    wire(*NEW)
    content = b"tensor"
    oid = hashlib.sha256(content).hexdigest()
    line = {"key": "lfsFile", "value": {"path": "m.safetensors", "algo": "sha256", "oid": oid, "size": 6}}
    head = {"key": "header", "value": {"summary": "add", "description": ""}}
    commit = "\n".join(json.dumps(one) for one in (head, line)).encode()
    assert wire("POST", "/api/models/org/one/commit/main", commit)[0] == 400  # nothing was uploaded
    assert wire("PUT", f"/_lfs/{oid}", b"tensoR")[0] == 400
    assert wire("PUT", f"/_lfs/{oid}", content)[0] == 200
    assert wire("POST", "/api/models/org/one/commit/main", commit)[0] == 200
    outside = {"key": "file", "value": {"path": "../x", "content": "", "encoding": "base64"}}
    body = "\n".join(json.dumps(one) for one in (head, outside)).encode()
    assert wire("POST", "/api/models/org/one/commit/main", body)[0] == 400


def test_a_chunked_body(hub, wire):
    wire.connection.request(
        "POST", NEW[1], iter([b'{"name": "one", ', b'"organization": "org"}']), {"Authorization": "Bearer hf_test"}, encode_chunked=True
    )  # fmt: skip
    reply = wire.connection.getresponse()
    assert reply.status == 200 and json.loads(reply.read())["name"] == "org/one"
    assert wire("GET", "/api/whoami-v2")[0] == 200


def test_many_files_come_in_pages(hub, wire):
    with_file(hub)
    many = {f"file{i:04d}.txt": hub_store.Blob.regular(b"") for i in range(1500)}
    hub.state.repos["org/one"].commit("main", many, [], "many")
    _, headers, body = wire("GET", "/api/models/org/one/tree/main?recursive=true")
    following = headers["Link"].split(">")[0].removeprefix(f"<{hub.url}")
    status, headers, rest = wire("GET", following)
    assert len(json.loads(body)) == 1000 and len(json.loads(rest)) == 502 and headers["Link"] is None


def test_the_card_check():
    def card(metadata: str) -> list[str]:
        return card_errors(f"---\n{metadata}\n---\ntext")

    assert card("license: mit\ndatasets: [a/b]") == [] == card_errors("no metadata")
    assert card("datasets: [1]") and card("- a") and card("a: [") and card("license: {a: 1}")
    result = "model-index:\n- name: m\n  results:\n  - task: {type: t}\n    dataset: {type: d, name: n}\n    metrics:\n"
    assert card(result + "    - {type: acc, value: 0.5}") == []
    assert card(result + "    - {type: acc, value: .nan}") and card(result + "    - {value: 0.5}")


def test_started_by_hand(tmp_path):
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.hub_server", "--quiet"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        line = server.stdout.readline()
        url = line.split("HF_ENDPOINT=")[1].split()[0]
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
        connection.request("POST", "/_test/faults", json.dumps([{"kind": "status", "at": 0, "status": 503}]))
        connection.getresponse().read()
        connection.request("GET", "/api/models")
        assert connection.getresponse().status == 503
    finally:
        server.kill()
        server.wait()
    assert client_environment(url, tmp_path)["HF_ENDPOINT"] == url
