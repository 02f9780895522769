"""Requests to a fake Hub: who asks, which method answers, planned faults; the answers are in the modules of its routes."""

import json
import re
import socket
import struct
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.fake_repositories import Commit, Repository


if TYPE_CHECKING:
    from tests.hub.fake_hub import FakeHub


TOKEN = "hf_testertoken"
READ_TOKEN = "hf_testerreads"


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


class RequestHandler(BaseHTTPRequestHandler):
    """Finds the method for a request in `ROUTES`, which subclasses fill: methods, pattern of the path, name."""

    hub: "FakeHub"
    protocol_version = "HTTP/1.1"
    ROUTES: tuple[tuple[str, str, str], ...] = ()

    def log_message(self, *args):
        pass

    def _handle(self):
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        self.hub.requests.append((self.command, split.path))
        fault = self.hub.take_fault(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault.kind in ("cut", "hang") and self.command == "PUT":
            self.rfile.read(length // 2)
            return self._reset() if fault.kind == "cut" else self._hang()
        self.body = self.rfile.read(length)
        if fault and fault.kind == "hang" and not fault.after:
            return self._hang()
        try:
            if fault and fault.kind == "status" and not fault.after:
                raise Refusal(fault.status, "planned fault", headers=fault.headers)
            answer = self._dispatch(split.path)
            if fault and fault.kind == "status":
                raise Refusal(fault.status, "planned fault", headers=fault.headers)
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            answer = refusal.status, {"error": str(refusal)}, headers | refusal.headers
        status, content, headers = answer
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json"} | headers
        if fault and fault.after and fault.kind in ("cut", "hang"):
            return self._reset() if fault.kind == "cut" else self._hang()
        if fault and fault.kind == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if fault and fault.kind == "cut":
            self.wfile.write(content[: len(content) // 2])
            return self._reset()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _hang(self):
        self.hub.hanging.set()
        self.hub.released.wait()
        self._reset()

    def _reset(self):
        """Close the connection as a machine that died does: with a reset."""
        with suppress(OSError):
            self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def setup(self):
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self):
        self.hub.connections.discard(self.connection)
        # The connection may have been reset by plan.
        with suppress(OSError, ValueError):
            super().finish()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _dispatch(self, path: str):
        for methods, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                return getattr(self, name)(*(None if group is None else unquote(group) for group in match.groups()))
        raise Refusal(404, f"the fake Hub does not know {self.command} {path}")

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") in (f"Bearer {TOKEN}", f"Bearer {READ_TOKEN}")

    def _require_token(self, write: bool = True):
        if not self._is_known():
            raise Refusal(401, "Invalid credentials in Authorization header")
        if write and self.headers["Authorization"].endswith(READ_TOKEN):
            raise Refusal(403, "this token may read only")

    def _repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self._is_known()):
            raise Refusal(404 if self._is_known() else 401, "Repository not found", "RepoNotFound")
        return repository

    def _commit_at(self, repo_id: str, revision: str | None) -> Commit:
        commit = self._repository(repo_id).commit_at(revision or "main")
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit
