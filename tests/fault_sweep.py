"""A publication interrupted at every one of its requests, and repeated: does it always end in the same place?

    python -m tests.fault_sweep runs/bundles/tiny-GLA-pure --json upload/results/faults.json
    python -m tests.fault_sweep runs/bundles/tiny-GLA-pure --every 10 --kinds kill-after corrupt

Two publications are swept, a first one and an update of a public repository, each with the real publisher and the real
client against the local Hub. ``kill`` is SIGKILL while the server holds the request, before or after it did the work. After
each the same command runs again, and then: one repository, the right tree, one commit more than before, the tag on it, one
collection with one item. And at every moment in between: what is public is a tree that a clean process has verified.

To try hundreds of faults in minutes, both kinds of process are forked from interpreters that have imported everything, and
pauses are cut short. The clean ones are forked from one that has never seen this package.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from hybrid_models.results import environment, this_command, write_atomically

from .hub_faults import Fault
from .hub_routes import Reply, Request
from .hub_server import LocalHub, client_environment
from .hub_store import Blob, State

ROOT = Path(__file__).parents[1]
KINDS = ("kill-before", "kill-after", "drop", "lose", "hang", "truncate", "error", "busy", "corrupt")
TIMEOUT = 2  # seconds of a request, so that a hanging one costs little
TITLE = "The suite"
TOKEN = "hf_" + "Planted" * 4  # must be found nowhere afterwards

# A process that forks one child for each line of JSON, and says how it ended.
ZYGOTE = r"""
import json, os, sys
SETUP
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        status = 1
        try:
            status = run(job)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 0)
    print(json.dumps({"pid": pid}), flush=True)
    print(json.dumps({"status": os.waitpid(pid, 0)[1]}), flush=True)
"""

PUBLISHER = r"""
import socket, time
from upload import publish, verify
pause = time.sleep
time.sleep = lambda seconds: pause(min(seconds, 0.02))

def run_clean(folder, timeout, online):
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(os.environ["CLEAN_SOCKET"])
        line.sendall(f"{folder}\n".encode())
        return line.makefile().read()

verify.run_clean = run_clean
def run(job):
    return publish.main(job["argv"])
"""

CLEAN = r"""
import shutil
for name in ("hybrid_models", "fla", "triton"):
    sys.modules[name] = None
import torch, transformers, huggingface_hub
from huggingface_hub import snapshot_download, set_client_factory
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
import transformers.modeling_layers, transformers.cache_utils, transformers.generation.candidate_generator

def run(job):
    sys.argv = ["-c", f"{job['folder']}/asked.json"]
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    exec(compile(job["code"], "clean", "exec"), {"__name__": "__main__"})
"""


class Zygote:
    """An interpreter that has imported everything, and forks."""

    def __init__(self, setup: str, env: dict[str, str], *flags: str):
        self._process = subprocess.Popen(
            [sys.executable, *flags, "-c", ZYGOTE.replace("SETUP", setup)],
            **{"cwd": ROOT, "env": env, "text": True, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
        )
        self.pid: int | None = None

    def wait_until_ready(self) -> None:
        if not self._process.stdout.readline():
            raise RuntimeError("the interpreter to fork from has died")

    def run(self, **job) -> int:
        """Fork, wait; the wait status (negative: the signal that ended it)."""
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self.pid = json.loads(self._process.stdout.readline())["pid"]
        status = json.loads(self._process.stdout.readline())["status"]
        self.pid = None
        return os.waitstatus_to_exitcode(status)

    def kill_child(self) -> None:
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class Snapshot(NamedTuple):
    state: State
    verified: set[str]


class WatchedHub(LocalHub):
    """The local Hub, which notes whatever must not be seen in public, after every request."""

    def __init__(self, **options):
        self.verified: set[str] = set()  # trees that a clean process has found right
        self.violations: list[str] = []
        super().__init__(**options)

    def answer(self, request: Request) -> Reply:
        with self.lock:
            reply = super().answer(request)
            for repo in self.state.repos.values():
                shown = {} if repo.private else repo.branches
                for name, commit in {**shown, **repo.tags}.items():
                    files = repo.commits[commit].files
                    # A branch that begins so holds what is being verified, and says so by its name.
                    if len(files) > 1 and not name.startswith("staging-") and tree_key(files) not in self.verified:
                        self.violations.append(f"{request.method} {request.path}: {repo.id}@{name} was not verified")
            return reply


def tree_key(files: dict[str, Blob]) -> str:
    return json.dumps({path: blob.etag for path, blob in sorted(files.items())})


class Harness:
    """The local Hub, a publisher and a clean interpreter, both to fork from.

    Use as a context. ``push`` runs the real command; ``state`` of the hub can be set to a copy for a fresh start.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.hub = WatchedHub()
        self.hub.state.tokens = {TOKEN: "tester"}

    def __enter__(self) -> Harness:
        from upload.verify import CLEAN_PROCESS

        self._code = CLEAN_PROCESS
        self.hub.__enter__()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(address := f"{self.folder}/clean.sock")
        self._socket.listen()
        (self.folder / "tmp").mkdir()
        env = {**client_environment(self.hub.url, self.folder, TOKEN), "TMPDIR": str(self.folder / "tmp")}
        clean_env = {**client_environment(self.hub.url, self.folder / "clean", TOKEN), "TMPDIR": env["TMPDIR"]}
        clean_env |= {"HF_HUB_ETAG_TIMEOUT": str(TIMEOUT), "HF_HUB_DOWNLOAD_TIMEOUT": str(TIMEOUT)}
        self.clean = Zygote(CLEAN, clean_env, "-I")
        self.publisher = Zygote(PUBLISHER, {**env, "CLEAN_SOCKET": address})
        self.clean.wait_until_ready()
        self.publisher.wait_until_ready()
        threading.Thread(target=self._serve_clean, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.publisher.close()
        self._socket.close()
        self.clean.close()
        self.hub.__exit__(*error)

    def run_clean(self, folder: Path, timeout: float = TIMEOUT, online: bool = True) -> str:
        """In place of ``upload.verify.run_clean``."""
        self.clean.run(folder=str(folder), out=str(self.folder / "clean.out"), code=self._code)
        return (self.folder / "clean.out").read_text()

    def _serve_clean(self) -> None:
        while True:
            try:
                line, _ = self._socket.accept()
            except OSError:
                return
            with line:
                folder = Path(line.makefile().readline().strip())
                asked = json.loads((folder / "asked.json").read_text())
                said = self.run_clean(folder)
                found = {"problem": "died"}
                if (result := folder / "result.json").is_file():
                    found = json.loads(result.read_text())
                if not found["problem"]:
                    with self.hub.lock:
                        repo = self.hub.state.repos.get(asked["source"])
                        if repo:
                            self.hub.verified.add(tree_key(repo.commits[asked["revision"]].files))
                try:
                    line.sendall(said.encode())
                except OSError:
                    pass  # the publisher was killed

    def push(self, bundles: Path, release: str, *options: str, command: str = "push") -> int:
        """Run ``upload.publish``; the exit status."""
        collect = ["--collection", TITLE] if command == "push" else []
        argv = [command, str(bundles), "--namespace", "org", "--release", release, "--timeout", str(TIMEOUT), *collect]
        return self.publisher.run(argv=[*argv, *options], out=str(self.folder / "push.out"))

    @property
    def output(self) -> str:
        return (self.folder / "push.out").read_text()

    def leaks(self) -> list[str]:
        """Files below the folder, and entries of the server's log, that hold the token."""
        found = [str(path) for path in self.folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
        return found + [entry["path"] for entry in self.hub.log if TOKEN in json.dumps(entry)]

    def interrupt(self, bundles: Path, release: str, kind: str, index: int, download: str = "") -> dict:
        """Push with one fault, at an index or in a ``download``, and once more without; what happened."""
        killing = kind.startswith("kill")
        name = {"kill-before": "signal-before", "kill-after": "signal-after", "error": "status", "busy": "status"}.get(
            kind, kind
        )
        status, headers = (429, {"RateLimit": '"api";r=0;t=1'}) if kind == "busy" else (500, {})
        self.hub.log.clear()
        self.hub.faults.reset(
            [
                Fault(
                    name,
                    index,
                    1,
                    status,
                    headers,
                    60 if killing else TIMEOUT + 1,
                    f"GET {download}" if download else "",
                )
            ]
        )
        killer = threading.Thread(
            target=self._kill_when_signalled, args=(self.hub.faults.signalled, killing), daemon=True
        )
        killer.start()
        first = self.push(bundles, release)
        hit = [entry for entry in self.hub.log if entry["fault"]]
        self.hub.faults.signalled.set()  # also if the request never came
        self.hub.faults.reset()
        killer.join()
        what = {
            "kind": kind,
            "index": index,
            "first": first,
            "hit": f"{hit[0]['method']} {hit[0]['path']}" if hit else None,
        }
        if kind == "corrupt" and hit:
            what["found"] = first != 0
        self._wait_for_clean()
        return {**what, "second": self.push(bundles, release)}

    def _kill_when_signalled(self, signalled: threading.Event, killing: bool) -> None:
        signalled.wait()
        if killing:
            self.publisher.kill_child()
            self.clean.kill_child()

    def _wait_for_clean(self) -> None:
        while self.clean.pid is not None:
            time.sleep(0.01)

    def snapshot(self) -> Snapshot:
        """What the hub holds and has seen verified now."""
        return Snapshot(copy.deepcopy(self.hub.state), set(self.hub.verified))

    def restore(self, snapshot: Snapshot) -> None:
        """Start again from there."""
        with self.hub.lock:
            self.hub.state = copy.deepcopy(snapshot.state)
            self.hub.verified = set(snapshot.verified)
            self.hub.violations.clear()
            self.hub.log.clear()
            self.hub.faults.reset()


def is_download(path: str) -> bool:
    return "/resolve/" in path or len(path) == 65


def file_of(path: str) -> str:
    """The end of a download's path that does not change with the commit."""
    return path if "/resolve/" not in path else "/" + path.split("/resolve/")[1].split("/", 1)[1]


def wrong_end(harness: Harness, before: Snapshot, bundles: Path, release: str) -> list[str]:
    """What is not as it must be after a push of one bundle that began at ``before``."""
    from upload.manifest import RemoteFile, difference, read_manifest

    hub, name = harness.hub, f"org/{next(bundles.iterdir()).name}"
    found = list(dict.fromkeys(hub.violations))
    if list(hub.state.repos) != [name]:
        return [*found, f"repositories: {list(hub.state.repos)}"]
    repo = hub.state.repos[name]
    files = {path: RemoteFile(blob.size, blob.oid, blob.sha256) for path, blob in repo.tree("main").items()}
    if difference(read_manifest(bundles / name.split("/")[1]).files, files):
        found.append("the tree differs")
    repos = before.state.repos
    old = len(repos[name].history("main")) if name in repos else 1
    if len(repo.history("main")) != old + 1:
        found.append(f"{len(repo.history('main')) - old} commits instead of one")
    if repo.private or list(repo.branches) != ["main"] or repo.tags.get(release) != repo.head():
        found.append(f"private={repo.private}, branches={list(repo.branches)}, tags={repo.tags}, head={repo.head()}")
    items = [[item["id"] for item in one.items] for one in hub.state.collections.values()]
    if items != [[name]]:
        found.append(f"collections: {items}")
    return found


def tasks(requests: list[tuple[str, str]], kinds=KINDS, every: int = 1) -> list[tuple[int, str]]:
    """(index, kind) of the faults to try on a push of these requests.

    Every kind at each request that reads or changes the state. The downloads are alike, and two thirds of all requests: each
    is killed, and each body corrupted.
    """
    found = []
    for index in range(0, len(requests), every):
        method, path = requests[index]
        if is_download(path):
            ours = method == "GET" and not path.endswith("/.gitattributes")  # that one is the Hub's own
            chosen = {"kill-after", "corrupt"} if ours else {"kill-after"}
        else:
            chosen = set(kinds) - {"corrupt"}
        found += [(index, kind) for kind in kinds if kind in chosen]
    return found


def sweep(
    harness: Harness,
    before: Snapshot,
    bundles: Path,
    release: str,
    kinds=KINDS,
    every: int = 1,
    scenario: str = "push",
) -> list[dict]:
    """Try each kind of fault at each ``every``-th request of a push; one record for each fault that hit."""
    harness.restore(before)
    status = harness.push(bundles, release)
    if status or (wrong := wrong_end(harness, before, bundles, release)):
        raise RuntimeError(f"the push fails without a fault: {harness.output if status else wrong}")
    requests = [(entry["method"], entry["path"]) for entry in harness.hub.log]
    records = []
    for index, kind in tqdm(tasks(requests, kinds, every), desc=scenario, unit="fault", disable=None):
        harness.restore(before)
        download = file_of(requests[index][1]) if kind == "corrupt" else ""
        record = {"scenario": scenario, **harness.interrupt(bundles, release, kind, index, download)}
        record["wrong"] = wrong_end(harness, before, bundles, release)
        if record["second"]:
            record["wrong"].append(f"the second run ended with {record['second']}: {harness.output[-500:]}")
        if record.get("found") is False:
            record["wrong"].append("a corrupted download was not found")
        if record["hit"]:
            records.append(record)
    return records


def changed_bundle(bundle: Path, folder: Path) -> Path:
    """The same bundle with another sentence on its card, in a folder of its own; returns that folder."""
    from upload.manifest import write_sums

    copied = Path(shutil.copytree(bundle, folder / bundle.name))
    with (copied / "README.md").open("a") as file:
        file.write("\nOne more sentence.\n")
    write_sums(copied)
    return folder


def summary(records: list[dict]) -> dict:
    """Counts by scenario and kind, and whatever went wrong."""
    counts = collections.Counter((record["scenario"], record["kind"]) for record in records)
    by_scenario: dict[str, dict[str, int]] = {}
    for (scenario, kind), count in sorted(counts.items()):
        by_scenario.setdefault(scenario, {})[kind] = count
    return {
        "faults": len(records),
        "by_kind": by_scenario,
        "recovered_in_the_same_run": sum(record["first"] == 0 for record in records),
        "corrupted_downloads_found": sum(record.get("found") is True for record in records),
        "wrong": [record for record in records if record["wrong"]],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.fault_sweep",
        description="Interrupt a publication at every request, repeat it, and compare where it ends.",
        epilog="example:\n  python -m tests.fault_sweep runs/bundles/tiny-GLA-pure --json upload/results/faults.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, help="a small bundle, from `python -m upload.bundle`")
    parser.add_argument("--every", type=int, default=1, help="each so many requests (default: every request)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--json", type=Path, help="write counts and failures there")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Harness(Path(folder)) as harness:
        records, requests = [], {}
        first = Path(folder) / "first"
        shutil.copytree(args.bundle, first / args.bundle.name)
        second = changed_bundle(args.bundle, Path(folder) / "second")
        for scenario, bundles, release in (
            ("first push", first, "v1.0"),
            ("update of a public repository", second, "v1.1"),
        ):
            before = harness.snapshot()
            records += sweep(harness, before, bundles, release, args.kinds, args.every, scenario)
            harness.restore(before)
            harness.push(bundles, release)
            requests[scenario] = len(harness.hub.log)
            seconds = round(time.perf_counter() - start, 1)
            found = {**summary(records), "requests_of_a_push": requests, "every": args.every, "seconds": seconds}
            print(f"{found['faults']} faults tried, {len(found['wrong'])} went wrong, {seconds:.0f} s", flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                whole = {"command": this_command("tests.fault_sweep", argv), **found, "environment": environment()}
                write_atomically(args.json, json.dumps(whole, indent=1) + "\n")
    for record in found["wrong"]:
        print(json.dumps(record))
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
