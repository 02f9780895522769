"""A fake Hub's answers about accounts, repositories, branches, proposals, commits and lists of files."""

import base64
import json
import re

from tests.hub.fake_repositories import Repository, StoredFile
from tests.hub.fake_requests import READ_TOKEN, Refusal, RequestHandler
from tests.hub.xet_store import xet_hashes


USER = "tester"
TREE_PAGE = 20
# The Hub sends files with these names or above this size through LFS.
LFS_NAMES = (".safetensors", ".bin", ".pt")
LFS_BYTES = 1_000_000


class RepositoryRoutes(RequestHandler):
    """Everything but the bytes of large files and downloads."""

    REPOSITORY_ROUTES = (
        ("GET", r"/api/whoami-v2", "who_am_i"),
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "create_branch"),
        ("DELETE", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "delete_branch"),
        ("GET", r"/api/models/([^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/([^/]+/[^/]+)/commits/([^/]+)", "commits"),
        ("POST", r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", "paths_info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/discussions", "discussions"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
    )

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
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
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
            raise Refusal(409, "Reference already exists")
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
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), is_lfs=False)
            elif item["key"] == "lfsFile":
                files[value["path"]] = self._large_file(value["oid"], value["size"])
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
            else:
                raise Refusal(400, f"unexpected operation {item['key']}")
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
            raise Refusal(400, "the bytes of a large file were not uploaded")
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
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
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
