"""Publish bundles on the Hub: plan, push, verify, status. Stop it anywhere, run it again; a second run writes nothing.

    python -m upload.publish plan   runs/bundles --namespace my-org --release v1.0
    python -m upload.publish push   runs/bundles --namespace my-org --release v1.0 --collection "Hybrid linear attention"
    python -m upload.publish status runs/bundles --namespace my-org --release v1.0
    python -m upload.publish verify runs/bundles --namespace my-org --release v1.0 --load

Each folder in ``runs/bundles`` is a repository of the same name; ``NAME@step-1000`` is a branch of it, for a training step.
A repository is private until the release's tag says that its commit was downloaded and loaded in a clean process with the
logits recorded at export (``verify``); a wave of repositories goes public when all of it is verified, and the collection
follows. What comes next is always read from the Hub (``plan.next_step``). The token is the environment's or the login's,
never an argument.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import disable_progress_bars
from tqdm.auto import tqdm

from hybrid_models.checkpoint import size_in_bytes
from hybrid_models.info import human_bytes
from hybrid_models.suite import SIZES, cell_names

from . import verify as clean
from .collection import sync_collection
from .manifest import HashCache, difference, read_manifest
from .plan import OURS, State, Step, Target, describe, next_step, observe, paced_seconds, requests_of_a_push, waves
from .remote import LIMITS, Pace, Transient, Trouble, account, connect, persist, redact

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hybrid_models"


class Publisher:
    """Brings targets to where they shall be.

    Args:
        api: from ``remote.connect``.
        pace: downloads of the clean process are counted on it too.
        jobs: repositories at the same time.
        attempts: of each piece of work.
        timeout: seconds of a request.
        say: takes a line for the reader.
    """

    def __init__(
        self,
        api: HfApi,
        pace: Pace,
        *,
        jobs: int = 2,
        attempts: int = 6,
        timeout: float = 60.0,
        say: Callable[[str], None] = print,
    ):
        self.api, self.pace, self.jobs, self.attempts, self.timeout = api, pace, jobs, attempts, timeout
        self.say = lambda text: say(redact(text))
        self._creating = threading.Lock()  # the Hub creates one repository of a user at a time
        self._journal = threading.Lock()

    def push(self, wave: list[Target], public: bool = True) -> dict[str, str]:
        """Bring a wave to its end, and public if all of it got there.

        Returns:
            {target's name: error} of those that did not; the others are verified, and then nothing of the wave goes public.
        """
        hidden: list[Target] = []

        def verified(target: Target) -> None:
            if self.advance(target, until=Step.PUBLISH).private:
                hidden.append(target)

        with tqdm(total=len(wave), desc="verified", unit="repo", disable=None) as bar:
            errors = self._each(wave, verified, bar)
        if public and not errors and hidden:
            hidden.sort(key=wave.index)
            with tqdm(total=len(hidden), desc="public", unit="repo", disable=None) as bar:
                errors = self._each(hidden, self.advance, bar)
        return errors

    def _each(self, targets: list[Target], work: Callable[[Target], object], bar: tqdm) -> dict[str, str]:
        """Run ``work`` on all targets, those of one repository one after the other."""
        repos: dict[str, list[Target]] = {}
        for target in targets:
            repos.setdefault(target.repo_id, []).append(target)
        errors: dict[str, str] = {}

        def run(members: list[Target]) -> None:
            for target in members:
                try:
                    work(target)
                # The client wraps what went wrong in these; anything else is a bug, and ends the program.
                except (Trouble, Transient, OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
                    errors[str(target)] = redact(
                        f"{'' if isinstance(error, Trouble) else type(error).__name__ + ': '}{error}"
                    )
                    self.say(f"{target}: {errors[str(target)]}")
                    return  # a branch needs its main
                bar.update()

        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(run, repos.values()))
        return errors

    def advance(self, target: Target, until: Step | None = None) -> State:
        """Take steps until ``until`` would be the next one, or none is left; returns the last state seen."""

        def work() -> State:
            while True:
                state = observe(self.api, target)
                step = next_step(state, target)
                if step is None or step is until:
                    return state
                self.journal(target, step, state)
                self.take(step, state, target)

        return persist(work, attempts=self.attempts, on_retry=lambda reason: self.say(f"{target}: {reason}"))

    def take(self, step: Step, state: State, target: Target) -> None:
        """One step. What it did is read from the Hub afterwards, not concluded from its answer."""
        repo_id = target.repo_id
        if step is Step.CREATE:
            with self._creating:
                self.api.create_repo(repo_id, private=True)
        elif step is Step.HIDE:
            self.api.update_repo_settings(repo_id, private=True)
        elif step is Step.BRANCH:
            self.api.create_branch(repo_id, branch=target.branch, revision="main")
        elif step is Step.COMMIT:
            self.commit(target, target.branch, state.head, state.files)
        elif step is Step.STAGE:
            if state.staged is None:
                self.api.create_branch(repo_id, branch=target.staging, revision=state.head)
            else:
                self.commit(target, target.staging, state.branches[target.staging], state.staged)
        elif step is Step.VERIFY:
            self.load(target, state.head)
            self.api.create_tag(repo_id, tag=target.tag, revision=state.head)
        elif step is Step.PROMOTE:
            self.load(target, state.branches[target.staging])
            self.commit(target, target.branch, state.head, state.files)
        elif step is Step.CLEAN:
            self.api.delete_branch(repo_id, branch=target.staging)
        elif step is Step.PUBLISH:
            self.api.update_repo_settings(repo_id, private=False)

    def commit(self, target: Target, branch: str, head: str, present: dict) -> None:
        """Everything in one commit on top of ``head``; the Hub refuses it if the head has moved."""
        changes = difference(target.manifest.files, present)
        folder = target.manifest.folder
        operations = [CommitOperationAdd(path, folder / path) for path in (*changes.add, *changes.change)]
        operations += [CommitOperationDelete(path) for path in changes.delete]
        self.api.create_commit(
            target.repo_id,
            operations,
            commit_message=f"{target.tag}: {changes}",
            revision=branch,
            parent_commit=head,
        )

    def load(self, target: Target, commit: str) -> dict:
        """Download, hash, load and compare one commit in a clean process."""
        self.pace.take("api")
        self.pace.take("resolve", requests_of_a_push(target)["resolve"])
        return clean.verify(target.repo_id, target.manifest, commit, self.timeout)

    def collect(self, title: str, targets: list[Target], description: str) -> str:
        """Make the collection list the repositories; returns its slug."""
        return persist(
            lambda: sync_collection(self.api, title, targets, description),
            attempts=self.attempts,
            on_retry=lambda reason: self.say(f"collection: {reason}"),
        )

    def journal(self, target: Target, step: Step, state: State) -> None:
        """Note a step before it is taken, with the commit that it starts from, to go back to by hand."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "target": str(target), "step": step.value}
        with self._journal:
            CACHE.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(CACHE / "journal.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps({**line, "head": state.head}) + "\n")
                file.flush()
                os.fsync(file.fileno())


def read_targets(folder: Path, namespace: str, release: str, adopt: bool = False) -> list[Target]:
    """The bundles in ``folder`` in the suite's order, training steps behind their model; other names at the end.

    Raises:
        Trouble: there is none, one may not be published, or a name is not one for a repository.
    """
    found = folder.iterdir() if folder.is_dir() else ()
    names = sorted(path.name for path in found if path.is_dir() and not path.name.endswith(".partial"))
    if not names:
        raise Trouble(f"{folder} holds no bundles: name the folder that they are in, one folder each.")
    rank = {name: place for place, name in enumerate(name for size in SIZES for name in cell_names(size))}
    cache, targets = HashCache(CACHE / "hashes.json"), []
    progress = tqdm(
        sorted(names, key=lambda name: (rank.get(name.split("@")[0], len(rank)), name.split("@")[0], len(name), name)),
        desc="checking",
        unit="bundle",
        disable=None,
    )
    for name in progress:
        repo, _, branch = name.partition("@")
        if ".." in repo or "--" in repo or repo.endswith(".git") or len(f"{namespace}/{repo}") > 96:
            raise Trouble(
                f"{name} cannot be a repository: no '--' or '..', no '.git' at the end, 96 characters at most."
            )
        manifest = read_manifest(folder / name, cache)
        if OURS not in manifest.files:
            raise Trouble(f"{folder / name} has no {OURS}: bundle again.")
        note = json.loads((folder / name / OURS).read_text()).get("summary", "")
        targets.append(Target(f"{namespace}/{repo}", manifest, release, branch or "main", note, adopt))
    cache.save()
    return targets


def plan(api: HfApi, targets: list[Target], pace: Pace, attempts: int = 6) -> list[dict]:
    """What a push would do to each target, read from the Hub; ``error`` for one that it would refuse."""
    rows = []
    for target in tqdm(targets, desc="reading", unit="repo", disable=None):
        state = persist(lambda target=target: observe(api, target), attempts=attempts)
        try:
            rows.append(describe(state, target))
        except Trouble as error:
            wants_main = target.branch != "main" and not state.exists
            rows.append({"repo": str(target), "next": "create" if wants_main else None, "bytes": target.manifest.bytes})
            if not wants_main:
                rows[-1]["error"] = str(error)
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line, one subcommand for each of the four questions."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("bundles", type=Path, help="a folder of bundles, each named as its repository")
    common.add_argument("--namespace", required=True, help="organisation or user that they go to")
    common.add_argument("--release", required=True, help="the tag of this content, v1.0; a tag never moves")
    common.add_argument("--adopt", action="store_true", help="replace repositories whose files are not a bundle's")
    common.add_argument(
        "--limits", choices=LIMITS, default="free", help="the login's plan at the Hub (default: %(default)s)"
    )
    common.add_argument("--timeout", type=float, default=60.0, help="seconds for a request (default: %(default)s)")
    common.add_argument("--attempts", type=int, default=6, help="at each piece of work (default: %(default)s)")
    common.add_argument(
        "--private-storage", type=size_in_bytes, metavar="SIZE", help="publish in waves that fit, '100GB'"
    )
    common.add_argument("--json", action="store_true", help="print data")
    top = argparse.ArgumentParser(
        "python -m upload.publish",
        description="Publish bundles on the Hub, private first, verified, then public.",
        epilog="example:\n  python -m upload.publish plan runs/bundles --namespace my-org --release v1.0",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)
    for name, help in (
        ("plan", "what a push would change, with sizes, requests and time; writes nothing"),
        ("push", "create, upload, verify, tag; make public; fill the collection"),
        ("verify", "compare what the Hub holds with the bundles; with --load, load it too"),
        ("status", "where each repository stands"),
    ):
        command = commands.add_parser(name, parents=[common], help=help, description=help)
        if name == "push":
            command.add_argument("--collection", metavar="TITLE", help="list them in this collection")
            command.add_argument("--description", default="", help="of the collection, 150 characters at most")
            command.add_argument("--keep-private", action="store_true", help="stop when all are verified")
            command.add_argument("--jobs", type=int, default=2, help="repositories at once (default: %(default)s)")
        if name == "verify":
            command.add_argument("--load", action="store_true", help="download and load each in a clean process")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    disable_progress_bars()  # the client's own, one for each file
    try:
        return run(args)
    except (Trouble, Transient) as error:
        message = redact(str(error))
    except OSError as error:
        message = redact(f"{type(error).__name__}: {error}")
    print(f"upload.publish: {message}", file=sys.stderr)
    return 2


def run(args: argparse.Namespace) -> int:
    """A parsed command; returns 0, or 1 if something is not as it shall be."""
    targets = read_targets(args.bundles, args.namespace, args.release, args.adopt)
    groups = waves(targets, args.private_storage)
    pace = Pace(LIMITS[args.limits])
    api = connect(pace, args.timeout)
    if args.command in ("plan", "status"):
        return show(plan(api, targets, pace, args.attempts), groups, targets, pace, args)
    publisher = Publisher(
        api, pace, jobs=getattr(args, "jobs", 1), attempts=args.attempts, timeout=args.timeout, say=tell
    )
    if args.command == "verify":
        return check(publisher, targets, args.load)
    persist(lambda: account(api, args.namespace), attempts=args.attempts)
    done: list[Target] = []
    for number, wave in enumerate(groups, 1):
        size = human_bytes(sum(target.manifest.bytes for target in wave))
        tell(f"wave {number} of {len(groups)}: {len(wave)} targets, {size}")
        if errors := publisher.push(wave, public=not args.keep_private):
            tell(
                f"{len(errors)} of {len(wave)} did not get there; nothing unverified is public. Run the same command again."
            )
            return 1
        done += wave
        if args.collection and not args.keep_private:
            tell(f"collection: {publisher.collect(args.collection, done, args.description)}")
        if args.keep_private and len(groups) > 1:
            tell("--keep-private: the next wave would need the storage that this one takes; stopping.")
            break
    requests = ", ".join(f"{count} {kind}" for kind, count in pace.counts.items())
    tell(f"{len(done)} targets done; requests: {requests}; waited {pace.waited:.0f} s for the Hub's limits")
    return 0


def check(publisher: Publisher, targets: list[Target], load: bool) -> int:
    """Print whether the Hub holds each bundle, tagged; with ``load``, whether it also computes the same."""
    wrong = 0
    for target in tqdm(targets, desc="verifying", unit="repo", disable=None):
        try:
            state = persist(lambda target=target: observe(publisher.api, target), attempts=publisher.attempts)
            row = describe(state, target)
            verdict = "ok" if row["verified"] else f"differs; next step: {row['next']}"
            if load and row["verified"]:
                found = persist(lambda: publisher.load(target, state.head), attempts=publisher.attempts)
                verdict = f"ok, logits off by {found['deviation']:.1e}"
        except Trouble as error:
            verdict = str(error)
        wrong += not verdict.startswith("ok")
        tell(f"{target}: {verdict}")
    tell(f"{len(targets) - wrong} of {len(targets)} are as they shall be")
    return int(wrong > 0)


def show(rows: list[dict], groups: list[list[Target]], targets: list[Target], pace: Pace, args) -> int:
    """Print the plan or the status as a table or as data."""
    if args.json:
        print(redact(json.dumps(rows, indent=1)))
        return int(any("error" in row for row in rows))
    width = max(len(row["repo"]) for row in rows)
    for row in rows:
        if "error" in row:
            text = f"refused: {row['error']}"
        else:
            counts = [f"{len(row.get(key, []))} {key}" for key in ("add", "change", "delete") if row.get(key)]
            text = (
                f"{row.get('visibility', 'absent'):<8} next: {row['next'] or 'nothing, done':<14} {', '.join(counts)}"
            )
            text += f" ({human_bytes(row['bytes'])})" if row["bytes"] and args.command == "plan" else ""
        print(redact(f"{row['repo']:<{width}}  {text.rstrip()}"))
    if args.command == "plan":
        needed = [target for target, row in zip(targets, rows, strict=True) if row["next"] and "error" not in row]
        seconds = paced_seconds(needed, pace) if needed else 0
        print(
            f"\n{sum(row['bytes'] for row in rows if row['next']):,} bytes to send in {len(groups)} wave(s); at least "
            f"{seconds / 60:.0f} min under the limits of a {args.limits} login ({LIMITS[args.limits][0]} API requests and "
            f"{LIMITS[args.limits][1]} downloads in 5 min), transfers aside"
        )
    return int(any("error" in row for row in rows))


def tell(text: str) -> None:
    """A line that does not break a progress bar."""
    tqdm.write(redact(text), file=sys.stdout)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
