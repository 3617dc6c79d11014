"""A small Hugging Face Hub on 127.0.0.1 that the real huggingface_hub client talks to. A test tool, with faults on demand.

    python -m tests.hub_server --port 8080                  # prints the environment for a client, and its requests
    curl -X POST 127.0.0.1:8080/_test/faults -d '[{"kind": "status", "at": 5, "status": 503}]'

It serves what a publication needs: repositories and their settings, trees, refs and commits, uploads by LFS (in one piece
or in parts) and by Xet where the client's file-system mode exists, downloads (of large files by redirect to another port,
as from a CDN, where no token may arrive), collections, the check of a card's metadata. A client under test runs in a
process of its own with ``client_environment``: the client reads most of it when it is imported.

Fidelity: status codes, error headers and bodies are those that the client's code reads; object hashes are the Hub's.
Not served: gated repos, pull requests, discussions, datasets' conversion. Bodies are held in memory.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from . import hub_collections  # noqa: F401 - registers its routes
from .hub_faults import KINDS, Faults
from .hub_routes import ROUTES, Reply, Request
from .hub_store import Objects, Refused, State
from .hub_xet import XetStore


class LocalHub:
    """The server.

    Args:
        port: 0 takes a free one.
        part_size: an upload above it goes in parts of this many bytes.
        cdn: large files are downloaded by redirect to a second port.
        xet: uploads by the client's file-system Xet mode are accepted (``hub_xet``).

    In a test: ``with LocalHub() as hub: ... hub.state ... hub.log ... hub.faults.reset([Fault("drop", at=3)])``.
    """

    def __init__(self, port: int = 0, *, part_size: int = 16 * 2**20, cdn: bool = True, xet: bool = False):
        self._folder = tempfile.TemporaryDirectory(prefix="hub-")
        self.part_size, self.cdn = part_size, cdn
        self.xet = XetStore(Path(self._folder.name) / "xet") if xet else None
        self.faults = Faults()
        self.lock = threading.RLock()
        self.log: list[dict] = []
        self.cdn_tokens = 0  # Authorization headers that came to the CDN, where none belongs
        self.reset()
        self._servers = [_server(self, port, _HubHandler), _server(self, 0, _CdnHandler)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def reset(self) -> None:
        """Forget repositories, collections, objects, the log and the faults."""
        with self.lock:
            objects = Path(tempfile.mkdtemp(dir=self._folder.name))
            self.state = State(Objects(objects))
            self.parts: dict[str, dict[int, bytes]] = {}
            self.log.clear()
            self.faults.reset()

    def __enter__(self) -> LocalHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.faults.reset()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._folder.cleanup()

    def answer(self, request: Request) -> Reply:
        """The reply to a request, faults aside."""
        try:
            request.user = self._user(request)
            for method, pattern, function in ROUTES:
                if method == request.method and (match := pattern.fullmatch(request.path)):
                    with self.lock:
                        return function(self, request, **match.groupdict())
            raise Refused(404, f"Not served here: {request.method} {request.path}")
        except Refused as error:
            headers = {"X-Error-Message": error.message, **error.headers}
            if error.code:
                headers["X-Error-Code"] = error.code
            return Reply.of({"error": error.message, **error.extra}, error.status, **headers)

    def _user(self, request: Request) -> str | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if token and token not in self.state.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.state.tokens.get(token)


class _HubHandler(BaseHTTPRequestHandler):
    """Reads a request whole, errors included, applies its fault, and answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: without this each reply waits 40 ms
    timeout = 120

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _serve(self):
        hub: LocalHub = self.server.hub
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(
            self.command, path, parse_qs(query, keep_blank_values=True), headers, self._read_body(headers)
        )
        if path.startswith("/_test/"):
            return self._send(hub.answer(request))
        index, fault = hub.faults.next(f"{self.command} {path}")
        released = hub.faults.released
        entry = {"index": index, "method": self.command, "path": self.path, "received": len(request.body)}
        entry |= {"fault": fault and fault.kind, "status": None, "user_agent": headers.get("user-agent", "")}
        hub.log.append(entry)
        kind = fault.kind if fault else None
        if kind == "signal-before":
            hub.faults.signalled.set()
        if kind in ("hang", "signal-before"):
            released.wait(fault.seconds)
        if kind in ("drop", "hang", "signal-before"):
            return self._drop()
        if kind == "status":
            reply = Reply.of({"error": "injected"}, fault.status, **fault.headers)
        else:
            reply = hub.answer(request)
        entry["status"] = reply.status
        if kind == "signal-after":
            hub.faults.signalled.set()
            released.wait(fault.seconds)
        if kind in ("lose", "signal-after"):
            return self._drop()
        self._send(reply, kind)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _read_body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline() not in (b"\r\n", b"\n", b""):  # trailers
            pass
        return b"".join(chunks)

    def _send(self, reply: Reply, fault: str | None = None) -> None:
        body = reply.body
        if fault == "corrupt" and body:
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Request-Id", secrets.token_hex(8))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if fault == "truncate" else body)
        if fault == "truncate":
            self._drop()

    def _drop(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, format, *args):
        if self.server.hub.verbose:
            sys.stderr.write(f"{self.command} {self.path} {args[1] if len(args) > 1 else ''}\n")


class _CdnHandler(_HubHandler):
    """The other origin: large files by their sha256, for whoever has the address."""

    def _serve(self):
        hub: LocalHub = self.server.hub
        hub.cdn_tokens += "authorization" in self.headers
        super()._serve()

    do_GET = do_HEAD = _serve


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """A client that goes away in the middle is what these tests are about."""


def _server(hub: LocalHub, port: int, handler: type) -> _Server:
    hub.verbose = False
    server = _Server(("127.0.0.1", port), handler)
    server.hub = hub
    return server


def client_environment(url: str, home: Path, token: str | None = "hf_test", xet: bool = False) -> dict[str, str]:
    """The whole environment of a client process that talks to the server at ``url`` and writes below ``home`` only."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": url,
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return environment | ({"HF_TOKEN": token} if token else {})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m tests.hub_server",
        description="Serve a small Hugging Face Hub on 127.0.0.1 until interrupted.",
        epilog="example:\n  python -m tests.hub_server --port 8080 --xet\n\nfaults, posted as a JSON list to /_test/faults:\n"
        + "\n".join(f"  {kind:<14} {text}" for kind, text in KINDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--part-size", type=int, default=16 * 2**20, help="bytes of a part of a large upload (16 MiB)")
    parser.add_argument("--no-cdn", action="store_true", help="serve large files from the same port")
    parser.add_argument("--xet", action="store_true", help="accept uploads by Xet's file-system mode")
    parser.add_argument("--quiet", action="store_true", help="do not print requests")
    args = parser.parse_args(argv)
    with LocalHub(args.port, part_size=args.part_size, cdn=not args.no_cdn, xet=args.xet) as hub:
        hub.verbose = not args.quiet
        print(
            f"export HF_ENDPOINT={hub.url} HF_TOKEN=hf_test HF_HUB_DISABLE_XET={int(not args.xet)}   # write to org/...",
            flush=True,
        )
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
