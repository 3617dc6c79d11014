"""Publication: interrupted, repeated, raced, given bad input or a hostile Hub; it ends in the right state or says why not.

The real publisher and the real client against the local Hub, in processes forked from ready interpreters (``fault_sweep``).
"""

from __future__ import annotations

import doctest
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from upload import collection, plan, remote
from upload.manifest import File, Manifest, RemoteFile, difference, read_manifest, write_sums
from upload.plan import State, Step, Target, next_step, requests_of_a_push, waves
from upload.remote import LIMITS, WINDOW, Pace, Transient, Trouble, persist, redact, retry_after

from .end_to_end import CELLS, bundles
from .fault_sweep import PUBLISHER as PUBLISHER_SETUP
from .fault_sweep import TITLE, TOKEN, Harness, Zygote, changed_bundle, file_of, is_download, sweep, tasks, wrong_end
from .hermetic import without_network
from .hub_server import client_environment
from .hub_store import Blob, Repo, git_sha1

ROOT = Path(__file__).parents[1]
CELL = "tiny-HGRN-pure"
REPO = f"org/{CELL}"


@pytest.mark.parametrize("module", [collection, plan, remote], ids=lambda module: module.__name__)
def test_examples_in_the_documentation(module):
    assert doctest.testmod(module).failed == 0


def test_from_checkpoints_to_a_stranger(tmp_path):
    """Six checkpoints; push, push again, load by name where the package is not installed; without any network."""
    command = without_network(sys.executable, "-m", "tests.end_to_end", str(tmp_path / "run"))
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])
    names = [f"org/{cell}" for cell in CELLS]
    assert found["first"] == 0, found["output"]
    assert found["public"] == names and all(found["tags"]) and found["commits"] == [2] * 6 and not found["violations"]
    (one,) = found["collections"]
    assert (one["title"], one["description"]) == (TITLE, "Six of a test.")
    assert [item for item, _ in one["items"]] == names and all(note for _, note in one["items"])
    assert found["second"] == 0 and found["second_writes"] == [] and found["second_requests"] == 1 + 6 * 2 + 2
    right = {"code": "transformers_modules", "logits": True, "ids": True, "text": True}
    assert found["stranger"] == dict.fromkeys(names, right)
    assert found["cdn_tokens"] == 0 and found["leaks"] == []


# -------------------------------------------------------------------------------------------------- against the local Hub


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    with Harness(tmp_path_factory.mktemp("hub")) as harness:
        harness.made = bundles(tmp_path_factory.mktemp("made"), [CELL], harness)
        harness.empty = harness.snapshot()
        harness.restore(harness.empty)
        assert harness.push(harness.made, "v1.0") == 0, harness.output
        harness.requests = [(entry["method"], entry["path"]) for entry in harness.hub.log]
        harness.published = harness.snapshot()
        yield harness


@pytest.fixture
def fresh(harness):
    """An empty hub; afterwards nothing unverified was public, and the token is nowhere."""
    harness.restore(harness.empty)
    yield harness
    assert harness.hub.violations == []
    assert harness.leaks() == []


@pytest.fixture
def published(fresh):
    fresh.restore(fresh.published)
    return fresh


@pytest.fixture
def changed(harness, tmp_path):
    return changed_bundle(harness.made / CELL, tmp_path / "changed")


def test_a_push_takes_as_many_requests_as_the_plan_says(harness):
    target = Target(REPO, read_manifest(harness.made / CELL), "v1.0")
    count = requests_of_a_push(target)
    downloads = sum("/resolve/" in path for _, path in harness.requests)
    api = sum(not is_download(path) and "/_lfs/" not in path for _, path in harness.requests)
    assert downloads == count["resolve"] and api == count["api"] + 1 + 3  # whoami; collection: find, make, read again


def test_interrupted_at_every_kind_of_write(fresh, capsys):
    """A sample of ``python -m tests.fault_sweep``, whose whole result is in upload/results/faults.json."""
    writes = [
        *("/api/repos/create", "/commit/main", "/_lfs/", "/tag/", "/settings", "/api/collections", "/items"),
    ]
    chosen = [
        next(i for i, (method, path) in enumerate(fresh.requests) if method in ("POST", "PUT") and part in path)
        for part in writes
    ]
    records = [
        {**fresh.interrupt(fresh.made, "v1.0", kind, index), "wrong": wrong_end(fresh, fresh.empty, fresh.made, "v1.0")}
        for index in chosen
        for kind in ("kill-after", "lose")
        if fresh.restore(fresh.empty) is None
    ]
    download = next(i for i, (method, path) in enumerate(fresh.requests) if method == "GET" and is_download(path))
    for kind, index in (
        ("kill-before", 1),
        ("hang", chosen[1]),
        ("busy", 0),
        ("error", chosen[0]),
        ("truncate", download),
    ):
        fresh.restore(fresh.empty)
        records.append(fresh.interrupt(fresh.made, "v1.0", kind, index))
        records[-1]["wrong"] = wrong_end(fresh, fresh.empty, fresh.made, "v1.0")
    with capsys.disabled():
        print(f" {len(records)} faults tried", end="")
    assert [record for record in records if record["wrong"] or record["second"] or not record["hit"]] == []
    assert all(record["first"] == -9 for record in records if record["kind"].startswith("kill"))
    assert all(record["first"] == 0 for record in records if record["kind"] in ("lose", "hang", "busy", "error"))


def test_every_corrupted_download_is_found(fresh):
    corrupt = [index for index, kind in tasks(fresh.requests) if kind == "corrupt"]
    assert len(corrupt) == len(read_manifest(fresh.made / CELL).files)
    for index in corrupt[:: len(corrupt) // 4]:
        fresh.restore(fresh.empty)
        record = fresh.interrupt(fresh.made, "v1.0", "corrupt", index, file_of(fresh.requests[index][1]))
        assert (record["found"], record["second"]) == (True, 0), record


def test_the_sweep_sees_what_is_wrong(fresh, monkeypatch):
    """The checks behind the counts can fail: a publisher that makes two commits, or goes public too early, is caught."""
    assert fresh.push(fresh.made, "v1.0") == 0
    assert wrong_end(fresh, fresh.empty, fresh.made, "v1.0") == []
    repo = fresh.hub.state.repos[REPO]
    repo.commit("main", {"README.md": Blob.regular(b"another")}, [], "more")
    fresh.push(fresh.made, "v1.0", command="status")  # any request: the hub looks after each
    assert any("not verified" in text for text in fresh.hub.violations)
    wrong = " ".join(wrong_end(fresh, fresh.empty, fresh.made, "v1.0"))
    assert "tree differs" in wrong and "2 commits" in wrong and "head" in wrong
    fresh.hub.violations.clear()
    assert {kind for _, kind in tasks(fresh.requests)} >= {"kill-before", "kill-after", "lose", "corrupt"}
    with pytest.raises(RuntimeError, match="without a fault"):
        sweep(fresh, fresh.published, fresh.made, "v2.0", every=1000)  # nothing to commit under this name


def test_a_new_card_is_one_commit_that_is_verified_before_main_moves(published, changed):
    repo = published.hub.state.repos[REPO]
    before, old = repo.head(), repo.tree("main")
    assert published.push(changed, "v1.0") == 1 and "choose another --release" in published.output
    assert published.push(changed, "v1.1") == 0, published.output
    repo = published.hub.state.repos[REPO]
    assert [commit.id for commit in repo.history("main")][1] == before
    assert sorted(p for p, blob in repo.tree("main").items() if old[p] != blob) == ["README.md", "SHA256SUMS"]
    assert list(repo.branches) == ["main"] and repo.tags["v1.1"] == repo.head() and repo.tags["v1.0"] == before
    assert not any(entry["path"].endswith("/settings") for entry in published.hub.log)  # never hidden


def test_interrupted_while_a_public_repository_changes(published, changed):
    published.restore(published.published)
    assert published.push(changed, "v1.1") == 0
    requests = [(entry["method"], entry["path"]) for entry in published.hub.log]
    for part in ("/branch/staging-main", "/commit/staging-main", "/commit/main", "/tag/"):
        index = next(i for i, (method, path) in enumerate(requests) if method == "POST" and part in path)
        published.restore(published.published)
        assert published.interrupt(changed, "v1.1", "kill-after", index)["second"] == 0
        assert wrong_end(published, published.published, changed, "v1.1") == []


def test_a_bit_that_flips_in_storage_is_found_before_the_tag(fresh):
    commit = next(i for i, (_, path) in enumerate(fresh.requests) if "/commit/main" in path)
    fresh.interrupt(fresh.made, "v1.0", "kill-after", commit)
    fresh.restore(fresh.empty)
    fresh.hub.faults.reset()
    assert fresh.push(fresh.made, "v1.0", "--keep-private") == 0
    repo = fresh.hub.state.repos[REPO]
    repo.tags.clear()
    fresh.hub.state.objects.flip_bit(repo.tree("main")["model.safetensors"].sha256)
    assert fresh.push(fresh.made, "v1.0") == 1 and "model.safetensors" in fresh.output
    assert repo.private and not repo.tags
    assert fresh.hub.state.collections == {}
    fresh.hub.state.objects.flip_bit(repo.tree("main")["model.safetensors"].sha256)


def test_other_numbers_are_not_tagged(fresh, tmp_path):
    """Whole and well formed, but not the model whose logits are on record."""
    folder = tmp_path / "wrong"
    shutil.copytree(fresh.made / CELL, folder / CELL)
    path = folder / CELL / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x40  # an exponent bit of the last weight
    path.write_bytes(content)
    write_sums(folder / CELL)
    assert fresh.push(folder, "v1.0") == 1 and "logits" in fresh.output
    assert fresh.hub.state.repos[REPO].private and not fresh.hub.state.repos[REPO].tags


def test_a_missing_or_extra_file_is_found(published):
    repo = published.hub.state.repos[REPO]
    assert (
        published.push(published.made, "v1.0", "--load", command="verify") == 0
        and "logits off by 0" in published.output
    )
    for additions, deletions in (({"extra.md": Blob.regular(b"")}, []), ({}, ["LICENSE"])):
        repo = published.hub.state.repos[REPO]
        repo.commit("main", additions, deletions, "by hand")
        assert (
            published.push(published.made, "v1.0", command="verify") == 1
            and "choose another --release" in published.output
        )
        published.restore(published.published)
    published.hub.violations.clear()


def test_somebody_elses_repository_is_left_alone(fresh):
    theirs = fresh.hub.state.repos[REPO] = Repo(REPO, private=True)
    theirs.commit("main", {"x.bin": Blob.regular(b"x")}, [], "theirs")
    head = theirs.head()
    assert fresh.push(fresh.made, "v1.0") == 1 and "--adopt" in fresh.output
    assert fresh.hub.state.repos[REPO].head() == head
    assert fresh.push(fresh.made, "v1.0", "--adopt") == 0, fresh.output
    assert "x.bin" not in fresh.hub.state.repos[REPO].tree("main")


def test_an_empty_public_repository_is_hidden_first(fresh):
    fresh.hub.state.repos[REPO] = Repo(REPO, private=False)
    assert fresh.push(fresh.made, "v1.0") == 0, fresh.output
    assert wrong_end(fresh, fresh.empty, fresh.made, "v1.0") == []


def test_a_tag_at_another_commit_is_not_moved(fresh):
    assert fresh.push(fresh.made, "v1.0", "--keep-private") == 0
    repo = fresh.hub.state.repos[REPO]
    first = repo.history("main")[-1].id
    repo.tags["v1.0"] = first
    assert fresh.push(fresh.made, "v1.0") == 1 and f"tag v1.0 is at {first[:10]}" in fresh.output
    assert repo.private and repo.tags == {"v1.0": first}


def test_training_steps_are_branches(fresh, tmp_path):
    folder = changed_bundle(fresh.made / CELL, tmp_path / "both")
    (folder / CELL).rename(folder / f"{CELL}@step-100")
    shutil.copytree(fresh.made / CELL, folder / CELL)
    assert fresh.push(folder, "v1.0") == 0, fresh.output
    repo = fresh.hub.state.repos[REPO]
    assert sorted(repo.branches) == ["main", "step-100"] and not repo.private
    assert repo.tags == {"v1.0": repo.head(), "step-100-v1.0": repo.head("step-100")}
    assert repo.tree("main") != repo.tree("step-100")
    fresh.hub.log.clear()
    assert fresh.push(folder, "v1.0") == 0
    assert all(entry["method"] == "GET" for entry in fresh.hub.log)


def test_two_publishers_at_once(fresh):
    env = {**client_environment(fresh.hub.url, fresh.folder, TOKEN), "CLEAN_SOCKET": f"{fresh.folder}/clean.sock"}
    other = Zygote(PUBLISHER_SETUP, env)
    other.wait_until_ready()
    argv = ["push", str(fresh.made), "--namespace", "org", "--release", "v1.0"]
    ends = []
    racer = threading.Thread(target=lambda: ends.append(other.run(argv=argv, out=str(fresh.folder / "other.out"))))
    racer.start()
    ends.append(fresh.push(fresh.made, "v1.0"))
    racer.join()
    other.close()
    assert ends == [0, 0], fresh.output + (fresh.folder / "other.out").read_text()
    assert wrong_end(fresh, fresh.empty, fresh.made, "v1.0") == []


def test_the_collection_is_put_in_order_and_never_made_twice(published):
    (one,) = published.hub.state.collections.values()
    one.items.insert(0, {"_id": "ab", "id": "org/other", "type": "model", "note": None})
    one.items[1]["note"] = "old"
    assert published.push(published.made, "v1.0") == 0, published.output
    (one,) = published.hub.state.collections.values()
    assert [item["id"] for item in one.items] == [REPO, "org/other"] and one.items[0]["note"].startswith("hgrn")
    published.hub.state.create_collection(TITLE, "org", False, None)
    assert published.push(published.made, "v1.0") == 2 and "2 collections called" in published.output


def test_what_a_user_reads(fresh):
    assert fresh.push(fresh.made, "v1.0", command="plan") == 0
    assert f"{REPO}  absent   next: create" in fresh.output and "bytes to send in 1 wave(s)" in fresh.output
    assert fresh.push(fresh.made, "v1.0", "--json", command="status") == 0
    (row,) = json.loads(fresh.output)
    assert row["next"] == "create" and len(row["add"]) == len(read_manifest(fresh.made / CELL).files)
    assert all(entry["method"] == "GET" for entry in fresh.hub.log)
    fresh.hub.state.tokens = {"another": "tester"}
    assert fresh.push(fresh.made, "v1.0") == 2 and "does not accept the token" in fresh.output
    fresh.restore(fresh.empty)
    fresh.hub.state.users = {"tester": ["elsewhere"]}
    assert fresh.push(fresh.made, "v1.0") == 2 and "writes to tester, elsewhere" in fresh.output


# -------------------------------------------------------------------------------------------------------- one by one

A, B = File("a.json", 2, "a" * 64, "a" * 40), File("provenance.json", 3, "b" * 64, "b" * 40)
TARGET = Target("org/m", Manifest(Path(), {"a.json": A, "provenance.json": B}), "v1.0")
THERE = {path: RemoteFile(file.size, file.sha1, None) for path, file in TARGET.manifest.files.items()}
OTHER = {**THERE, "a.json": RemoteFile(2, "c" * 40, None)}


@pytest.mark.parametrize(
    "state, step",
    [
        (State(), Step.CREATE),
        (State(True, True, "h1", {".gitattributes": RemoteFile(1, "d", None)}), Step.COMMIT),
        (State(True, False, "h1", {".gitattributes": RemoteFile(1, "d", None)}), Step.HIDE),
        (State(True, True, "h1", THERE), Step.VERIFY),
        (State(True, True, "h1", THERE, tags={"v1.0": "h1"}), Step.PUBLISH),
        (State(True, False, "h1", THERE, tags={"v1.0": "h1"}), None),
        (State(True, True, "h1", OTHER), Step.COMMIT),
        (State(True, False, "h1", OTHER), Step.STAGE),
        (State(True, False, "h1", OTHER, staged=OTHER), Step.STAGE),
        (State(True, False, "h1", OTHER, staged=THERE), Step.PROMOTE),
        (State(True, False, "h1", THERE, staged=THERE), Step.VERIFY),
        (State(True, False, "h1", THERE, tags={"v1.0": "h1"}, staged=THERE), Step.CLEAN),
    ],
)
def test_the_next_step(state, step):
    assert next_step(state, TARGET) is step


def test_difference():
    large = File("m.safetensors", 9, "e" * 64, "e" * 40)
    files = {"a.json": A, "m.safetensors": large}
    there = {"a.json": RemoteFile(2, A.sha1, None), "m.safetensors": RemoteFile(9, "pointer", large.sha256)}
    assert not difference(files, {**there, ".gitattributes": RemoteFile(1, "x", None)})
    assert difference(files, {**there, "old.txt": RemoteFile(1, "x", None)}).delete == ("old.txt",)
    assert difference(files, {**there, "a.json": RemoteFile(3, A.sha1, None)}).change == ("a.json",)
    wrong = {
        **there,
        "m.safetensors": RemoteFile(9, large.sha1, "f" * 64),
    }  # git's name of the content is not its sha256
    assert difference(files, wrong).change == ("m.safetensors",)
    assert difference(files, {}).add == ("a.json", "m.safetensors")


def test_waves_keep_repositories_whole():
    def target(name: str, branch: str = "main") -> Target:
        return Target(f"org/{name}", Manifest(Path(), {"a": File("a", 10, "", "")}), "v1.0", branch)

    targets = [target("a"), target("a", "step-1"), target("b"), target("c")]
    assert waves(targets, None) == [targets]
    assert [[str(one) for one in wave] for wave in waves(targets, 25)] == [
        ["org/a", "org/a@step-1"],
        ["org/b", "org/c"],
    ]
    with pytest.raises(Trouble, match="org/a has 20 bytes"):
        waves(targets, 15)


def test_the_pace_stays_below_the_limit_in_every_window():
    now, sent = [0.0], deque()
    pace = Pace((90, 10**6), clock=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    most = 0
    for _ in range(500):
        pace.take("api")
        sent.append(now[0])
        while sent[0] <= now[0] - WINDOW:
            sent.popleft()
        most = max(most, len(sent))
    assert 85 <= most <= 91  # close to the limit, and one more where a window's two ends count
    assert pace.seconds(api=500, resolve=0) == pytest.approx(now[0], rel=0.01)
    assert now[0] == pytest.approx((500 - 30) / (60 / WINDOW), rel=0.01)  # a burst of a third, then the rest by rate
    assert Pace(LIMITS["free"]).seconds(api=100, resolve=100) == 0


def failure(status: int, **headers) -> HfHubHTTPError:
    return HfHubHTTPError(
        "no", response=httpx2.Response(status, headers=headers, request=httpx2.Request("GET", "http://h"))
    )


def test_what_is_tried_again():
    assert retry_after(failure(429, **{"RateLimit": '"api";r=0;t=55'})) == 56
    assert retry_after(failure(503, **{"Retry-After": "7"})) == 7
    assert retry_after(failure(500)) == retry_after(failure(412)) == retry_after(httpx2.ReadTimeout("slow")) == 0
    assert retry_after(failure(403)) is retry_after(failure(400)) is retry_after(ValueError("x")) is None
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = httpx2.RemoteProtocolError("gone")
    assert retry_after(wrapped) == 0
    assert retry_after(Trouble("a person")) is None


def test_persistence_has_an_end(monkeypatch):
    pauses, said = [], []
    monkeypatch.setattr("time.sleep", pauses.append)

    def work():
        raise Transient(f"the token is {TOKEN}")

    with pytest.raises(Trouble, match="gave up after 4 attempts: the token is hf_[*]{3}. Run the same"):
        persist(work, attempts=4, on_retry=said.append)
    assert len(pauses) == 3 and pauses[2] > 3 and TOKEN not in "".join(said)
    outcomes = iter([failure(503), failure(429, **{"Retry-After": "9"}), None])

    def recovers():
        if error := next(outcomes):
            raise error
        return "done"

    assert persist(recovers) == "done" and pauses[-1] == 9
    with pytest.raises(ValueError):
        persist(lambda: (_ for _ in ()).throw(ValueError("no")))


def test_no_token_in_a_text(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "strange-token")
    assert redact(f"{TOKEN} and strange-token and hf_hub") == "hf_*** and hf_*** and hf_hub"


def test_a_moved_item():
    assert list(collection.moves(["a", "b"], ["a", "b"])) == []
    current = ["c", "x", "a", "b"]
    for name, position in collection.moves(current, ["a", "b", "c", "x"]):
        current.remove(name)
        current.insert(position, name)
    assert current == ["a", "b", "c", "x"]


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def bundle(harness, tmp_path):
    return Path(shutil.copytree(harness.made / CELL, tmp_path / CELL))


def test_a_whole_bundle(bundle):
    manifest = read_manifest(bundle)
    assert manifest.files["LICENSE"].sha1 == git_sha1((bundle / "LICENSE").read_bytes())
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=bundle)
    assert checked.returncode == 0


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda b: (b / ".env").write_text("x"), "names begin with"),
        (lambda b: (b / ".gitignore").write_text("*.json"), "names begin with"),
        (lambda b: (b / "weights.bin").write_bytes(b"x"), "pickle"),
        (lambda b: (b / "optimizer.pt").write_bytes(b"x"), "pickle"),
        (lambda b: (b / "link.md").symlink_to("/etc/hostname"), "link"),
        (lambda b: (b / "folder").symlink_to("/etc"), "link"),
        (lambda b: os.mkfifo(b / "pipe.md"), "special file"),
        (lambda b: (b / "extra.md").write_text("x"), "not named in SHA256SUMS"),
        (lambda b: (b / "LICENSE").write_text("x"), "has changed since"),
        (lambda b: (b / "LICENSE").unlink(), "is named in SHA256SUMS and missing"),
        (lambda b: (b / "SHA256SUMS").unlink(), "is not a bundle"),
        (lambda b: (b / "SHA256SUMS").write_text("0" * 64 + "  ../outside.md\n"), "is not a line"),
    ],
)
def test_what_may_not_be_published(bundle, spoil, message):
    spoil(bundle)
    with pytest.raises(Trouble, match=message):
        read_manifest(bundle)


@pytest.mark.parametrize(
    "text, message",
    [
        (f"token: {TOKEN}", "line 1: this looks like a token"),
        ("x\n-----BEGIN RSA PRIVATE KEY-----", "line 2: this looks like a private key"),
        ("AKIA" + "A" * 16, "cloud key"),
        ("made in /home/someone/runs", "path of someone's machine"),
    ],
)
def test_secrets_are_refused_and_not_repeated(bundle, text, message):
    (bundle / "README.md").write_text(text)
    write_sums(bundle)
    with pytest.raises(Trouble, match=message) as refused:
        read_manifest(bundle)
    assert TOKEN not in str(refused.value)


def test_weights_must_be_whole_and_have_one_metadata_key(bundle):
    path = bundle / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])

    def write(header: dict, rest: bytes) -> None:
        encoded = json.dumps(header).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + rest)
        write_sums(bundle)

    for metadata, rest, message in (
        ({"format": "pt", "commit": "x"}, b"", "only 'format'"),
        ({"format": "pt"}, b"more", "cut short or has something behind"),
    ):
        write({**header, "__metadata__": metadata}, content[8 + length :] + rest)
        with pytest.raises(Trouble, match=message):
            read_manifest(bundle)
    path.write_bytes((2**40).to_bytes(8, "little"))
    write_sums(bundle)
    with pytest.raises(Trouble, match="claims 1099511627776 bytes"):
        read_manifest(bundle)
