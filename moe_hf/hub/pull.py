"""Pull a repository into a folder that is proven, and whole or absent."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from moe_hf.errors import MoEError
from moe_hf.hub.account import check_repo_id, explained
from moe_hf.hub.contents import is_never_pushed
from moe_hf.hub.transfer import has_bytes_of, remote_files
from moe_hf.modeling.index_names import refuse_outside
from moe_hf.saving import MANIFEST_NAME, publish_folder, refuse_existing, temporary_sibling, verify_manifest
from moe_hf.weight_checks import check_finite_weights, check_structure


_THREADS = 8
# What the client keeps beside the files of an unfinished download.
_CLIENT_FOLDER = ".cache"


def pull_folder(
    repo_id: str, folder: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Download a model, adapters or deltas from the Hub, and prove them before the folder is there.

    Every file is compared with the checksum that the Hub lists, and with the repository's `moe_hf_manifest.json` if it has
    one; weights must fit the configuration and hold no NaN or infinity. Pickles are left where they are. A pull that was cut
    off leaves `.NAME.tmp-pull-COMMIT` beside the destination, and the same call continues it.

    Args:
        repo_id (`str`): `"namespace/name"`.
        folder (`str` or `os.PathLike`): must not exist.
        revision (`str`, *optional*): branch, tag or commit; the newest commit of `main` by default.
        token (`str` or `bool`, *optional*): the stored one by default; public repositories need none.

    Returns:
        `pathlib.Path` of the folder, with a manifest.

    Raises:
        `MoEError`: the folder exists; no such repository or revision, or no right to read it; a transfer that failed; a
            file that is not what the Hub lists; or weights that are damaged, do not fit or are not finite.
    """
    check_repo_id(repo_id)
    destination = Path(os.path.abspath(Path(folder).expanduser()))
    refuse_existing(destination)
    api = HfApi(token=token)
    try:
        commit = api.model_info(repo_id, revision=revision).sha
        listed = remote_files(api, repo_id, commit)
    except httpx2.HTTPError as error:
        raise explained(api, repo_id, error, pulling=True) from error
    wanted = {name: entry for name, entry in listed.items() if name == MANIFEST_NAME or not is_never_pushed(name)}
    for name in wanted:
        refuse_outside(name, repo_id)
    if not wanted:
        raise MoEError(f"{repo_id} has no files that can be pulled (commit {commit}); pickles are never.")
    work = temporary_sibling(destination, f"pull-{commit[:12]}")
    _make_room(work, wanted)
    _download(api, repo_id, commit, wanted, work)
    _check_bytes(repo_id, wanted, work)
    shutil.rmtree(work / _CLIENT_FOLDER, ignore_errors=True)
    try:
        _check_contents(work, listed.keys() - wanted.keys())
    except MoEError:
        # The Hub has it like this, so that another pull would change nothing.
        shutil.rmtree(work, ignore_errors=True)
        raise
    publish_folder(work, destination)
    return destination


def _make_room(work: Path, wanted: dict[str, RepoFile]) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoEError(f"{work.parent} cannot be written: {error.strerror or error}.") from error
    missing = sum(entry.size for name, entry in wanted.items() if not (work / name).is_file())
    free = shutil.disk_usage(work).free
    if missing > free:
        raise MoEError(f"{work.parent} has {free:,} bytes free, and {missing:,} are needed: nothing was downloaded.")


def _download(api: HfApi, repo_id: str, commit: str, wanted: dict[str, RepoFile], work: Path) -> None:
    def fetch(name: str) -> None:
        api.hf_hub_download(repo_id, name, revision=commit, local_dir=work)

    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fetch, wanted))
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise explained(api, repo_id, error, pulling=True) from error


def _check_bytes(repo_id: str, wanted: dict[str, RepoFile], work: Path) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        equal = dict(
            zip(wanted, pool.map(lambda item: has_bytes_of(item[1], work / item[0]), wanted.items()), strict=True)
        )
    damaged = [name for name, is_equal in equal.items() if not is_equal]
    for name in damaged:
        # Without the client's note on it the file is downloaded anew, and only this one.
        (work / name).unlink()
        (work / _CLIENT_FOLDER / "huggingface" / "download" / f"{name}.metadata").unlink(missing_ok=True)
    if damaged:
        raise MoEError(
            f"{damaged[0]} of {repo_id} arrived with other bytes than the Hub lists, and so did {len(damaged) - 1} others: "
            "nothing was put in place. Pull again: only these are downloaded anew."
        )


def _check_contents(work: Path, left_out: set[str]) -> None:
    if (work / MANIFEST_NAME).is_file():
        verify_manifest(work, may_be_missing=left_out)
    if (work / "config.json").is_file():
        check_structure(work)
    check_finite_weights(work)
