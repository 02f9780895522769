"""Save a model as one folder that is whole or absent, and share it on the Hub in one commit.

Either way the model takes its code, its tokenizer and a card along; pickles and training state stay behind.
"""

import json
import os
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.reporting.card import hub_id, model_card
from moe_hf.saving import MANIFEST_NAME, atomic_folder


logger = logging.get_logger(__name__)

# Pickles can run code where they are loaded; the rest is training state, secrets, or true of one folder only.
NEVER_PUSHED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.pyc", ".env*", ".*.tmp-*", MANIFEST_NAME)
_LOGIN_HINT = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
_ATTEMPTS = 2


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    output_dir: str | os.PathLike,
    card_facts: dict[str, Any] | None = None,
    **save_kwargs,
) -> Path:
    """Save a model with its code, its tokenizer, a card and a manifest, as a folder that is whole or absent.

    Args:
        model (`PreTrainedModel`): ours or any other of transformers.
        tokenizer (`PreTrainedTokenizerBase` or `None`): saved along, with its chat template.
        output_dir (`str` or `os.PathLike`): must not exist.
        card_facts (`dict`, *optional*): see [`model_card`].
        **save_kwargs: of `save_pretrained`, such as `max_shard_size`.

    Returns:
        `pathlib.Path` of the folder.

    Raises:
        `MoEError`: the folder exists or cannot be written, the tokenizer has more tokens than the model, or a fact has
            no place in the card; nothing is left behind.
    """
    check_vocabulary(model, tokenizer)
    card = model_card(model, card_facts=card_facts, has_tokenizer=tokenizer is not None)
    with atomic_folder(output_dir) as folder:
        _write_files(folder, model, tokenizer, card, save_kwargs)
    return Path(output_dir)


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | bool | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
    card_facts: dict[str, Any] | None = None,
    overwrite_card: bool = False,
) -> CommitInfo:
    """Push a model with its code, its tokenizer and a card to the Hub, in one commit.

    Login, name, right to write, visibility and card are checked before a byte of the weights is sent. A push that was
    cut off is continued by the same call: files that arrived are not sent again, and an unchanged model makes no commit.

    Args:
        model (`PreTrainedModel`): ours or any other of transformers.
        repo_id (`str`): `"namespace/name"`, or `"name"` in your own namespace; made if it does not exist.
        tokenizer (`PreTrainedTokenizerBase` or `bool`, *optional*): pushed along. By default the one found beside the
            weights that the model was loaded or upcycled from; `False` for none.
        private (`bool`, *optional*): visibility of a new repository, the account's default if not given.
        token (`str` or `bool`, *optional*): the stored one by default.
        commit_message (`str`, *optional*): first line of the commit.
        commit_description (`str`, *optional*): its text.
        revision (`str`, *optional*): branch to push to, made if it does not exist.
        create_pr (`bool`, *optional*, defaults to `False`): propose the commit instead of making it.
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): largest file of weights.
        tags (`list[str]`, *optional*): added to the card's.
        card_facts (`dict`, *optional*): see [`model_card`].
        overwrite_card (`bool`, *optional*, defaults to `False`): replace a card that is already in the repository.

    Returns:
        `CommitInfo` of the commit, or of the newest one when nothing changed.

    Raises:
        `MoEError`: a bad name, no or a wrong token, no right to write, `private=True` on a public repository, a bad
            card, or a transfer that failed.
    """
    api = HfApi(token=token)
    repo_id = _preflight_account(api, repo_id)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        check_vocabulary(model, tokenizer)
    elif tokenizer is not False:
        tokenizer = _find_tokenizer(model)
    tokenizer = tokenizer or None
    # Before the repository is made, so that a bad fact leaves no empty one behind.
    card = model_card(model, repo_id=repo_id, card_facts=card_facts, has_tokenizer=tokenizer is not None)
    _open_repository(api, repo_id, private, None if create_pr else revision)
    card = _final_card(api, repo_id, revision, card, [*(model.model_tags or []), *(tags or [])], overwrite_card)
    with tempfile.TemporaryDirectory() as folder:
        _write_files(Path(folder), model, tokenizer, card, {"max_shard_size": max_shard_size})
        _shorten_local_source(Path(folder) / "config.json")
        return _commit_folder(
            api,
            Path(folder),
            repo_id,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _write_files(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    card: ModelCard,
    save_kwargs: dict[str, Any],
) -> None:
    model.save_pretrained(folder, **save_kwargs)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    card.save(folder / "README.md")


def _shorten_local_source(config_file: Path) -> None:
    """Keep of a source folder its name only: where it lay on this machine is nobody's business."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    source = (config.get("upcycling") or {}).get("source")
    if source and hub_id(source) is None:
        config["upcycling"]["source"] = Path(source).name
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings.

    Raises:
        `MoEError`: with both numbers.
    """
    size = model.get_input_embeddings().num_embeddings
    if tokenizer is not None and len(tokenizer) > size:
        raise MoEError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {size} embeddings: it is not this model's. Give "
            "the tokenizer that the model was trained with, or resize with model.resize_token_embeddings(len(tokenizer))."
        )


def _find_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights that a model came from, if it is on this machine; no network."""
    upcycling = getattr(model.config, "upcycling", None) or {}
    for source in filter(None, (model.name_or_path, upcycling.get("source"))):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError):
            # No tokenizer there: the model is pushed without one, as transformers does.
            continue
        if len(tokenizer) <= model.get_input_embeddings().num_embeddings:
            logger.info(f"The tokenizer of {source} is pushed along.")
            return tokenizer
    logger.warning(f"No tokenizer was found beside the source of {type(model).__name__}: pass tokenizer=...")
    return None


def _preflight_account(api: HfApi, repo_id: str) -> str:
    """The repository's full name, once its form is right and the token is accepted."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise MoEError(f"{repo_id!r} is no repository name: {error}") from error
    try:
        name = api.whoami()["name"]
    except LocalTokenNotFoundError as error:
        raise MoEError(f"Not logged in at {api.endpoint}. {_LOGIN_HINT}") from error
    except httpx2.HTTPError as error:
        raise _explained(api, repo_id, error) from error
    return repo_id if "/" in repo_id else f"{name}/{repo_id}"


def _open_repository(api: HfApi, repo_id: str, private: bool | None, branch: str | None) -> None:
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        is_private = api.model_info(repo_id).private
        if private and not is_private:
            raise MoEError(
                f"{repo_id} exists and is public, and private=True was asked for: nothing was sent. Make it private in "
                "its settings, or push to another name."
            )
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
    except httpx2.HTTPError as error:
        raise _explained(api, repo_id, error) from error


def _final_card(
    api: HfApi, repo_id: str, revision: str | None, card: ModelCard, tags: list[str], overwrite: bool
) -> ModelCard:
    """The card to push: one that people may have edited on the Hub stays, and gets the tags that it lacks."""
    if not overwrite:
        try:
            card = ModelCard.load(api.hf_hub_download(repo_id, "README.md", revision=revision))
        except EntryNotFoundError:
            # The first push: the new card is used.
            pass
        except httpx2.HTTPError as error:
            raise _explained(api, repo_id, error) from error
        except (ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise MoEError(
                f"The card that is in {repo_id} has broken metadata ({reason}): repair it there, or pass "
                "overwrite_card=True."
            ) from error
    missing = [tag for tag in dict.fromkeys(tags) if tag not in (card.data.tags or [])]
    if missing:
        card.data.tags = [*(card.data.tags or []), *missing]
    return card


def _commit_folder(api: HfApi, folder: Path, repo_id: str, **commit) -> CommitInfo:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = [file.relative_to(folder).as_posix() for file in files if not _is_never_pushed(file.name)]
    for attempt in range(1, _ATTEMPTS + 1):
        # The client marks its operations, so each attempt has new ones. What arrived before is not sent again.
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        try:
            info = api.create_commit(repo_id, operations, **commit)
            break
        except (httpx2.HTTPError, RuntimeError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            is_final = status is not None and status < 500
            if is_final or attempt == _ATTEMPTS:
                raise _explained(api, repo_id, error) from error
        except ValueError as error:
            raise MoEError(f"The Hub refuses what was to be pushed to {repo_id}: {error}") from error
    _check_arrived(api, repo_id, info, operations)
    return info


def _check_arrived(api: HfApi, repo_id: str, info: CommitInfo, operations: list[CommitOperationAdd]) -> None:
    """Compare names, sizes and, for large files, sha256 of what the Hub lists with what was sent."""
    try:
        listed = {entry.path: entry for entry in api.list_repo_tree(repo_id, recursive=True, revision=info.oid)}
    except httpx2.HTTPError as error:
        raise _explained(api, repo_id, error) from error
    for operation in operations:
        entry = listed.get(operation.path_in_repo)
        sha256 = getattr(getattr(entry, "lfs", None), "sha256", None)
        size = getattr(entry, "size", None)
        if size != operation.upload_info.size or sha256 not in (None, operation.upload_info.sha256.hex()):
            raise MoEError(
                f"{operation.path_in_repo} did not arrive whole in {repo_id} (commit {info.oid}): push again to repair."
            )


def _is_never_pushed(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in NEVER_PUSHED)


def _explained(api: HfApi, repo_id: str, error: Exception) -> MoEError:
    """One sentence about a failed request, and what to do."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = getattr(error, "server_message", None) or str(error).splitlines()[0]
    if status == 401:
        return MoEError(f"{api.endpoint} does not accept the token: {said}. {_LOGIN_HINT}")
    if status == 403:
        return MoEError(f"The token may not write to {repo_id}: {said}. Nothing was published. {_LOGIN_HINT}")
    if status is not None and status < 500:
        return MoEError(f"{api.endpoint} refused the push to {repo_id} with status {status}: {said}.")
    return MoEError(
        f"The push to {repo_id} failed: {said}. Push again: files that arrived are not sent a second time."
    )
