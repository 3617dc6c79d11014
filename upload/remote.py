"""The way to the Hub: one client with a pace, a time limit on every request, retries, and no secret in any message.

huggingface_hub has none of the four by default: it waits for ever, repeats some requests and not others, and knows of the
Hub's limits only when they are hit. ``connect`` sets up its client for this process; ``persist`` repeats a piece of work
that reads the remote state before it acts, which is the only kind that may be repeated after an answer got lost.

    >>> pace = Pace(LIMITS["free"], clock=iter(range(10**6)).__next__, sleep=lambda seconds: None)
    >>> pace.seconds(api=1000, resolve=0) > 0
    True
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory

T = TypeVar("T")
WINDOW = 300.0  # seconds over which the Hub counts requests
# Requests per window, (API, downloads): the Hub's documentation, September 2025. What a login has is said by --plan.
LIMITS = {"free": (1000, 5000), "pro": (2500, 12000), "team": (3000, 20000)}
RETRIED = {408, 409, 412, 425, 429, 500, 502, 503, 504}


class Trouble(Exception):
    """Something a person has to change; the message is one line and says what."""


class Transient(Exception):
    """A piece of work did not come to its end, and may the next time."""


class VerificationError(Trouble):
    """What the Hub gives back is not what was recorded at export."""


class Pace:
    """A token bucket for each kind of request, so that no window of 300 s holds more than the Hub allows.

    A third of the limit may be used at once; the rest is what refills in a window.

    Args:
        limits: requests per window, (API, downloads).
        clock, sleep: of the real time, or a test's.
    """

    BURST = 1 / 3

    def __init__(self, limits: tuple[int, int], clock=time.monotonic, sleep=time.sleep):
        self.limits = dict(zip(("api", "resolve"), limits, strict=True))
        self.counts = dict.fromkeys(self.limits, 0)
        self.waited = 0.0
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._level = {kind: limit * self.BURST for kind, limit in self.limits.items()}
        self._seen = dict.fromkeys(self.limits, clock())

    def rate(self, kind: str) -> float:
        """Requests per second after the first burst."""
        return self.limits[kind] * (1 - self.BURST) / WINDOW

    def take(self, kind: str, count: int = 1) -> None:
        """Wait until ``count`` more requests may be sent."""
        with self._lock:
            now = self._clock()
            full = self.limits[kind] * self.BURST
            level = min(full, self._level[kind] + (now - self._seen[kind]) * self.rate(kind)) - count
            self._level[kind], self._seen[kind] = level, now
            self.counts[kind] += count
            wait = max(0.0, -level / self.rate(kind))
            self.waited += wait
        if wait:
            self._sleep(wait)

    def seconds(self, **counts: int) -> float:
        """How long that many requests take at this pace, at the least."""
        over = {kind: count - self.limits[kind] * self.BURST for kind, count in counts.items()}
        return max(max(0.0, count / self.rate(kind)) for kind, count in over.items())


def connect(pace: Pace, timeout: float = 60.0) -> HfApi:
    """Set up huggingface_hub's client for this process, with the token of the environment or the login.

    Raises:
        Trouble: there is no token.
    """
    if not get_token():
        raise Trouble("No token: set HF_TOKEN, or run `hf auth login`. It needs the right to write to the name space.")
    host = urlsplit(constants.ENDPOINT).netloc

    def wait_for_turn(request: httpx2.Request) -> None:
        if request.url.netloc.decode() == host:
            pace.take("resolve" if "/resolve/" in request.url.path else "api")

    def factory() -> httpx2.Client:
        client = default_client_factory()
        client.event_hooks = {"request": [*client.event_hooks["request"], wait_for_turn], "response": []}
        client.timeout = httpx2.Timeout(timeout, connect=min(timeout, 20.0))
        return client

    set_client_factory(factory)
    return HfApi()


def account(api: HfApi, namespace: str) -> None:
    """Check that the login may write to a name space; one request.

    Raises:
        Trouble: it may not.
    """
    try:
        who = api.whoami(cache=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise Trouble("The Hub does not accept the token: make a new one, and set HF_TOKEN.") from None
        raise
    names = [who["name"], *(org["name"] for org in who.get("orgs", []))]
    if namespace not in names:
        raise Trouble(f"namespace={namespace!r}: this login writes to {', '.join(names)}.")


def retry_after(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait before ``error`` may be tried again; 0 if it says nothing; None: do not."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return _asked_for(error.response) if error.response.status_code in RETRIED else None
        if isinstance(error, (Transient, httpx2.TransportError, ConnectionError, TimeoutError)):
            return 0.0
        error = error.__cause__ or error.__context__
    return None


def _asked_for(response: httpx2.Response) -> float:
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    after = response.headers.get("Retry-After", "")
    return float(after) if after.isdigit() else 0.0


def persist(
    work: Callable[[], T],
    *,
    attempts: int = 6,
    longest: float = 60.0,
    on_retry: Callable[[str], None] = lambda text: None,
) -> T:
    """Do ``work`` until it succeeds, with growing pauses of random length between attempts.

    ``work`` must begin by reading the remote state: after an answer is lost, only that says what has been done.

    Raises:
        Trouble: it failed ``attempts`` times; other errors as they come.
    """
    for attempt in range(1, attempts + 1):
        try:
            return work()
        except Exception as error:
            asked = retry_after(error)
            if asked is None:
                raise
            reason = redact(str(error)).strip().split("\n")[0] or type(error).__name__
            if attempt == attempts:
                raise Trouble(f"gave up after {attempts} attempts: {reason}. Run the same command again.") from error
            pause = max(asked, random.uniform(0.5, 1.0) * min(longest, 2.0**attempt))
            on_retry(f"{reason}; again in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


def redact(text: str) -> str:
    """``text`` without anything that looks like a token, and without the one in use whatever it looks like."""
    token = get_token()
    if token and len(token) >= 6:
        text = text.replace(token, "hf_***")
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}", "hf_***", text)
