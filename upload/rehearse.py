"""The whole publication without the Hub: all 72 + 72 repositories pushed to the local one, every request counted.

    python -m upload.rehearse runs/bundles/tiny-GLA-pure

It tells three things that should be known before the first real push: how many requests a repository costs, that a second
push writes nothing, and how long the Hub's limits make it all take. The repositories are copies of one small bundle, each
with its own card, provenance and tensors. The clean process downloads and hashes all of them and loads none, which is measured on
the bundle itself, once; the publisher is otherwise the real one. Writes upload/results/rehearsal.json.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

from tqdm.auto import tqdm

from hybrid_models.checkpoint import write_json
from hybrid_models.info import human_bytes
from hybrid_models.results import environment, this_command, write_atomically
from hybrid_models.suite import cell_names

from .manifest import read_manifest, write_sums
from .remote import LIMITS, Pace, Transient, Trouble
from .verify import verify

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "rehearsal.json"
SIZES = ("340M-20B", "1.3B-100B", "nano-7M", "nano-22M")
COMMAND = """
import sys
from upload import publish, verify
real = verify.verify
verify.verify = lambda *args: real(*args, load=False)
sys.exit(publish.main(sys.argv[1:]))
"""


def copies(bundle: Path, folder: Path, names: list[str]) -> None:
    """One repository for each name: ``bundle`` with other last bytes in its tensors, so that each is uploaded."""
    provenance = json.loads((bundle / "provenance.json").read_text())
    for name in tqdm(names, desc="copies", unit="bundle", disable=None):
        target = Path(shutil.copytree(bundle, folder / name))
        write_json(target / "provenance.json", {**provenance, "model": name})
        for path in target.glob("*.safetensors"):
            with path.open("r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(hashlib.sha256(name.encode()).digest()[:4])
        with (target / "README.md").open("a", encoding="utf-8") as file:
            file.write(f"\nA copy for a rehearsal, in place of {name}.\n")
        write_sums(target)


def push(url: str, home: Path, bundles: Path, *options: str) -> tuple[float, list[dict]]:
    """Run the publisher against the server at ``url``; returns its seconds and its requests.

    Raises:
        Trouble: it failed.
    """
    before = len(log(url))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    env = {
        **kept,
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": url,
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    argv = ["push", str(bundles), "--namespace", "org", "--release", "v1.0", "--limits", "team", *options]
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", COMMAND, *argv], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )
    if process.returncode:
        raise Trouble(f"the rehearsal's push failed:\n{process.stdout[-2000:]}")
    return time.perf_counter() - start, log(url)[before:]


def log(url: str) -> list[dict]:
    with urlopen(f"{url}/_test/log") as reply:
        return json.load(reply)


def kind(entry: dict) -> str:
    """What the Hub's limits count a request as; large files come from and go to storage, which they do not count."""
    path = entry["path"]
    if path.startswith("/_lfs/") or re.fullmatch(r"/[0-9a-f]{64}", path):
        return "storage"
    return "resolve" if "/resolve/" in path else "api"


def rehearse(bundle: Path, per_size: int | None = None, jobs: int = 2) -> dict:
    """Push copies of ``bundle`` under the suite's names to a local Hub, twice.

    Args:
        per_size: so many cells of each of the four sizes. Default: all 36.
        jobs: repositories at once.
    """
    names = [name for size in SIZES for name in cell_names(size)[:per_size]]
    start = time.perf_counter()
    verify(str(bundle), read_manifest(bundle))
    load_seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        home, bundles = Path(folder, "home"), Path(folder, "bundles")
        copies(bundle, bundles, names)
        manifests = [read_manifest(bundles / name) for name in names]
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_server", "--quiet"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            url = re.search(r"HF_ENDPOINT=(\S+)", server.stdout.readline())[1]
            options = ("--collection", "Hybrid linear attention", "--jobs", str(jobs))
            first_seconds, first = push(url, home, bundles, *options)
            second_seconds, second = push(url, home, bundles, *options)
        finally:
            server.terminate()
            server.wait()
    counts = collections.Counter(kind(entry) for entry in first)
    again = collections.Counter(kind(entry) for entry in second)
    writes = [entry for entry in second if entry["method"] not in ("GET", "HEAD")]
    if writes:
        raise Trouble(f"the second push wrote: {writes[:3]}")
    paced = {
        plan: round(Pace(limits).seconds(api=counts["api"], resolve=counts["resolve"]) / 60, 1)
        for plan, limits in LIMITS.items()
    }
    return {
        "repositories": len(names),
        "files_per_repository": len(manifests[0].files) + 1,
        "bytes": sum(manifest.bytes for manifest in manifests),
        "jobs": jobs,
        "requests": dict(counts),
        "requests_per_repository": {name: round(count / len(names), 2) for name, count in counts.items()},
        "seconds": round(first_seconds, 1),
        "second_push": {"requests": dict(again), "writes": len(writes), "seconds": round(second_seconds, 1)},
        "load_in_a_clean_process_seconds": round(load_seconds, 1),
        "limits_per_5_minutes": {plan: {"api": api, "resolve": resolve} for plan, (api, resolve) in LIMITS.items()},
        "paced_minutes": paced,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m upload.rehearse",
        description="Push 72 + 72 small repositories to a local Hub and count what it takes.",
        epilog="example:\n  python -m upload.rehearse runs/bundles/tiny-GLA-pure",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, help="a small bundle, which is copied")
    parser.add_argument("--per-size", type=int, help="cells of each of the four sizes (default: all 36)")
    parser.add_argument("--jobs", type=int, default=2, help="repositories at once (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULT, help="default: upload/results/rehearsal.json")
    args = parser.parse_args(argv)
    try:
        found = rehearse(args.bundle, args.per_size, args.jobs)
    except (Trouble, Transient, OSError) as error:
        print(f"upload.rehearse: {error}", file=sys.stderr)
        return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": this_command("upload.rehearse", argv), **found, "environment": environment()}
    write_atomically(args.output, json.dumps(record, indent=1) + "\n")
    print(
        f"{found['repositories']} repositories, {human_bytes(found['bytes'])}, in {found['seconds']:.0f} s; requests of one: "
        f"{found['requests_per_repository']}; the second push wrote nothing in {found['second_push']['seconds']:.0f} s; under "
        f"the Hub's limits at least {found['paced_minutes']} minutes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
