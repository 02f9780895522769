"""One commit, made once: a reply that was lost is answered by looking at what is there, and what arrived is compared."""

import hashlib
import time
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from moe_hf.checksums import file_sha256
from moe_hf.errors import MoEError
from moe_hf.hub.account import explained, status_of


ATTEMPTS = 3
# Before another attempt, where the server does not say how long; the client itself waits at most 8 s between its own.
WAIT_SECONDS, LONGEST_WAIT = 2.0, 120.0
# 412 is answered to a repeated commit whose first reply was lost, too: the files are compared before it is believed.
_PASSING = (408, 412, 429)
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


def commit_files(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path],
    *,
    commit_message: str,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Send files in one commit, and compare every checksum afterwards.

    The commit names its parent, so that it cannot be made twice; files that arrived before are not sent again; a commit or an
    open proposal that has all files already is returned. Weight files of an earlier model that the new one does not
    replace are deleted in the same commit: transformers would load a stale `model.safetensors` before new shards.

    Args:
        files (`Mapping[str, Path]`): names in the repository, and where the bytes are.

    Raises:
        `MoEError`: the transfer failed for good, the branch was moved by others, or a file did not arrive whole.
    """
    description = {"commit_message": commit_message, "commit_description": commit_description}
    parent = _head(api, repo_id, revision)
    for attempt in range(1, ATTEMPTS + 1):
        # The client marks its operations, so each attempt has new ones.
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        try:
            info = _open_proposal(api, repo_id, operations, commit_message) if create_pr else None
            if info is None:
                stale = _stale_weights(api, repo_id, revision, files)
                where = {"create_pr": True} if create_pr else {"revision": revision, "parent_commit": parent}
                info = api.create_commit(repo_id, [*operations, *stale], **description, **where)
            break
        except httpx2.HTTPError as error:
            status = status_of(error)
            is_final = status is not None and status < 500 and status not in _PASSING
            if is_final or attempt == ATTEMPTS:
                raise explained(api, repo_id, error) from error
            time.sleep(_wait_before_next(error, attempt))
        except (RuntimeError, OSError) as error:
            # Of uploads, which the client has repeated already.
            raise explained(api, repo_id, error) from error
        except ValueError as error:
            raise MoEError(f"The Hub refuses what was to be pushed to {repo_id}: {error}") from error
    check_arrived(api, repo_id, info.oid, operations)
    return info


def _head(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    try:
        return api.model_info(repo_id, revision=revision).sha
    except httpx2.HTTPError as error:
        raise explained(api, repo_id, error) from error


def _wait_before_next(error: BaseException, attempt: int) -> float:
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), LONGEST_WAIT) if asked.isdigit() else WAIT_SECONDS * attempt


def _stale_weights(
    api: HfApi, repo_id: str, revision: str | None, files: Mapping[str, Path]
) -> list[CommitOperationDelete]:
    if not any(_is_weight_file(name) for name in files):
        return []
    names = [entry.path for entry in api.list_repo_tree(repo_id, revision=revision) if isinstance(entry, RepoFile)]
    return [CommitOperationDelete(name) for name in names if _is_weight_file(name) and name not in files]


def _is_weight_file(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _WEIGHTS)


def _open_proposal(api: HfApi, repo_id: str, operations: list[CommitOperationAdd], title: str) -> CommitInfo | None:
    """An open pull request of this title that has all the files already."""
    for proposal in api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open"):
        reference = f"refs/pr/{proposal.num}"
        if proposal.title == title and not _differing(remote_files(api, repo_id, reference), operations):
            oid = api.model_info(repo_id, revision=reference).sha
            return CommitInfo(
                commit_url=f"{api.endpoint}/{repo_id}/commit/{oid}",
                commit_message=title,
                commit_description="",
                oid=oid,
                pr_url=proposal.url,
                _endpoint=api.endpoint,
            )
    return None


def remote_files(api: HfApi, repo_id: str, revision: str | None) -> dict[str, RepoFile]:
    """What the Hub lists at a revision, by name."""
    try:
        tree = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
    except EntryNotFoundError:
        # A repository without files has no tree.
        tree = []
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def has_bytes_of(entry: RepoFile, path: Path, sha256: str | None = None) -> bool:
    """Whether a file here is the one that the Hub lists: size, and sha256 of large or git's sha1 of small files.

    Args:
        sha256 (`str`, *optional*): of the file, where it is known.
    """
    if path.stat().st_size != entry.size:
        return False
    if entry.lfs is not None:
        return (sha256 or file_sha256(path)) == entry.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == entry.blob_id


def _differing(listed: Mapping[str, RepoFile], operations: list[CommitOperationAdd]) -> list[str]:
    """Names of operations whose bytes are not what the Hub lists."""
    different = []
    for operation in operations:
        entry = listed.get(operation.path_in_repo)
        known = operation.upload_info.sha256.hex() if entry is not None and entry.lfs is not None else None
        if entry is None or not has_bytes_of(entry, Path(str(operation.path_or_fileobj)), known):
            different.append(operation.path_in_repo)
    return different


def check_arrived(api: HfApi, repo_id: str, revision: str, operations: list[CommitOperationAdd]) -> None:
    """Compare names, sizes and checksums of everything that was sent with what the Hub lists.

    Raises:
        `MoEError`: names the first file that differs.
    """
    try:
        different = _differing(remote_files(api, repo_id, revision), operations)
    except httpx2.HTTPError as error:
        raise explained(api, repo_id, error) from error
    if different:
        raise MoEError(
            f"{different[0]} did not arrive whole in {repo_id} (commit {revision}), nor did {len(different) - 1} others: "
            "push again to repair."
        )
