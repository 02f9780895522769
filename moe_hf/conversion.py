"""`convert_source`: a GGUF file or a quantized checkpoint in, an ordinary checkpoint out, which any tool reads."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from moe_hf.dense_sources import (
    SOURCE_RECORD,
    find_dense_tokenizer,
    load_dense,
    needs_conversion,
    quantized_as,
    read_dense_config,
    tell_quantized,
)
from moe_hf.dtypes import dtype_name
from moe_hf.errors import MoEError
from moe_hf.gguf_files import gguf_file_of, read_gguf
from moe_hf.planning import dense_on_meta
from moe_hf.saving import atomic_folder, read_json_object, refuse_existing
from moe_hf.upcycling.sources import check_all_loaded, check_dense_config, check_dense_model, check_dense_weights


@dataclass(frozen=True)
class ConvertedSource:
    """What [`convert_source`] wrote.

    Attributes:
        folder: with the checkpoint.
        source: name of the file or the folder that it was made from.
        quantized_as: how the weights were stored, for people to read; None where they were floating-point numbers.
        dtype: of the weights now.
        license: as the source names it, or None.
        has_tokenizer: whether there was one.
    """

    folder: Path
    source: str
    quantized_as: str | None
    dtype: str
    license: str | None
    has_tokenizer: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"folder": str(self.folder)}


def convert_source(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str = "5GB",
) -> ConvertedSource:
    """Write the dense model of a GGUF file or of a quantized checkpoint as an ordinary checkpoint.

    Its weights are the quantized ones as floating-point numbers; what quantizing has lost stays lost. Tokenizer, chat
    template, generation settings and licence come along. The whole model is in memory for a while.

    Args:
        source (`str` or `os.PathLike`): a GGUF file, a folder with one, or a folder or Hub id of a quantized checkpoint.
        output_dir (`str` or `os.PathLike`): must not exist; it is there whole, or not at all.
        dtype (`str` or `torch.dtype`): of the weights that are written: `"auto"` as in [`upcycle`], or a dtype of torch.
        max_shard_size (`int` or `str`): bytes of tensors in one file.

    Returns:
        [`ConvertedSource`].

    Raises:
        MoEError: the source cannot be read whole or is an ordinary checkpoint already, `output_dir` exists, or the disk has
            no room; nothing is written.
    """
    output_dir, name = Path(output_dir).expanduser(), str(source)
    refuse_existing(output_dir)
    if not needs_conversion(source):
        raise MoEError(f"{name} is not quantized, and no GGUF file: it needs no conversion.")
    named = dtype_name(dtype, ("auto", "float32", "bfloat16", "float16"))
    dtype = named if named == "auto" else getattr(torch, named)
    check_dense_config(read_dense_config(source), name)
    _check_space(source, output_dir, dtype)
    how = quantized_as(source)
    tell_quantized(name, how)
    model, report = load_dense(source, dtype)
    check_dense_model(model, name)
    check_all_loaded(model, report, name)
    check_dense_weights(model, name)
    tokenizer = find_dense_tokenizer(source)
    file = gguf_file_of(source)
    made = ConvertedSource(
        folder=output_dir,
        source=(file or Path(name)).name,
        quantized_as=how,
        dtype=str(model.dtype).removeprefix("torch."),
        license=read_gguf(file).license if file is not None else None,
        has_tokenizer=tokenizer is not None,
    )
    with atomic_folder(output_dir) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _card(made).save(folder / "README.md")
        facts = made.to_dict() | {"folder": None, "fingerprint": fingerprint(source)}
        (folder / SOURCE_RECORD).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return made


def is_conversion_of(folder: Path, source: str | os.PathLike) -> bool:
    """Whether a folder is what [`convert_source`] wrote of the source as it is now."""
    record = folder / SOURCE_RECORD
    return record.is_file() and read_json_object(record).get("fingerprint") == fingerprint(source)


def fingerprint(source: str | os.PathLike) -> dict[str, Any]:
    """What tells whether a conversion would be the same: sizes and times of the files, versions of what reads them."""
    file, path = gguf_file_of(source), Path(source).expanduser()
    files = [file] if file is not None else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.json"))
    stats = {one.name: [one.stat().st_size, one.stat().st_mtime_ns] for one in files}
    readers = {"transformers": transformers.__version__} | ({} if file is None else {"gguf": version("gguf")})
    return {"files": stats, **readers}


def _check_space(source: str | os.PathLike, output_dir: Path, dtype: str | torch.dtype) -> None:
    model = dense_on_meta(str(source))
    needed = dense_bytes(model, model.dtype if dtype == "auto" else dtype)
    refuse_full_disk(output_dir, needed)


def dense_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Of the weights of a model in a dtype; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def refuse_full_disk(output_dir: Path, needed: int) -> None:
    """Refuse what the disk has no room for.

    Raises:
        MoEError: with what is needed and what is free.
    """
    there = next(parent for parent in output_dir.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise MoEError(
            f"{output_dir} needs {needed / 1e9:.2f} GB, and its file system has {free / 1e9:.2f} GB free: nothing was "
            "written. Make room, or choose another file system."
        )


def _card(made: ConvertedSource) -> ModelCard:
    """Where the weights come from, and under which licence."""
    was = (
        f"Its weights were quantized ({made.quantized_as}); these are their values"
        if made.quantized_as
        else "Its weights"
    )
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", license=made.license)
    text = f"# {Path(made.source).stem}\n\nMade from `{made.source}` by moe_hf. {was} in {made.dtype}."
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
