"""A fake Hub's answers about the bytes of files: LFS and xet uploads, and downloads."""

import hashlib
import json
import time

from tests.hub.fake_requests import Refusal, RequestHandler
from tests.hub.xet_store import xet_hashes


# In several parts goes what is larger than one, as on the Hub (there 5 GB).
PART_BYTES = 50_000


class FileRoutes(RequestHandler):
    """Uploads of large files, downloads of all."""

    FILE_ROUTES = (
        ("GET", r"/api/models/([^/]+/[^/]+)/xet-(?:read|write)-token/([^/]+)", "xet_token"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/_blob/([0-9a-f]{64})", "receive_blob"),
        ("PUT", r"/_part/([0-9a-f]{64})/([0-9]+)", "receive_part"),
        ("POST", r"/_complete/([0-9a-f]{64})", "complete"),
        ("POST", r"/_verify", "verify"),
        ("GET|HEAD", r"/_blob/([0-9a-f]{64})", "send_blob"),
        ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def xet_token(self, repo_id: str, revision: str):
        self._repository(repo_id)
        url, expiry = f"local://{self.hub.xet_store}", str(int(time.time()) + 3600)
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": expiry}
        return 200, {"casUrl": url, "accessToken": "xet", "exp": int(expiry)}, headers

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
            raise Refusal(400, "sha256 does not match")
        with self.hub.lock:
            self.hub.blobs[sha256] = content
            self.hub.known.add(sha256)
            self.hub.uploaded_bytes += received
        return 200, b"", {"ETag": f'"{sha256}"'}

    def verify(self):
        asked = json.loads(self.body)
        content = self.hub.blobs.get(asked["oid"])
        if content is None or len(content) != asked["size"]:
            raise Refusal(404, "no such object")
        return 200, {}, {}

    def send_blob(self, sha256: str):
        return 200, self.hub.blobs[sha256], {"ETag": f'"{sha256}"'}

    def resolve(self, repo_id: str, revision: str, path: str):
        commit = self._commit_at(repo_id, revision)
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if file is None:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        if not file.is_lfs:
            return 200, file.content, headers | {"ETag": f'"{file.git_oid}"'}
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if file.xet is not None:
            headers["X-Xet-Hash"] = xet_hashes(self.hub.xet_store)[file.sha256]
            headers["X-Xet-Refresh-Route"] = f"{self.hub.url}/api/models/{repo_id}/xet-read-token/{commit.oid}"
        return 302, b"", headers | {"Location": f"{self.hub.blob_url}/{file.sha256}?repo={repo_id}"}
