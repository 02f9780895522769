"""A minimal Hub on this machine, which the unmodified `huggingface_hub` client talks to (LFS transfers, no xet).

It keeps repositories in memory, checks tokens, and can be told to fail. Only the requests that saving, pushing and
loading models make are answered; others get status 404.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


USER = "tester"
TOKEN = "hf_testertoken"
# The Hub sends files with these names or above this size through LFS.
LFS_NAMES = (".safetensors", ".bin", ".pt")
LFS_BYTES = 1_000_000


@dataclass
class StoredFile:
    """A file of a commit."""

    content: bytes
    is_lfs: bool

    @property
    def git_oid(self) -> str:
        """sha1 as git computes it for a blob."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        """sha256 of the content."""
        return hashlib.sha256(self.content).hexdigest()


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
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploaded_bytes = 0
        self._faults: list[list] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # A download is redirected to another host name: on the same one the client follows without reading the headers.
        self.blob_url = f"http://localhost:{self._server.server_port}/_blob"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, method: str, part: str, status: int, times: int = 1, after: bool = False) -> None:
        """Answer the next `times` requests whose path contains `part` with `status`; `after` doing what they ask."""
        self._faults.append([method, part, status, times, after])

    def take_fault(self, method: str, path: str) -> tuple[int, bool] | None:
        """Status and moment of the fault that is planned for this request, if any."""
        with self.lock:
            for fault in self._faults:
                if fault[0] == method and fault[1] in path and fault[3] > 0:
                    fault[3] -= 1
                    return fault[2], fault[4]
        return None

    def titles(self, repo_id: str, branch: str = "main") -> list[str]:
        """Messages of a branch's commits, without the one that every repository starts with."""
        return [commit.title for commit in self.repositories[repo_id].branches[branch][1:]]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content by path of a revision."""
        return {path: file.content for path, file in self.repositories[repo_id].commit_at(revision).files.items()}


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/whoami-v2", "who_am_i"),
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "create_branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/_blob/([0-9a-f]{64})", "receive_blob"),
        ("GET|HEAD", r"/_blob/([0-9a-f]{64})", "send_blob"),
        ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def log_message(self, *args):
        pass

    def _handle(self):
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, split.path))
        fault = self.hub.take_fault(self.command, split.path)
        try:
            if fault and not fault[1]:
                raise _Refusal(fault[0], "planned fault")
            answer = self._dispatch(split.path)
            if fault:
                raise _Refusal(fault[0], "planned fault")
        except _Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            answer = refusal.status, {"error": str(refusal)}, headers
        status, content, headers = answer
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json"} | headers
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _dispatch(self, path: str):
        for methods, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                return getattr(self, name)(*(None if group is None else unquote(group) for group in match.groups()))
        raise _Refusal(404, f"the fake Hub does not know {self.command} {path}")

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _require_token(self):
        if not self._is_known():
            raise _Refusal(401, "Invalid credentials in Authorization header")

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
        self._require_token()
        return 200, {"name": USER, "type": "user", "orgs": [], "auth": {"type": "access_token"}}, {}

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
            url = f"{self.hub.url}/_blob/{asked['oid']}"
            actions = {} if asked["oid"] in self.hub.blobs else {"actions": {"upload": {"href": url, "header": {}}}}
            objects.append({"oid": asked["oid"], "size": asked["size"]} | actions)
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def receive_blob(self, sha256: str):
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise _Refusal(400, "sha256 does not match")
        with self.hub.lock:
            self.hub.blobs[sha256] = self.body
            self.hub.uploaded_bytes += len(self.body)
        return 200, b"", {"ETag": f'"{sha256}"'}

    def send_blob(self, sha256: str):
        return 200, self.hub.blobs[sha256], {"ETag": f'"{sha256}"'}

    def commit(self, repo_id: str, revision: str):
        self._require_token()
        repository = self._repository(repo_id)
        title, files = "", dict(self._commit_at(repo_id, revision).files)
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), is_lfs=False)
            elif item["key"] == "lfsFile":
                files[value["path"]] = StoredFile(self.hub.blobs[value["oid"]], is_lfs=True)
            else:
                raise _Refusal(400, f"unexpected operation {item['key']}")
        with self.hub.lock:
            commits = repository.branches[revision]
            oid = hashlib.sha1(f"{repo_id} {revision} {len(commits)}".encode()).hexdigest()
            commits.append(Commit(oid, files, title))
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"}, {}

    def info(self, repo_id: str, revision: str | None):
        commit = self._commit_at(repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        repository = self.hub.repositories[repo_id]
        facts = {"id": repo_id, "sha": commit.oid, "private": repository.private, "siblings": siblings, "tags": []}
        return 200, facts, {}

    def tree(self, repo_id: str, revision: str, folder: str | None):
        commit = self._commit_at(repo_id, revision)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        entries = []
        for path, file in sorted(commit.files.items()):
            if path.startswith(prefix):
                entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.git_oid}
                if file.is_lfs:
                    entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
                entries.append(entry)
        if prefix and not entries:
            raise _Refusal(404, f"{folder} does not exist", "EntryNotFound")
        return 200, entries, {}

    def resolve(self, repo_id: str, revision: str, path: str):
        commit = self._commit_at(repo_id, revision)
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if file is None:
            raise _Refusal(404, f"{path} does not exist", "EntryNotFound")
        if not file.is_lfs:
            return 200, file.content, headers | {"ETag": f'"{file.git_oid}"'}
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return 302, b"", headers | {"Location": f"{self.hub.blob_url}/{file.sha256}"}
