"""`examine`: whatever holds experts, and what is wrong with it."""

import os
from pathlib import Path
from typing import Any

import torch

from moe_hf.doctor.adapters import examine_adapter
from moe_hf.doctor.checkpoints import examine_checkpoint
from moe_hf.doctor.deltas import examine_deltas
from moe_hf.doctor.findings import ERROR, Report
from moe_hf.doctor.merged import look_at_merge
from moe_hf.doctor.opening import Opened, local_path, open_base, open_folder, open_gguf, open_low_memory, open_model
from moe_hf.doctor.probe import look_at_text
from moe_hf.doctor.runs import examine_run
from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_deltas import DELTAS_NAME
from moe_hf.finetuning.lora_files import LORA_NAME
from moe_hf.finetuning.peft_files import PEFT_CONFIG
from moe_hf.gguf_files import gguf_file_of
from moe_hf.inference.folders import FACTS_NAME
from moe_hf.trainer.checkpoints import list_checkpoints


STATE_NAME = "trainer_state.json"


def examine(
    what: Any,
    *,
    base: Any = None,
    adapter: str | os.PathLike | None = None,
    data: str | os.PathLike | torch.Tensor | None = None,
) -> Report:
    """Look for experts and routers that were lost, scrambled, or left alone, in whatever has them.

    Files are read expert by expert, so that memory does not grow with them; a model is loaded only for a forward pass (`data`).
    Nothing is changed. Findings of severity `"error"` say that what runs is not what was trained; a healthy model has neither
    errors nor warnings.

    Args:
        what: a checkpoint folder or Hub id of any MoE of transformers or of this package; a GGUF file; a model in memory; adapters of
            PEFT or of this package; expert deltas; a quantized or low-memory folder; the output folder of a run.
        base (*optional*): what it was made from: a MoE of the same family, or its dense parent; a folder, a Hub id, a GGUF file or a
            model in memory.
        adapter (`str`, *optional*): adapters that are said to be merged into `what`.
        data (`str` or `torch.Tensor`, *optional*): text, as every command takes it, or token ids (B, S), for a forward pass: loss,
            saturated routers, dead experts, and whether undoing a known fault lowers the loss.

    Returns:
        [`Report`]: `report.findings`, `report.errors`, `report.to_json()`.

    Raises:
        MoEError: there is nothing under that name, or an argument does not go with it. What is wrong with files is a finding.
    """
    if not isinstance(what, str | os.PathLike):
        opened = open_model(what)
        return _with_checkpoint(Report(opened.name, "model in memory"), opened, base, adapter, data, what)
    path, name = local_path(what), str(what)
    if path.is_dir() and (path / PEFT_CONFIG).is_file() or (path / LORA_NAME).is_file():
        _refuse(adapter=adapter, data=data, kind="an adapter")
        return _closed(Report(name, "adapter"), examine_adapter, path, base)
    if (path / DELTAS_NAME).is_file() or path.name.endswith(DELTAS_NAME):
        _refuse(adapter=adapter, data=data, kind="a file of expert deltas")
        return _closed(Report(name, "expert deltas"), examine_deltas, path, base)
    if path.is_dir() and (list_checkpoints(path) or _is_run(path)):
        _refuse(adapter=adapter, data=data, kind="the folder of a run")
        return _closed(Report(name, "run"), examine_run, path, base)
    kind, opener = _kind_of(path)
    report = Report(name, kind)
    try:
        opened = opener(gguf_file_of(path) or path, name)
    except (MoEError, OSError) as error:
        if not _has_weights(path):
            raise
        report.add(ERROR, "unreadable", f"{error} Nothing else was looked at.")
        return report
    return _with_checkpoint(report, opened, base, adapter, data, path)


def _kind_of(path: Path) -> tuple[str, Any]:
    if gguf_file_of(path) is not None:
        return "GGUF file", open_gguf
    if (path / FACTS_NAME).is_file():
        return "low-memory folder", open_low_memory
    return "checkpoint", open_folder


def _is_run(path: Path) -> bool:
    return (path / STATE_NAME).is_file() and not (path / "config.json").is_file()


def _has_weights(path: Path) -> bool:
    """Whether what cannot be read is a fault of files, and not of the user."""
    return path.is_file() or any(path.glob("*.safetensors*")) or (path / "config.json").is_file()


def _refuse(kind: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise MoEError(f"{name} is for a checkpoint or a model, and {kind} was given: leave it out.")


def _closed(report: Report, function: Any, path: Path, base: Any) -> Report:
    """Run an examination that may need a base, and close what was opened for it."""
    opened = None if base is None else open_base(base)
    try:
        function(report, path, opened)
    finally:
        if opened is not None:
            opened.close()
    return report


def _with_checkpoint(report: Report, opened: Opened, base: Any, adapter: Any, data: Any, source: Any) -> Report:
    beside = None
    try:
        if base is not None:
            beside = open_base(base)
        if adapter is not None and beside is None:
            raise MoEError("adapter is what is said to be merged: give the base that it was trained on too.")
        examine_checkpoint(report, opened, beside, adapter is not None)
        if adapter is not None:
            look_at_merge(report, opened, beside, local_path(adapter))
        if data is not None:
            look_at_text(report, opened, source, data)
    finally:
        opened.close()
        if beside is not None:
            beside.close()
    return report
