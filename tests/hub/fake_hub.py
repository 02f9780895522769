"""A Hub on this machine, which the unmodified `huggingface_hub` client talks to, over LFS or over the real xet client.

It keeps repositories in memory, checks tokens, and can be told to fail. Requests that saving, pushing, proposing, pulling
and loading models do not make get status 404. Over xet the bytes go into a `local://` store that hf_xet itself writes and
reads, and the server knows sizes and hashes only, as the Hub does.
"""

import hashlib
import socket
import threading
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.hub.fake_file_routes import FileRoutes
from tests.hub.fake_repositories import Commit, Fault, Repository, StoredFile
from tests.hub.fake_repository_routes import USER, RepositoryRoutes
from tests.hub.fake_requests import READ_TOKEN, TOKEN


__all__ = ["READ_TOKEN", "TOKEN", "USER", "Commit", "FakeHub", "Fault", "Repository", "StoredFile"]


class Handler(RepositoryRoutes, FileRoutes):
    """Answers every request."""

    ROUTES = RepositoryRoutes.REPOSITORY_ROUTES + FileRoutes.FILE_ROUTES


class FakeHub:
    """Run the server for the length of a `with` block.

    Attributes:
        url: the endpoint to put in `HF_ENDPOINT`.
        repositories: `Repository` by name.
        requests: `(method, path)` of each request.
        uploaded_bytes: bytes of LFS content received.

    Args:
        xet_store: a folder for the bytes of large files; over LFS if not given.
    """

    def __init__(self, xet_store: Path | None = None):
        self.xet_store = xet_store
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        # Those that an upload may leave out, as they are there.
        self.known: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.uploaded_bytes = 0
        self.parts: dict[tuple[str, int], bytes] = {}
        self._faults: list[Fault] = []
        self.lock = threading.Lock()
        # Set when a request hangs, and to let it go.
        self.hanging, self.released = threading.Event(), threading.Event()
        self._port = 0
        self.connections: set[socket.socket] = set()
        self.start()
        self.url = f"http://127.0.0.1:{self._port}"
        # A download is redirected to another host name: on the same one the client follows without reading the headers.
        self.blob_url = f"http://localhost:{self._port}/_blob"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop()

    def start(self) -> None:
        """Listen, on the same port as before."""
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections, and end those that there are."""
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, method: str, part: str, status: int = 500, times: int = 1, after: bool = False, **more) -> None:
        """Plan a [`Fault`]."""
        self._faults.append(Fault(method, part, status=status, times=times, after=after, **more))

    def release(self) -> None:
        """End the requests that hang, and be ready for the next ones."""
        self.released.set()
        self.hanging, self.released = threading.Event(), threading.Event()

    def forget_faults(self) -> None:
        """Nothing fails from here on."""
        self._faults.clear()

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault that is planned for this request, if any."""
        with self.lock:
            for fault in self._faults:
                if fault.method == method and fault.part in path and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def add_commit(self, repo_id: str, branch: str, files: dict[str, StoredFile], title: str) -> Commit:
        """A further commit on a branch, with the whole tree given."""
        with self.lock:
            commits = self.repositories[repo_id].branches[branch]
            oid = hashlib.sha1(f"{repo_id} {branch} {len(commits)}".encode()).hexdigest()
            commits.append(Commit(oid, files, title))
        return commits[-1]

    def titles(self, repo_id: str, branch: str = "main") -> list[str]:
        """Messages of a branch's commits, without the one that every repository starts with."""
        return [commit.title for commit in self.repositories[repo_id].branches[branch][1:]]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content by path of a revision."""
        return {path: file.content for path, file in self.repositories[repo_id].commit_at(revision).files.items()}
