"""Push a folder: a model as it is or as a native MoE of transformers, adapters of experts, or trained parameters."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, get_token
from transformers.utils import logging

from moe_hf.checksums import safetensors_header
from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_deltas import DELTAS_NAME
from moe_hf.finetuning.lora_files import LORA_NAME, PEFT_CONFIG
from moe_hf.finetuning.trained_files import TRAINED_NAME
from moe_hf.hub.account import check_repo_id, final_card, open_repository, preflight_account
from moe_hf.hub.contents import files_to_push, refuse_secrets
from moe_hf.hub.model import shorten_local_source, tokenizer_in
from moe_hf.hub.transfer import commit_files
from moe_hf.inspection import on_meta
from moe_hf.interchange import export_native
from moe_hf.reporting.card import METADATA_FACTS, hub_id, model_card
from moe_hf.reporting.run_results import run_facts, run_folder
from moe_hf.saving import MANIFEST_NAME, read_json_object, verify_manifest
from moe_hf.unwrapping import path_of
from moe_hf.weight_checks import check_structure


logger = logging.get_logger(__name__)

# What a folder is, by a file that it has; the first one counts.
KINDS = {
    "trained parameters": TRAINED_NAME,
    "expert deltas": DELTAS_NAME,
    "adapters of experts": LORA_NAME,
    "adapters of PEFT": PEFT_CONFIG,
    "model": "config.json",
}


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    target: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    card_facts: dict[str, Any] | None = None,
    overwrite_card: bool = False,
) -> CommitInfo:
    """Push a folder to the Hub in one commit: a model, adapters of `save_expert_lora`, or deltas of `save_expert_deltas`.

    Before a byte moves: the name, the token and its rights; the manifest, or the structure of the weights where there is
    none; the card; no secrets in the files. Pickles, training state and hidden files stay behind. The same call continues
    a push that was cut off, and makes no second commit when only the reply was lost. Afterwards the checksum of every file
    on the Hub is compared.

    Args:
        folder (`str` or `os.PathLike`): what `save_model`, `upcycle_checkpoint`, a trainer or `save_pretrained` wrote.
        repo_id (`str`): `"namespace/name"`, or `"name"` in your own namespace; made if it does not exist.
        target (`str`, *optional*): a family of `moe_hf.exact_targets` or `"auto"`: one of our models is exported to it, in
            the temporary directory of the machine, and that is pushed; it needs no code of ours.
        private (`bool`, *optional*): visibility of a new repository, the account's default if not given.
        token (`str` or `bool`, *optional*): the stored one by default.
        commit_message (`str`, *optional*): first line of the commit.
        commit_description (`str`, *optional*): its text.
        revision (`str`, *optional*): branch to push to, made if it does not exist.
        create_pr (`bool`, *optional*, defaults to `False`): propose the commit instead of making it.
        card_facts (`dict`, *optional*): for the card of a folder without a `README.md`, see [`model_card`]; of adapters
            and deltas the metadata and the title.
        overwrite_card (`bool`, *optional*, defaults to `False`): replace a card that is already in the repository. It stays
            otherwise, and gets the results of the new one; pictures and `.eval_results` are pushed in any case.

    Returns:
        `CommitInfo` of the commit, or of the newest one when nothing changed.

    Raises:
        `MoEError`: the folder is none of these, damaged, or holds a secret; its card is broken; a bad name, no or a wrong
            token, no right to write; the model has no exact native form; facts for a folder that has a card; or a transfer
            that failed.
    """
    folder = Path(path_of(folder, "push_model takes a model in memory")).expanduser()
    check_repo_id(repo_id)
    kind = _kind_of(folder)
    if target is not None and kind != "model":
        raise MoEError(f"{folder} holds {kind}, which have no native form: leave target={target!r} out.")
    api = HfApi(token=token)
    repo_id = preflight_account(api, repo_id)
    _check_whole(folder, kind)
    with tempfile.TemporaryDirectory(prefix="moe_hf-push-") as work:
        source = folder if target is None else export_native(folder, Path(work, "native"), target)
        files, left = files_to_push(source)
        refuse_secrets(files, api.token if isinstance(api.token, str) else get_token())
        card = _card_of(source, kind, repo_id, card_facts)
        files |= _without_local_paths(files, Path(work))
        open_repository(api, repo_id, private=private, revision=revision, create_pr=create_pr)
        card = final_card(api, repo_id, None if create_pr else revision, card, [], overwrite_card)
        card.save(Path(work, "README.md"))
        files |= {name: Path(work, name) for name in ("README.md", *getattr(card, "companions", ()))}
        left = [name for name in left if name != MANIFEST_NAME]
        if left:
            logger.warning(
                f"{len(left)} files stay behind (pickles, training state, hidden files): {', '.join(left[:5])}"
            )
        return commit_files(
            api,
            repo_id,
            files,
            commit_message=commit_message or f"Upload {kind} with moe_hf",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _kind_of(folder: Path) -> str:
    if not folder.is_dir():
        raise MoEError(f"{folder} is no folder: give one with a model, adapters or deltas.")
    for kind, name in KINDS.items():
        if (folder / name).is_file():
            return kind
    raise MoEError(f"{folder} is nothing that can be pushed: it has none of {', '.join(KINDS.values())}.")


def _check_whole(folder: Path, kind: str) -> None:
    if (folder / MANIFEST_NAME).is_file():
        verify_manifest(folder)
    if kind == "model":
        if not any(folder.glob("*.safetensors")):
            raise MoEError(
                f"{folder} has no weights in safetensors files, and pickles are not pushed. Load the model, and write it "
                "with moe_hf.hub.save_model or save_pretrained."
            )
        check_structure(folder)
    for file in sorted(folder.glob("*.safetensors")):
        safetensors_header(file)


def _card_of(folder: Path, kind: str, repo_id: str, facts: dict[str, Any] | None) -> ModelCard:
    own = folder / "README.md"
    if own.is_file():
        if facts:
            raise MoEError(
                f"{own} is the card, and card_facts are for a folder without one: nothing was sent. Write the facts into it "
                "(`moe-hf card` makes a card of them), remove it, or leave card_facts out."
            )
        try:
            return ModelCard.load(own)
        except (ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise MoEError(f"{own} has broken metadata ({reason}): nothing was sent. Repair or remove it.") from error
    if kind == "model":
        known = {} if (run := run_folder(folder)) is None else run_facts(run)
        tokenizer = tokenizer_in(folder)
        return model_card(on_meta(str(folder)), repo_id=repo_id, card_facts=known | (facts or {}), tokenizer=tokenizer)
    return _card_of_parts(folder, kind, repo_id, dict(facts or {}))


def _card_of_parts(folder: Path, kind: str, repo_id: str, facts: dict[str, Any]) -> ModelCard:
    """The card of adapters or deltas: what they are, and the lines that put them onto their base model."""
    strange = sorted(facts.keys() - {*METADATA_FACTS, "title"})
    if strange:
        raise MoEError(
            f"The card of {kind} has no place for {strange[0]!r}; it has one for {list(METADATA_FACTS)} and title."
        )
    title = facts.pop("title", repo_id.rpartition("/")[2])
    base = facts.pop("base_model", None) or hub_id(_base_of(folder, kind))
    tags = ["moe", "moe_hf", kind.replace(" ", "-"), *facts.pop("tags", [])]
    library = "peft" if kind == "adapters of PEFT" else "moe_hf"
    data = ModelCardData(
        base_model=base, base_model_relation="adapter" if base else None, library_name=library, tags=tags, **facts
    )
    name = repo_id.rpartition("/")[2]
    load = {"expert deltas": "load_expert_deltas", "trained parameters": "load_trained"}.get(kind, "load_expert_lora")
    return ModelCard(f"""---
{data.to_yaml()}
---

# {title}

These are {kind} for {f"`{base}`" if base else "a MoE model"}, made with moe_hf.

```python
import moe_hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base or "the base model"}")
moe_hf.{load}(model, moe_hf.pull_folder("{repo_id}", "{name}"))
```
""")


def _base_of(folder: Path, kind: str) -> str | None:
    if kind == "expert deltas":
        return _facts_in_header(folder / DELTAS_NAME).get("base_model")
    if kind == "adapters of experts":
        return (_facts_in_header(folder / LORA_NAME).get("base") or {}).get("name")
    if kind == "adapters of PEFT":
        return read_json_object(folder / PEFT_CONFIG).get("base_model_name_or_path")
    return None


def _without_local_paths(files: Mapping[str, Path], work: Path) -> dict[str, Path]:
    """Copies of the files that say where on this machine a source lay: of a path they keep the name only."""
    changed = {}
    for name in ("config.json", PEFT_CONFIG, DELTAS_NAME):
        if name not in files:
            continue
        copy = work / name
        if name == DELTAS_NAME:
            if not _shorten_base_of_deltas(files[name], copy):
                continue
        else:
            shutil.copyfile(files[name], copy)
            (_shorten_base_of_peft if name == PEFT_CONFIG else shorten_local_source)(copy)
        changed[name] = copy
    return changed


def _shorten_base_of_peft(config_file: Path) -> None:
    config = read_json_object(config_file)
    base = config.get("base_model_name_or_path")
    if base and hub_id(base) is None:
        config["base_model_name_or_path"] = Path(base).name
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _shorten_base_of_deltas(source: Path, copy: Path) -> bool:
    """Write the copy with another header where the base is a path; the tensors are copied as they are."""
    facts = _facts_in_header(source)
    base = facts.get("base_model")
    if not base or hub_id(base) is not None or Path(base).name == base:
        return False
    with open(source, "rb") as old, open(copy, "wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header["__metadata__"]["facts"] = json.dumps(facts | {"base_model": Path(base).name})
        text = json.dumps(header, separators=(",", ":")).encode()
        # The format aligns the data to 8 bytes with spaces.
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new)
    return True


def _facts_in_header(file: Path) -> dict[str, Any]:
    safetensors_header(file)
    with open(file, "rb") as stream:
        metadata = json.loads(stream.read(int.from_bytes(stream.read(8), "little"))).get("__metadata__")
    try:
        facts = json.loads(metadata["facts"])
        return facts if isinstance(facts, dict) else {}
    except (TypeError, KeyError, ValueError) as error:
        raise MoEError(f"{file} is no file of expert deltas; make one with save_expert_deltas.") from error
