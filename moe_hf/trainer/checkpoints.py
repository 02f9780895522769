"""Checkpoints that are whole or absent, and that are loaded whole or refused."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_deltas import DELTAS_NAME, load_expert_deltas
from moe_hf.finetuning.lora_files import LORA_NAME, load_expert_lora
from moe_hf.saving import check_shard_index, publish_folder, temporary_sibling, verify_manifest


logger = logging.get_logger(__name__)

RESUME_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the folders `checkpoint-N` in `output_dir`, newest step first."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = {p: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", p.name) for p in folders if p.is_dir()}
    return sorted((p for p, match in steps.items() if match), key=lambda p: int(steps[p][1]), reverse=True)


def newest_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest checkpoint in `output_dir` whose manifest holds; each newer one is named with its fault."""
    for folder in list_checkpoints(output_dir):
        try:
            verify_manifest(folder)
        except MoEError as error:
            logger.warning(f"Skipping {folder}: {error}")
        else:
            return folder
    return None


def choose_checkpoint(output_dir: str | Path, resume: str | bool | None) -> str | None:
    """Return the folder to resume from.

    Args:
        resume (`str` or `bool`, *optional*): a folder; `True` for the newest whole checkpoint in `output_dir`; `None` or
            `False` to start anew.

    Raises:
        MoEError: nothing to resume from, a damaged or incomplete checkpoint, or a fresh start in a folder that holds
            checkpoints of an earlier run (a later resume could not tell them apart).
    """
    if not resume:
        found = list_checkpoints(output_dir)
        if found:
            raise MoEError(
                f"{str(output_dir)!r} holds checkpoints of an earlier run ({found[0].name}). Resume with "
                "resume_from_checkpoint=True, or choose another output_dir."
            )
        return None
    if resume is True:
        folder = newest_whole_checkpoint(output_dir)
        if folder is None:
            raise MoEError(f"No whole checkpoint in {str(output_dir)!r} to resume from. Start without resuming.")
    else:
        folder = Path(resume)
        verify_manifest(folder)
    missing = [name for name in RESUME_FILES if not (folder / name).is_file()]
    if missing:
        raise MoEError(
            f"{str(folder)!r} cannot be resumed: {', '.join(missing)} missing (saved with save_only_model?). "
            "Give it as the model of a new run instead."
        )
    return str(folder)


def load_weights_(model: PreTrainedModel, folder: str | Path) -> None:
    """Load all weights of `folder` into `model`, through the conversion that `from_pretrained` does.

    A plain `load_state_dict` finds no experts in a checkpoint that stores them one by one. Values are read in the
    widest dtype of `model`, so float32 masters beside a bf16 rest come back bit by bit. A checkpoint of the scope
    `selected` has the trained experts alone, one with adapters these alone.

    Raises:
        MoEError: weights are missing, left over or of another shape; or trained experts belong to another base model or
            another choice; `model` is then unchanged.
    """
    if (Path(folder) / DELTAS_NAME).is_file():
        load_expert_deltas(model, folder)
        return
    if (Path(folder) / LORA_NAME).is_file():
        load_expert_lora(model, folder)
        return
    check_shard_index(folder)
    is_double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    try:
        loaded, info = type(model).from_pretrained(
            folder,
            dtype=torch.float64 if is_double else torch.float32,
            output_loading_info=True,
            local_files_only=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise MoEError(f"Could not load the weights in {str(folder)!r}: {error}") from error
    faults = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if not faults:
        expected, found = model.state_dict(), loaded.state_dict()
        faults = {
            "missing_keys": sorted(expected.keys() - found.keys()),
            "unexpected_keys": sorted(found.keys() - expected.keys()),
            "mismatched_keys": sorted(
                k for k in expected.keys() & found.keys() if expected[k].shape != found[k].shape
            ),
        }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {', '.join(names[:5])}" for kind, names in faults.items() if names)
        raise MoEError(f"The weights in {str(folder)!r} do not fit {type(model).__name__}: {listed}.")
    model.load_state_dict(loaded.state_dict(), strict=True)


def agree(action: Callable[[], Any], is_main: bool, num_processes: int) -> Any:
    """Run `action` on the main process; every process returns its result or raises its `MoEError`."""
    result, message = None, None
    if is_main:
        try:
            result = action()
        except MoEError as error:
            message = str(error)
    if num_processes > 1:
        result, message = broadcast_object_list([result, message])
    if message is not None:
        raise MoEError(message)
    return result


@contextmanager
def shared_folder(path: str | Path, *, is_main: bool, num_processes: int, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that all processes write to and that becomes `path`, with a manifest, at the end.

    Args:
        replace (`bool`): put it in the place of an existing folder, which is removed once the new one is complete.

    Raises:
        MoEError: `path` exists and is not to be replaced; nothing is left behind.
    """
    destination = Path(path).absolute()
    staging = temporary_sibling(destination, "shared")

    def prepare() -> None:
        if destination.exists() and not replace:
            raise MoEError(f"{str(destination)!r} exists already. Remove it or choose another folder.")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)

    def publish() -> None:
        if replace:
            shutil.rmtree(destination, ignore_errors=True)
        publish_folder(staging, destination)

    agree(prepare, is_main, num_processes)
    try:
        yield staging
        if num_processes > 1:
            torch.distributed.barrier()
        agree(publish, is_main, num_processes)
    except BaseException:
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise
