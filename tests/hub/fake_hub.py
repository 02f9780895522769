"""A Hub on this machine, which the unmodified `huggingface_hub` client talks to, over LFS or over the real xet client.

It keeps repositories in memory, checks tokens, and can be told to fail. Requests that saving, pushing, proposing, pulling
and loading models do not make get status 404. Over xet the bytes go into a `local://` store that hf_xet itself writes and
reads, and the server knows sizes and hashes only, as the Hub does.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.xet_store import xet_hashes


USER = "tester"
TOKEN = "hf_testertoken"
READ_TOKEN = "hf_testerreads"
# In several parts goes what is larger than one, as on the Hub (there 5 GB).
PART_BYTES = 50_000
TREE_PAGE = 20
# The Hub sends files with these names or above this size through LFS.
LFS_NAMES = (".safetensors", ".bin", ".pt")
LFS_BYTES = 1_000_000


@dataclass
class StoredFile:
    """A file of a commit."""

    content: bytes
    is_lfs: bool
    # Of a file whose bytes are in the xet store.
    xet: tuple[str, int] | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if self.xet is None else self.xet[1]

    @property
    def git_oid(self) -> str:
        """sha1 as git computes it for a blob, of a large file for its pointer."""
        content = self.content if self.xet is None else self.xet[0].encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        """sha256 of the content."""
        return hashlib.sha256(self.content).hexdigest() if self.xet is None else self.xet[0]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of `method` whose path and query contain `part`.

    Attributes:
        kind: `"status"`, `"cut"` (the connection is reset, in the middle of what is received or sent), or `"corrupt"` (a
            changed byte in what is sent).
        after: do what was asked for first, so that only the answer is lost.
    """

    method: str
    part: str
    kind: str = "status"
    status: int = 500
    times: int = 1
    after: bool = False
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Commit:
    """A commit: the whole tree, and its message."""

    oid: str
    files: dict[str, StoredFile]
    title: str


@dataclass
class Repository:
    """A repository: commits by branch, the newest last."""

    private: bool
    branches: dict[str, list[Commit]] = field(
        default_factory=lambda: {"main": [Commit("0" * 40, {}, "initial commit")]}
    )

    # Titles of pull requests, whose branches are `refs/pr/1` and so on.
    proposals: list[str] = field(default_factory=list)

    def commit_at(self, revision: str) -> Commit | None:
        """The newest commit of a branch, or the commit with this id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


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
        handler = type("Handler", (_Handler,), {"hub": self})
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


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/whoami-v2", "who_am_i"),
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "create_branch"),
        ("DELETE", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "delete_branch"),
        ("GET", r"/api/models/([^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/([^/]+/[^/]+)/commits/([^/]+)", "commits"),
        ("POST", r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", "paths_info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/discussions", "discussions"),
        ("GET", r"/api/models/([^/]+/[^/]+)/xet-(?:read|write)-token/([^/]+)", "xet_token"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/_blob/([0-9a-f]{64})", "receive_blob"),
        ("PUT", r"/_part/([0-9a-f]{64})/([0-9]+)", "receive_part"),
        ("POST", r"/_complete/([0-9a-f]{64})", "complete"),
        ("POST", r"/_verify", "verify"),
        ("GET|HEAD", r"/_blob/([0-9a-f]{64})", "send_blob"),
        ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def log_message(self, *args):
        pass

    def _handle(self):
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        self.hub.requests.append((self.command, split.path))
        fault = self.hub.take_fault(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault.kind == "cut" and self.command == "PUT":
            self.rfile.read(length // 2)
            return self._reset()
        self.body = self.rfile.read(length)
        try:
            if fault and fault.kind == "status" and not fault.after:
                raise _Refusal(fault.status, "planned fault", headers=fault.headers)
            answer = self._dispatch(split.path)
            if fault and fault.kind == "status":
                raise _Refusal(fault.status, "planned fault", headers=fault.headers)
        except _Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            answer = refusal.status, {"error": str(refusal)}, headers | refusal.headers
        status, content, headers = answer
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json"} | headers
        if fault and fault.kind == "cut" and fault.after:
            return self._reset()
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

    def _reset(self):
        """Close the connection as a machine that died does: with a reset."""
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
        raise _Refusal(404, f"the fake Hub does not know {self.command} {path}")

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") in (f"Bearer {TOKEN}", f"Bearer {READ_TOKEN}")

    def _require_token(self, write: bool = True):
        if not self._is_known():
            raise _Refusal(401, "Invalid credentials in Authorization header")
        if write and self.headers["Authorization"].endswith(READ_TOKEN):
            raise _Refusal(403, "this token may read only")

    def _repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self._is_known()):
            raise _Refusal(404 if self._is_known() else 401, "Repository not found", "RepoNotFound")
        return repository

    def _commit_at(self, repo_id: str, revision: str | None) -> Commit:
        commit = self._repository(repo_id).commit_at(revision or "main")
        if commit is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def who_am_i(self):
        self._require_token(write=False)
        role = "read" if self.headers["Authorization"].endswith(READ_TOKEN) else "write"
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return 200, {"name": USER, "type": "user", "orgs": [], "auth": auth}, {}

    def create_repository(self):
        self._require_token()
        asked = json.loads(self.body)
        namespace = asked.get("organization") or USER
        if namespace != USER:
            raise _Refusal(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
        repo_id = f"{namespace}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        with self.hub.lock:
            if repo_id in self.hub.repositories:
                return 409, answer | {"error": "You already created this model repo"}, {}
            is_private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories[repo_id] = Repository(private=bool(is_private))
        return 200, answer, {}

    def create_branch(self, repo_id: str, branch: str):
        self._require_token()
        repository = self._repository(repo_id)
        if branch in repository.branches:
            raise _Refusal(409, "Reference already exists")
        repository.branches[branch] = list(repository.branches["main"])
        return 200, {}, {}

    def delete_branch(self, repo_id: str, branch: str):
        self._require_token()
        self._repository(repo_id).branches.pop(branch, None)
        return 200, {}, {}

    def refs(self, repo_id: str):
        branches = self._repository(repo_id).branches
        listed = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c[-1].oid} for n, c in branches.items()]
        return 200, {"branches": listed, "tags": [], "converts": []}, {}

    def commits(self, repo_id: str, revision: str):
        self._commit_at(repo_id, revision)
        listed = self._repository(repo_id).branches[revision][::-1]
        date = "2026-01-01T00:00:00.000Z"
        return 200, [{"id": c.oid, "title": c.title, "message": "", "authors": [], "date": date} for c in listed], {}

    def paths_info(self, repo_id: str, revision: str):
        files = self._commit_at(repo_id, revision).files
        asked = json.loads(self.body)["paths"]
        return 200, [self._entry(path, files[path]) for path in asked if path in files], {}

    def discussions(self, repo_id: str):
        listed = [
            {
                "title": title,
                "num": number,
                "author": {"name": USER},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "open",
                "repo": {"name": repo_id, "type": "model"},
                "isPullRequest": True,
            }
            for number, title in enumerate(self._repository(repo_id).proposals, 1)
        ]
        return 200, {"discussions": listed, "count": len(listed), "start": 0}, {}

    def xet_token(self, repo_id: str, revision: str):
        self._repository(repo_id)
        url, expiry = f"local://{self.hub.xet_store}", str(int(time.time()) + 3600)
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": expiry}
        return 200, {"casUrl": url, "accessToken": "xet", "exp": int(expiry)}, headers

    def validate_card(self):
        content = json.loads(self.body)["content"]
        errors = [] if re.match(r"---\n.*?\n---\n", content, re.DOTALL) else [{"message": "no metadata"}]
        return (400 if errors else 200), {"errors": errors, "warnings": []}, {}

    def preupload(self, repo_id: str, revision: str):
        self._require_token()
        there = self._commit_at(repo_id, revision).files
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(LFS_NAMES) or asked["size"] > LFS_BYTES else "regular"
            file = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in there:
                file["oid"] = there[path].sha256 if there[path].is_lfs else there[path].git_oid
            files.append(file)
        return 200, {"files": files}, {}

    def lfs_batch(self, repo_id: str):
        self._require_token()
        self._repository(repo_id)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, query = asked["oid"], f"?repo={repo_id}"
            upload = {"href": f"{self.hub.url}/_blob/{oid}{query}", "header": {}}
            if asked["size"] > PART_BYTES:
                count = -(-asked["size"] // PART_BYTES)
                urls = {str(n): f"{self.hub.url}/_part/{oid}/{n}{query}" for n in range(1, count + 1)}
                upload = {
                    "href": f"{self.hub.url}/_complete/{oid}{query}",
                    "header": {"chunk_size": str(PART_BYTES)} | urls,
                }
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/_verify"}}
            there = {} if oid in self.hub.known else {"actions": actions}
            objects.append({"oid": oid, "size": asked["size"]} | there)
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def receive_blob(self, sha256: str):
        return self._keep_blob(sha256, self.body, len(self.body))

    def receive_part(self, sha256: str, number: str):
        with self.hub.lock:
            self.hub.parts[sha256, int(number)] = self.body
            self.hub.uploaded_bytes += len(self.body)
        return 200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}

    def complete(self, sha256: str):
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        return self._keep_blob(sha256, b"".join(self.hub.parts[sha256, number] for number in numbers), 0)

    def _keep_blob(self, sha256: str, content: bytes, received: int):
        if hashlib.sha256(content).hexdigest() != sha256:
            raise _Refusal(400, "sha256 does not match")
        with self.hub.lock:
            self.hub.blobs[sha256] = content
            self.hub.known.add(sha256)
            self.hub.uploaded_bytes += received
        return 200, b"", {"ETag": f'"{sha256}"'}

    def verify(self):
        asked = json.loads(self.body)
        content = self.hub.blobs.get(asked["oid"])
        if content is None or len(content) != asked["size"]:
            raise _Refusal(404, "no such object")
        return 200, {}, {}

    def send_blob(self, sha256: str):
        return 200, self.hub.blobs[sha256], {"ETag": f'"{sha256}"'}

    def commit(self, repo_id: str, revision: str):
        self._require_token()
        repository = self._repository(repo_id)
        parent = self._commit_at(repo_id, revision)
        title, files = "", dict(parent.files)
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent.oid):
                    raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), is_lfs=False)
            elif item["key"] == "lfsFile":
                files[value["path"]] = self._large_file(value["oid"], value["size"])
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
            else:
                raise _Refusal(400, f"unexpected operation {item['key']}")
        proposal = None
        if "create_pr" in self.query:
            with self.hub.lock:
                repository.proposals.append(title)
                revision = f"refs/pr/{len(repository.proposals)}"
                repository.branches[revision] = list(repository.branches["main"])
            proposal = f"{self.hub.url}/{repo_id}/discussions/{len(repository.proposals)}"
        oid = self.hub.add_commit(repo_id, revision, files, title).oid
        url = f"{self.hub.url}/{repo_id}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": proposal}, {}

    def _large_file(self, sha256: str, size: int) -> StoredFile:
        if self.hub.xet_store is None:
            return StoredFile(self.hub.blobs[sha256], is_lfs=True)
        if sha256 not in xet_hashes(self.hub.xet_store):
            raise _Refusal(400, "the bytes of a large file were not uploaded")
        return StoredFile(b"", is_lfs=True, xet=(sha256, size))

    def info(self, repo_id: str, revision: str | None):
        commit = self._commit_at(repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        repository = self.hub.repositories[repo_id]
        facts = {"id": repo_id, "sha": commit.oid, "private": repository.private, "siblings": siblings, "tags": []}
        return 200, facts, {}

    def tree(self, repo_id: str, revision: str, folder: str | None):
        commit = self._commit_at(repo_id, revision)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        entries = [self._entry(path, file) for path, file in sorted(commit.files.items()) if path.startswith(prefix)]
        if "recursive" not in self.query or self.query["recursive"] == ["False"]:
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        if prefix and not entries:
            raise _Refusal(404, f"{folder} does not exist", "EntryNotFound")
        start = int(self.query.get("cursor", ["0"])[0])
        path, _, query = self.path.partition("?")
        more = "&".join(part for part in query.split("&") if part and not part.startswith("cursor="))
        following = f"{self.hub.url}{path}?{more}&cursor={start + TREE_PAGE}"
        headers = {"Link": f'<{following}>; rel="next"'} if len(entries) > start + TREE_PAGE else {}
        return 200, entries[start : start + TREE_PAGE], headers

    def _entry(self, path: str, file: StoredFile) -> dict:
        entry = {"type": "file", "path": path, "size": file.size, "oid": file.git_oid}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
        if file.xet is not None:
            entry["xetHash"] = xet_hashes(self.hub.xet_store)[file.sha256]
        return entry

    def resolve(self, repo_id: str, revision: str, path: str):
        commit = self._commit_at(repo_id, revision)
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if file is None:
            raise _Refusal(404, f"{path} does not exist", "EntryNotFound")
        if not file.is_lfs:
            return 200, file.content, headers | {"ETag": f'"{file.git_oid}"'}
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if file.xet is not None:
            headers["X-Xet-Hash"] = xet_hashes(self.hub.xet_store)[file.sha256]
            headers["X-Xet-Refresh-Route"] = f"{self.hub.url}/api/models/{repo_id}/xet-read-token/{commit.oid}"
        return 302, b"", headers | {"Location": f"{self.hub.blob_url}/{file.sha256}?repo={repo_id}"}
