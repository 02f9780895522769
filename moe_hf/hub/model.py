"""Save a model in memory as one folder that is whole or absent, and push it to the Hub.

Either way the model takes its code, its tokenizer and a card along.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, get_token
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from moe_hf.dense_sources import load_dense_tokenizer
from moe_hf.errors import MoEError
from moe_hf.finetuning.model_to_save import model_to_save
from moe_hf.finetuning.trained_tensors import inner_model
from moe_hf.gguf_files import gguf_file_of
from moe_hf.hub.account import final_card, open_repository, preflight_account
from moe_hf.hub.contents import files_to_push, refuse_secrets
from moe_hf.hub.transfer import commit_files
from moe_hf.reporting.card import hub_id, model_card
from moe_hf.saving import atomic_folder
from moe_hf.unwrapping import unwrapped


logger = logging.get_logger(__name__)


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
    model = unwrapped(model, keep_peft=True)
    check_vocabulary(model, tokenizer)
    card = model_card(inner_model(model), card_facts=card_facts, tokenizer=tokenizer)
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
        overwrite_card (`bool`, *optional*, defaults to `False`): replace a card that is already in the repository. It stays
            otherwise, and gets the tags and results that it lacks; pictures and `.eval_results` are pushed in any case.

    Returns:
        `CommitInfo` of the commit, or of the newest one when nothing changed.

    Raises:
        `MoEError`: a bad name, no or a wrong token, no right to write, `private=True` on a public repository, a bad
            card, or a transfer that failed.
    """
    model = unwrapped(model, keep_peft=True)
    api = HfApi(token=token)
    repo_id = preflight_account(api, repo_id)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        check_vocabulary(model, tokenizer)
    elif tokenizer is not False:
        tokenizer = _find_tokenizer(model)
    tokenizer = tokenizer or None
    # Before the repository is made, so that a bad fact leaves no empty one behind.
    card = model_card(inner_model(model), repo_id=repo_id, card_facts=card_facts, tokenizer=tokenizer)
    open_repository(api, repo_id, private=private, revision=revision, create_pr=create_pr)
    card = final_card(
        api, repo_id, revision, card, [*(inner_model(model).model_tags or []), *(tags or [])], overwrite_card
    )
    with tempfile.TemporaryDirectory() as folder:
        _write_files(Path(folder), model, tokenizer, card, {"max_shard_size": max_shard_size})
        if (Path(folder) / "config.json").is_file():
            shorten_local_source(Path(folder) / "config.json")
        files, _ = files_to_push(Path(folder))
        refuse_secrets(files, api.token if isinstance(api.token, str) else get_token())
        return commit_files(
            api,
            repo_id,
            files,
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
    with model_to_save(model) as saved:
        saved.save_pretrained(folder, **save_kwargs)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    card.save(folder / "README.md")


def shorten_local_source(config_file: Path) -> None:
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
        tokenizer = tokenizer_in(source)
        # Without one the model is pushed alone, as transformers does.
        if tokenizer is not None and len(tokenizer) <= model.get_input_embeddings().num_embeddings:
            logger.info(f"The tokenizer of {source} is pushed along.")
            return tokenizer
    logger.warning(f"No tokenizer was found beside the source of {type(model).__name__}: pass tokenizer=...")
    return None


def tokenizer_in(source: str | os.PathLike) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder, a GGUF file or the Hub's cache, None where there is none; no network."""
    try:
        if Path(source).expanduser().exists() and gguf_file_of(source) is not None:
            return load_dense_tokenizer(source)
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        return None
