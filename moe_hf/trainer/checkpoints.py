"""Checkpoints that are whole or absent, and that are loaded whole or refused."""

import copy
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.finetuning.trained_files import holds_trained, load_trained
from moe_hf.finetuning.trained_tensors import plain_class
from moe_hf.saving import (
    check_shard_index,
    publish_folder,
    publish_into,
    refuse_foreign_weights,
    temporary_sibling,
    verify_manifest,
)
from moe_hf.trainer.layouts import is_sharded
from moe_hf.trainer.optimizer_states import has_state


logger = logging.get_logger(__name__)

RESUME_FILES = ("trainer_state.json", "scheduler.pt")
# Written by DeepSpeed, which keeps the optimizer's state in folders of its own.
DEEPSPEED_FILE = "latest"


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


def resume_choice(args: TrainingArguments) -> str | bool:
    """Read `resume_from_checkpoint`: a folder; true for the newest whole one; `auto` for that where there is one."""
    value = str(args.resume_from_checkpoint or False)
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    return bool(list_checkpoints(args.output_dir)) if value == "auto" else value


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
    if not has_state(folder):
        missing.append("optimizer.pt")
    if missing and not (folder / DEEPSPEED_FILE).is_file():
        raise MoEError(
            f"{str(folder)!r} cannot be resumed: {', '.join(missing)} missing (saved with save_only_model?). "
            "Give it as the model of a new run instead."
        )
    return str(folder)


def read_weights(model: PreTrainedModel, folder: str | Path, **kwargs) -> PreTrainedModel:
    """A second model with the weights in `folder`, through the conversion that `from_pretrained` does.

    A plain `load_state_dict` finds no experts in a checkpoint that stores them one by one. Values are read in the
    widest dtype of `model`, so float32 masters beside a bf16 rest come back bit by bit.

    Args:
        kwargs: as `from_pretrained` takes them.

    Raises:
        MoEError: weights are missing, left over or of another shape.
    """
    check_shard_index(folder)
    is_double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    try:
        loaded, info = plain_class(model).from_pretrained(
            folder,
            dtype=torch.float64 if is_double else torch.float32,
            output_loading_info=True,
            local_files_only=True,
            **kwargs,
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
        raise MoEError(f"The weights in {str(folder)!r} do not fit {plain_class(model).__name__}: {listed}.")
    return loaded


def load_part_(model: nn.Module, folder: str | Path) -> bool:
    """Load a checkpoint that has what trains alone, as `save_trained` writes it.

    Returns:
        whether it is one; all processes call it.

    Raises:
        MoEError: it belongs to another base model, other adapters or another choice of experts.
    """
    if not holds_trained(folder):
        return False
    load_trained(model, folder)
    return True


def load_weights_(model: PreTrainedModel, folder: str | Path) -> None:
    """Load all weights of `folder` into `model`, which has them whole.

    Raises:
        MoEError: weights are missing, left over or of another shape; `model` is then unchanged.
    """
    if not load_part_(model, folder):
        model.load_state_dict(read_weights(model, folder).state_dict(), strict=True)


@torch.no_grad()
def load_shards_(model: PreTrainedModel, folder: str | Path) -> None:
    """Load all weights of `folder` into `model`, of which each process has its part; each reads its part alone.

    Raises:
        MoEError: weights are missing, left over or of another shape; `model` is then unchanged.
    """
    loaded = read_weights(
        model, folder, distributed_config=copy.deepcopy(model.config.distributed_config)
    ).state_dict()
    for name, tensor in model.state_dict().items():
        local, found = (t.to_local() if isinstance(t, DTensor) else t for t in (tensor, loaded[name]))
        local.copy_(found)


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


def prepare_folder(path: str | Path, *, replace: bool = False) -> Path:
    """Make the temporary folder, beside `path`, that all processes write to; the main process calls it.

    Raises:
        MoEError: `path` exists and is not to be replaced.
    """
    destination = Path(path).absolute()
    if destination.exists() and not replace:
        raise MoEError(f"{str(destination)!r} exists already. Remove it or choose another folder.")
    staging = temporary_sibling(destination, "shared")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish(staging: Path, path: str | Path, *, replace: bool = False) -> None:
    """Put a finished temporary folder in the place of `path`, with a manifest; the main process calls it."""
    if replace:
        shutil.rmtree(path, ignore_errors=True)
    publish_folder(staging, path)


@contextmanager
def shared_folder(path: str | Path, *, is_main: bool, num_processes: int, beside: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that all processes write to and that becomes `path`, with a manifest, at the end.

    Args:
        beside (`bool`): `path` may exist, and its files go in beside what it holds (`publish_into`).

    Raises:
        MoEError: `path` exists, or beside holds weights of something else; nothing is left behind.
    """

    def prepare() -> Path:
        if not beside:
            return prepare_folder(path)
        refuse_foreign_weights(Path(path))
        # Inside, since a folder that exists may be a file system of its own.
        return prepare_folder(Path(path) / "save", replace=True)

    staging = agree(prepare, is_main, num_processes)
    try:
        yield staging
        if num_processes > 1:
            torch.distributed.barrier()
        agree(lambda: publish_into(staging, path) if beside else publish(staging, path), is_main, num_processes)
    except BaseException:
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def weights_at_hand(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let the main process save a sharded model alone: its weights were gathered before."""
    shadowed = {
        "gather_sharded_state_dict_for_save": lambda *args, **kwargs: dict(weights),
        "barrier_after_gathered_checkpoint_save": lambda *args: None,
    }
    if not is_sharded(model):
        yield
        return
    for name, function in shadowed.items():
        setattr(model, name, function)
    try:
        yield
    finally:
        for name in shadowed:
            delattr(model, name)


@contextmanager
def saving_allowed(args: TrainingArguments) -> Iterator[None]:
    """Trainer refuses to checkpoint a model that was sharded when it was loaded; this one can."""
    asked, args.save_only_model = args.save_only_model, True
    try:
        yield
    finally:
        args.save_only_model = asked
